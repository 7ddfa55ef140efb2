"""Labels from outside a call: who publishes them, and which of them a pass takes."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxgraft.errors import no_module

Batch = TypeVar("Batch")


class Labels:
    """Labels set from outside a call, by `targets` or `with_targets`.

    Attributes:
        value: class indices (B,) or soft targets (B, K).
        reusable: whether several training passes may read them. Labels that a loader sets belong to
            one batch and one pass; those of a ``with targets(y):`` block hold for the whole block.
        used: whether a training pass has read them.
    """

    def __init__(self, value: Any, reusable: bool, batch: Any = None) -> None:
        self.value = value
        self.reusable = reusable
        self.used = False
        self._batch = batch

    def of(self, inputs: tuple[Any, ...]) -> bool:
        """Say whether a call's inputs are seen to be of the batch: the same tensor, or the same memory."""
        given = {place for each in inputs if (place := _memory(each)) is not None}
        leaves = pytree.tree_leaves(self._batch) if given else ()
        return any(leaf is not self.value and _memory(leaf) in given for leaf in leaves)


def _memory(value: Any) -> tuple[Any, ...] | None:
    """Say where a tensor keeps its values; None where that cannot be told."""
    try:
        place = value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0
    except (
        NotImplementedError,
        RuntimeError,
    ):  # a tensor without storage of its own: fake, sparse, functorch's
        return None
    return (value.device, place) if place else None


class Source:
    """Who publishes labels: a block, or one run through a loader.

    Attributes:
        known: the labels of the last batches; one more than the current one, for loops that look one batch ahead.
        model: the only model whose passes read them; None for any.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.known: deque[Labels] = deque(maxlen=2)
        self.model = None if model is None else weakref.ref(model)

    def serves(self, model: nn.Module) -> bool:
        """Say whether the passes of a model read these labels."""
        return self.model is None or self.model() is model


# The innermost source is the last one. Of a thread or task alone: what one publishes no other one sees.
_published: ContextVar[tuple[Source, ...]] = ContextVar("fxgraft_labels", default=())


@contextmanager
def _publishing(source: Source) -> Iterator[None]:
    try:
        _published.set((*_published.get(), source))
        yield
    finally:
        # Not reset by a token: a generator may be closed in another context than it was started in.
        _published.set(tuple(each for each in _published.get() if each is not source))


def published(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Labels | None, bool]:
    """Return the labels that a pass takes of those set for this thread or task, and whether that is a guess.

    Labels whose batch the inputs are seen to be of come first; then those bound to the model; then the innermost.
    With two loaders open, the innermost one's are a guess.

    Args:
        model: that makes the pass.
        inputs: of the call.
    """
    sources = [each for each in _published.get() if each.serves(model) and each.known]
    if not sources:
        return None, False
    if sources[-1].known[-1].reusable:  # a block around the call says it all
        return sources[-1].known[-1], False
    loaders = [each for each in sources if not each.known[-1].reusable]
    if not torch.compiler.is_compiling():
        for source in loaders[::-1]:
            for labels in reversed(source.known):
                if labels.of(inputs):
                    return labels, False
    bound = [each for each in loaders if each.model is not None]
    chosen = bound or loaders
    return chosen[-1].known[-1], len(chosen) > 1


@contextmanager
def targets(y: Tensor) -> Iterator[None]:
    """Give labels to every patched model called inside the block.

    For training loops that can only call ``model(x)``. The labels hold for the whole block, however
    many passes it makes, and for the thread or task that entered it.

    Args:
        y: class indices (B,), soft targets (B, K), or whatever the criterion takes.
    """
    source = Source()
    source.known.append(Labels(y, reusable=True))
    with _publishing(source):
        yield


def relabel(y: Any, batch: Any) -> None:
    """Set other labels for the batch that a loader of `with_targets` has given last; without one, do nothing.

    For loops that mix images and labels after loading.

    Args:
        y: the labels from now on.
        batch: tensors that a call may get, by which it is seen to be of the batch.
    """
    source = next((each for each in _published.get()[::-1] if each.known), None)
    if source is not None and not source.known[-1].reusable:
        source.known[-1] = Labels(y, reusable=False, batch=batch)


class LabelledLoader(Generic[Batch]):
    """A loader whose batches set their labels; see `with_targets`.

    It can be iterated again and again, and is the loader in all other respects: its attributes are read from it
    and set on it. ``next`` and ``close`` work on a run of its own.
    """

    _OWN = ("_loader", "_index", "_model", "_run")

    def __init__(self, loader: Iterable[Batch], index: int | str, model: nn.Module | None) -> None:
        self._loader, self._index = loader, index
        self._model = None if model is None else weakref.ref(model)
        self._run: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Run through the loader from its start."""
        model = None if self._model is None else self._model()
        source = Source(model)
        with _publishing(source):
            for batch in self._loader:
                source.known.append(Labels(batch[self._index], reusable=False, batch=batch))  # type: ignore[index]
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
    loader: Iterable[Batch], index: int | str = 1, model: nn.Module | None = None
) -> LabelledLoader[Batch]:
    """Iterate over a loader and set each batch's labels for the patched models called on it.

    Each batch's labels serve one training pass. A second pass before the next batch raises
    `TargetError`, since nothing says that those are still the right labels; use `targets` for that.
    A pass on a tensor of a batch takes the labels of that batch, also where the loop is one batch ahead of the pass
    or runs through several loaders at once. Inputs that were copied on the way (to another device) cannot be told;
    then they are those of the last batch, and where several loaders are open, ``model`` says whose they are.

    The labels are seen by the thread or task that iterates.

    Args:
        loader: yields batches that hold their labels at ``batch[index]``.
        index: position or key of the labels in a batch.
        model: the only model whose passes read the labels; by default all do.

    Returns:
        What yields the loader's batches, unchanged, as often as the loader does, and has its length and attributes.

    Raises:
        WrappedModelError: ``model`` is no module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise no_module(model)
    return LabelledLoader(loader, index, model)
