"""A loader of data whose batches set their labels."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from fxgraft.errors import no_module
from fxgraft.graph.runtime.labels import Entry, take_from
from fxgraft.graph.runtime.published_labels import Labels, LabelSource, publishing

Batch = TypeVar("Batch")

_HOW = "Say where they are: fxgraft.with_targets(loader, index=...)."


class LabelledLoader(Generic[Batch]):
    """A loader whose batches set their labels; see `with_targets`.

    It can be iterated again and again, and is the loader in all other respects: its attributes are read from it
    and set on it. ``next`` and ``close`` work on a run of its own.
    """

    _OWN = ("_loader", "_index", "_model", "_run")

    def __init__(self, loader: Iterable[Batch], index: Entry, model: nn.Module | None) -> None:
        self._loader, self._index = loader, index
        self._model = None if model is None else weakref.ref(model)
        self._run: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Run through the loader from its start."""
        model = None if self._model is None else self._model()
        source = LabelSource(model)
        with publishing(source):
            for batch in self._loader:
                labels, around = take_from(batch, self._index, _HOW)
                source.publish(Labels(labels, "pass", batch, around))
                yield batch

    def __next__(self) -> Batch:
        if self._run is None:
            self._run = iter(self)
        return next(self._run)

    def close(self) -> None:
        """End the run that ``next`` began, and take its labels back."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """The class of the wrapped loader, where several processes share a data set.

        Libraries split a `torch.utils.data.DataLoader` between the processes, and leave objects of other classes as
        they are: then every process would train on all batches. The loader that they make sets no labels; an error in
        its first training pass says so.
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        shared = several and torch.distributed.get_world_size() > 1
        loader = self.__dict__.get("_loader")
        return type(loader) if shared and loader is not None else LabelledLoader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)


def with_targets(
    loader: Iterable[Batch], index: Entry = 1, model: nn.Module | None = None
) -> LabelledLoader[Batch]:
    """Iterate over a loader and set each batch's labels for the patched models called on it.

    Each batch's labels serve one training pass. A second pass before the next batch raises
    `TargetError`, since nothing says that those are still the right labels; use `targets` for that.
    A pass on a tensor of a batch, a view or a part of it takes the labels of that batch, also where the loop is some
    batches ahead of its passes, or runs through several loaders at once. Inputs that were copied on the way (to another
    device, or augmented) cannot be told: they are those of the last batch. Where the loop is ahead, or several loaders
    are open, such a pass raises `TargetError`; ``model`` says which of several loaders it reads.

    The labels are seen by the thread or task that iterates. Where accelerate or Lightning prepares loaders, wrap what
    it returns: ``with_targets(accelerator.prepare(loader))``.

    Args:
        loader: yields batches that hold their labels: sequences, mappings, dataclasses or other objects.
        index: where in a batch the labels are: a position, a key, an attribute, or a path of these, as
            ``("labelled", 1)``. Where the path meets None the batch has no labels.
        model: the only model whose passes read the labels; by default all do.

    Returns:
        What yields the loader's batches, unchanged, as often as the loader does, and has its length and attributes.

    Raises:
        WrappedModelError: ``model`` isn't a module.
        TargetError: (at a batch) it has no such entry.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise no_module(model)
    return LabelledLoader(loader, index, model)
