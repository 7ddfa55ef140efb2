"""Adaptive batch normalisation: estimates the statistics of BatchNorm again, on images of another domain.

Li, Wang, Shi, Hou, Liu: "Adaptive Batch Normalization for practical domain adaptation" (Pattern Recognition,
2018). The parameter-free relative of deep activation matching, usable alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fxgraft._torch import BatchNorm
from fxgraft.adaptation.streams import gives_batches, images_of
from fxgraft.arguments import checked_device
from fxgraft.errors import ConfigError, StructureError, no_module
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.tracing.preserve import preserved_modes
from fxgraft.patches.gam.step import renew_sources
from fxgraft.patches.options import is_number

M = TypeVar("M", bound=nn.Module)
Statistics = tuple[Tensor, Tensor]
"""Mean and unbiased variance of every channel, in double precision."""


def adapt_batchnorm(
    model: M,
    loader: Iterable[Any],
    *,
    reset: bool = True,
    momentum: float | None = None,
    exact: bool = False,
    device: str | torch.device | None = None,
) -> M:
    """Estimate the running statistics of every BatchNorm again, on images of another domain.

    One pass over the images, without labels and without gradients. Every other layer runs in evaluation mode;
    weights, modes and ``requires_grad`` stay as they are.

    Args:
        model: any model with BatchNorm, bare or patched; changed in place.
        loader: batches of images: tensors, tuples or lists that start with one, or dictionaries that hold one
            under "image", "x" or another usual name. Labels are not read.
        reset: forget the statistics of the domain that the model was trained on.
        momentum: share of each new batch, in (0, 1]; a batch with fewer images than the largest before it has
            proportionally less. With ``reset`` it starts from mean 0 and variance 1, as torch does, whose share is
            small after many batches only. None: the average of the moments of all batches, weighed by their images, or
            without ``reset`` every layer's own momentum.
        exact: mean and variance over all images instead, layer by layer, so that each layer sees what the layers before
            it give with their new statistics. It takes a pass for each BatchNorm and a loader that can be iterated
            again and again; batches may be of any size. Not with ``momentum`` or ``reset=False``.
        device: where the images go; by default to the model.

    Returns:
        The same model.

    Raises:
        WrappedModelError: what should be the model is none.
        StructureError: the model has no BatchNorm with running statistics.
        ConfigError: no batches, batches without images, values that are not finite, one value per channel, or options
            that are out of range or exclude each other. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise no_module(model)
    layers = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    if not layers:
        raise StructureError(
            f"{model._get_name()} has no BatchNorm with running statistics.\n"
            "Adapting means to estimate those on other images, and there is nothing to estimate.\n"
            "Leave the call out: models with LayerNorm or GroupNorm normalise every image by itself."
        )
    if momentum is not None and (not is_number(momentum) or not 0 < momentum <= 1):
        raise ConfigError(f"momentum is the share of each new batch, in (0, 1]; got {momentum!r}.")
    if exact and (momentum is not None or not reset):
        raise ConfigError(
            "exact=True takes the moments over all images, and momentum= or reset=False asks for a moving average.\n"
            "Leave exact= out, or the other two."
        )
    if not gives_batches(loader) or isinstance(loader, Dataset):
        raise ConfigError(
            f"The loader gives batches of images (B, C, H, W), and {type(loader).__name__} does not.\n"
            "Pass a DataLoader or a list of batches; [x] for one batch."
        )
    target_device = checked_device(device) if device is not None else layers[0].running_mean.device  # type: ignore[union-attr]
    renew_sources(model)
    with preserved_modes(model), _restored_on_failure(layers), torch.no_grad():
        model.eval()
        images = _Images(loader, target_device)
        if exact:
            _estimate_exactly(model, layers, images)
        else:
            _estimate(model, layers, images, reset, momentum)
        _check_finite(model, layers)
    return model


class _Images:
    """The images of a loader. They are checked once all are read, so that no batch waits for a GPU.

    Args:
        loader: a loader of batches.
        place: where they go.
    """

    def __init__(self, loader: Iterable[Any], place: torch.device) -> None:
        self.loader, self.place = loader, place
        self._finite: list[Tensor] = []
        self._passes = self.batches = 0

    def __iter__(self) -> Iterator[Tensor]:
        self._finite, any_images = [], False
        for batch in self.loader:
            any_images = True
            images = images_of(batch).to(self.place)
            self._finite.append(images.isfinite().all())
            yield images
        if not any_images and not self._passes:
            raise ConfigError(
                "The loader gave no batches, so there is nothing to estimate statistics from.\n"
                "An iterator can be used once; pass the DataLoader itself, or a list of batches."
            )
        if not any_images:
            raise ConfigError(
                "The loader gives its batches once, and exact=True takes a pass for every BatchNorm.\n"
                "Pass the DataLoader itself, or a list of batches."
            )
        self.batches = len(self._finite)
        self._passes += 1
        self._check_finite()

    def _check_finite(self) -> None:
        """Raise where a batch had values that are not finite."""
        wrong = [index for index, finite in enumerate(torch.stack(self._finite).tolist()) if not finite]
        if wrong:
            raise ConfigError(
                f"Images hold NaN or infinity, in batch {wrong[0]} and {len(wrong) - 1} others.\n"
                "One such value makes the statistics of its channel useless.\n"
                "Look for what the data set or its transforms make of the images."
            )


def _check_finite(model: nn.Module, layers: list[BatchNorm]) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    finite = torch.stack(
        [
            (layer.running_mean.sum() + layer.running_var.sum()).isfinite().cpu()  # type: ignore[union-attr]
            for layer in layers
        ]
    )
    wrong = [names[id(layer)] for layer, good in zip(layers, finite.tolist(), strict=True) if not good]
    if wrong:
        raise ConfigError(
            f"The statistics of {wrong[0]!r} and of {len(wrong) - 1} others are not finite, of images that are.\n"
            "Weights that are not finite do that, or values beyond the range of a 16-bit type.\n"
            "Estimate with the model in float32."
        )


def _estimate(
    model: nn.Module, layers: list[BatchNorm], images: _Images, reset: bool, momentum: float | None
) -> None:
    """Average the moments of batches, in one pass in which every BatchNorm normalises by its batch."""
    averages = [_Average(layer, reset, momentum) for layer in layers]
    for layer in layers:
        layer.training, layer.momentum = True, None if layer.num_batches_tracked is not None else 1.0
    largest = 0
    for batch in images:
        largest = max(largest, len(batch))
        for average in averages:
            average.clear()
        _run(model, batch)
        for average in averages:
            average.add(len(batch), largest)
    for average in averages:
        average.write()


class _Average:
    """The average of a layer's moments over batches, stored outside of the layer; on a GPU nothing waits for it.

    Args:
        layer: BatchNorm, which gives the moments of a batch where it keeps running statistics of that batch alone.
        reset: leave out what the layer knew.
        momentum: share of a new batch; None for all images alike, or without ``reset`` for the layer's own.
    """

    def __init__(self, layer: BatchNorm, reset: bool, momentum: float | None) -> None:
        self.layer = layer
        self.momentum = momentum if reset or momentum is not None else layer.momentum
        self.known = _statistics(layer)
        mean, var = self.known
        self.values = (torch.zeros_like(mean), torch.ones_like(var)) if reset else self.known
        count = layer.num_batches_tracked
        self.before = mean.new_zeros(1) if count is None else count.to(mean.dtype).view(1)
        self.calls = torch.zeros_like(self.before) if reset else self.before
        self.reached = torch.zeros_like(self.before)
        self.images: Tensor | None = None

    def clear(self) -> None:
        """Reset the layer, so that its next batch leaves the moments of that batch alone, averaged over its calls."""
        for buffer, value in zip(self.layer.buffers(recurse=False), (0, 1, 0), strict=False):
            buffer.fill_(value)

    def add(self, size: int, largest: int) -> None:
        """Add the moments of a batch; nothing if the layer was not called."""
        calls = self.layer.num_batches_tracked
        called = torch.ones_like(self.calls) if calls is None else (calls > 0).to(self.calls.dtype)
        if (
            self.images is None
        ):  # the old statistics count as many images as the batches so far, as if these had been full
            self.images = self.calls * largest
        if self.momentum is None:
            share = size / (self.images + size)
        else:
            share = torch.full_like(self.images, self.momentum * size / largest)
        share = share * called
        # With a share of 1 the old value doesn't count, and may be NaN.
        self.values = tuple(  # type: ignore[assignment]
            torch.where(share == 1, new, torch.lerp(old, new, share))
            for old, new in zip(self.values, _statistics(self.layer), strict=True)
        )
        self.images = self.images + size * called
        self.reached = self.reached + called
        self.calls = self.calls + (called if calls is None else calls)

    def write(self) -> None:
        """Write the average; a layer that no image reached keeps what it knew."""
        ways = zip((*self.values, self.calls), (*self.known, self.before), strict=True)
        mean, var, calls = (torch.where(self.reached > 0, now, before) for now, before in ways)
        _write(self.layer, (mean, var), calls)


def _estimate_exactly(model: nn.Module, layers: list[BatchNorm], images: _Images) -> None:
    """Compute mean and variance over all images, layer by layer in running order."""
    pending = list(layers)
    while pending:
        gathered = _moments_of_first(model, pending, images)
        if gathered is None:  # no image reaches the remaining layers: they keep their statistics
            return
        layer, moments = gathered
        _write(layer, moments.statistics(), torch.tensor(images.batches))
        pending.remove(layer)


def _moments_of_first(
    model: nn.Module, pending: list[BatchNorm], images: _Images
) -> tuple[BatchNorm, _Moments] | None:
    """Gather the moments of the layer that runs first: its input depends on none of the others."""
    gathered: list[tuple[BatchNorm, _Moments]] = []

    def gather(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not gathered:
            gathered.append((layer, _Moments()))  # type: ignore[arg-type]
        if layer is gathered[0][0]:
            x, state = args[0], state_of(layer)
            for unit in () if state is None else state.evaluation.inputs:
                x = unit(x)
            gathered[0][1].add(x)

    handles = [layer.register_forward_pre_hook(gather) for layer in pending]
    try:
        for batch in images:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return gathered[0] if gathered else None


class _Moments:
    """Mean and squared deviations of all values of a channel, gathered batch by batch without cancellation."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in values (B, C, *)."""
        values = x.detach().double().transpose(0, 1).flatten(1)
        mean = values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        count, total = values.shape[1], self.count + values.shape[1]
        gap = mean - self.mean.to(mean.device)
        self.mean = mean - gap * (self.count / total)
        self.squares = self.squares.to(mean.device) + squares + gap.square() * (self.count * count / total)
        self.count = total

    def statistics(self) -> Statistics:
        if self.count == 1:
            raise ConfigError(
                "All images together leave a BatchNorm with one value per channel, which has no variance.\n"
                "Pass more images."
            )
        return self.mean, self.squares / (self.count - 1)


def _statistics(layer: BatchNorm) -> Statistics:
    wide = torch.float32 if layer.weight is not None and layer.weight.device.type == "mps" else torch.float64
    return layer.running_mean.to(wide, copy=True), layer.running_var.to(wide, copy=True)  # type: ignore[union-attr]


def _write(layer: BatchNorm, statistics: Statistics, count: Tensor) -> None:
    for own, value in zip((layer.running_mean, layer.running_var), statistics, strict=True):
        own.copy_(value)  # type: ignore[union-attr]
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.copy_(count.reshape(()))


@contextmanager
def _restored_on_failure(layers: list[BatchNorm]) -> Iterator[None]:
    """Put back the settings of the layers afterwards, and where the block fails, their statistics too."""
    settings = [layer.momentum for layer in layers]
    before = [{name: b.clone() for name, b in layer.named_buffers(recurse=False)} for layer in layers]
    states = [state for layer in layers if (state := state_of(layer)) is not None]
    programs = [state.training for state in states]
    failed = True
    try:
        for state in states:  # units that act in training have no part in this
            state.training = state.evaluation
        yield
        failed = False
    finally:
        for state, program in zip(states, programs, strict=True):
            state.training = program
        for layer, own, kept in zip(layers, settings, before, strict=True):
            layer.momentum = own
            for name, value in kept.items() if failed else ():
                getattr(layer, name).copy_(value)


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"A batch of {len(images)} leaves a BatchNorm with one value per channel, which has no variance.\n"
            "Statistics are those of a batch.\nUse larger batches, drop_last=True where the last one is short, or "
            "exact=True."
        ) from error
