"""Batches of a loader, epoch after epoch, from a place that can be found again.

A resumed run has to see the batches that the interrupted one would have seen. So a stream draws from a random
state of its own, notes that state at the start of each epoch, and finds its place by reading that epoch again
up to it: shuffling and augmentation repeat themselves whatever the networks draw in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import ConfigError, RecipeError
from fxgraft.graph.atomic import Step, restoring

IMAGE_KEYS = ("pixel_values", "image", "images", "x", "input", "inputs")
_END = object()


def gives_batches(loader: Any) -> bool:
    """Say whether a loader can be iterated; a tensor would give single images."""
    return isinstance(loader, Iterable) and not isinstance(loader, Tensor)


class Endless:
    """Images of a loader, over and over.

    The draws that a loader makes in this process from torch's CPU generator are kept apart from everyone
    else's; those of its own generators are left to it. ``set_epoch`` of a sampler is called.

    Args:
        loader: a DataLoader or anything that can be iterated again and again. A batch is a tensor (B, ...),
            or a tuple, list or mapping that holds one; what else it holds (labels) is left unread.
        name: what to call it in errors.

    Raises:
        ConfigError: the loader cannot be iterated.
    """

    def __init__(self, loader: Iterable[Any], name: str) -> None:
        if not gives_batches(loader):
            raise ConfigError(
                f"The {name} loader must give batches when iterated, got {type(loader).__name__}.\n"
                "Pass a DataLoader, or a list of batches."
            )
        self.loader, self.name = loader, name
        self.samplers = [part for part in _parts(loader) if part is not loader]
        generators = [getattr(part, "generator", None) for part in _parts(loader)]
        # One object per generator: a loader hands its own to the sampler it makes.
        self.generators = list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())
        seed = int(torch.randint(2**62, ()))
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._taken, self._largest = -1, 0, 0
        self._start = self._snapshot(self._random)

    def next(self) -> Tensor:
        """Return the images of the next batch; after the last batch comes the first of the next epoch.

        A last batch of a single image is passed over where others are larger: it has no statistics.

        Raises:
            ConfigError: the loader gives nothing, or batches without images.
        """
        with self._own_randomness():
            while True:
                batch = self._fetch()
                if batch is _END:
                    self._close()
                    continue
                images = images_of(batch, self.name)
                self._largest = max(self._largest, len(images))
                if len(images) > 1 or self._largest == 1:
                    return images

    def state(self) -> dict[str, Any]:
        """Return where the stream is, as plain values and tensors; the epoch's start decides every draw after it."""
        return {
            "epoch": self._epoch,
            "taken": self._taken,
            "largest": self._largest,
            "start": self._start,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave, by reading its epoch from the start.

        Raises:
            RecipeError: this loader has other generators, or ends before that place.
        """
        start = state["start"]
        if len(start["generators"]) != len(self.generators):
            raise self._another(f"{len(self.generators)} generators, not {len(start['generators'])}")
        self._random = start["random"]
        try:
            for generator, kept in zip(self.generators, start["generators"], strict=True):
                generator.set_state(kept)
        except (RuntimeError, TypeError) as error:
            raise self._another(f"a generator that does not take the state of then ({error})") from error
        self._epoch, self._largest = max(state["epoch"] - 1, -1), state["largest"]
        with self._own_randomness():
            self._close()
            for index in range(state["taken"]):
                if self._fetch() is _END:
                    raise self._another(f"{index} batches where {state['taken']} were read")

    def restoring(self) -> list[Step]:
        """Return the steps that put back what reading moves and the user holds: generators, and samplers' epochs."""
        heard = [s for s in self.samplers if hasattr(s, "set_epoch") and hasattr(s, "epoch")]
        return [
            *(partial(generator.set_state, generator.get_state()) for generator in self.generators),
            *(partial(sampler.set_epoch, sampler.epoch) for sampler in heard),
        ]

    def _another(self, difference: str) -> RecipeError:
        return RecipeError(
            f"The {self.name} loader is not the one of the checkpoint: it has {difference}.\n"
            "A run goes on exactly only over the same batches.\nPass the loader as it was, or start a new run."
        )

    def _fetch(self) -> Any:
        if self._iterator is None:
            self._begin()
        batch = next(self._iterator, _END)  # type: ignore[arg-type]
        self._taken += batch is not _END
        if batch is _END and not self._taken:
            again = " in its second epoch: it can be iterated only once" if self._epoch else ""
            raise ConfigError(
                f"The {self.name} loader gives no batch{again}.\n"
                "Pass a loader that can be iterated again and again, with at least one full batch "
                "(drop_last drops a smaller one)."
            )
        return batch

    def _begin(self) -> None:
        self._epoch, self._taken = self._epoch + 1, 0
        for sampler in self.samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._epoch)
        self._start = self._snapshot(torch.get_rng_state())
        self._iterator = iter(self.loader)

    def _snapshot(self, random: Tensor) -> dict[str, Any]:
        return {"random": random, "generators": [generator.get_state() for generator in self.generators]}

    def _close(self) -> None:
        self._iterator = None

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        # Only a block without an error moves the place: a stream whose loader has failed isn't read on.
        with restoring(partial(torch.set_rng_state, torch.get_rng_state())):
            torch.set_rng_state(self._random)
            yield
            self._random = torch.get_rng_state()


def _parts(loader: Any) -> list[Any]:
    """List a loader and the samplers it draws from."""
    parts = [loader]
    for inner in parts:
        for name in ("sampler", "batch_sampler"):
            part = getattr(inner, name, None)
            if part is not None and all(part is not known for known in parts):
                parts.append(part)
    return parts


def images_of(batch: Any, name: str = "given") -> Tensor:
    """Take the images out of a batch.

    Args:
        batch: a tensor; a tuple or list whose first element is one; or a mapping with one under a usual key
            (``pixel_values``, ``image``, ``images``, ``x``, ``input``, ``inputs``).
        name: name of the loader, for the error.

    Raises:
        ConfigError: there are none to be found, or they are not batched.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in IMAGE_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if isinstance(images, Tensor) and images.ndim and len(images):
        return images
    seen = (
        f"a mapping with {', '.join(map(repr, batch))}"
        if isinstance(batch, Mapping)
        else type(batch).__name__
    )
    raise ConfigError(
        f"A batch of the {name} loader holds no images: it is {seen}.\n"
        "A batch is a tensor (B, ...), a tuple that starts with one, or a mapping with one of the keys "
        f"{', '.join(IMAGE_KEYS)}.\nWrap the loader so that it gives one of these."
    )
