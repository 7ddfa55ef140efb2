"""Adaptive batch normalisation: another domain's statistics, nothing else.

Li, Wang, Shi, Hou, Liu: "Adaptive Batch Normalization for practical domain adaptation" (Pattern Recognition,
2018). The parameter-free relative of deep activation matching, usable alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxgraft.adaptation.streams import images_of
from fxgraft.errors import ConfigError, StructureError, no_module
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.tracing.preserve import preserved_modes

M = TypeVar("M", bound=nn.Module)


def adapt_batchnorm(
    model: M,
    loader: Iterable[Any],
    *,
    reset: bool = True,
    momentum: float | None = None,
    device: str | torch.device | None = None,
) -> M:
    """Estimate the running statistics of every BatchNorm anew, on images of another domain.

    One pass over the images, without labels and without gradients. Every other layer runs in evaluation mode;
    weights, modes and ``requires_grad`` stay as they are.

    Args:
        model: any model with BatchNorm, bare or patched; changed in place.
        loader: batches of images: tensors, tuples or lists that start with one, or dictionaries that hold one
            under "image", "x" or another usual name. Labels are not read; all batches count the same.
        reset: forget the statistics of the domain that the model was trained on.
        momentum: share of each new batch, in (0, 1]. None: the plain average of all batches, or without
            ``reset`` every layer's own momentum.
        device: where the images go; by default to the model.

    Returns:
        The same model.

    Raises:
        WrappedModelError: what should be the model is none.
        StructureError: the model has no BatchNorm with running statistics.
        ConfigError: no batches, batches without images, one value per channel, or a momentum out of range.
            The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise no_module(model)
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        raise StructureError(
            f"{model._get_name()} has no BatchNorm with running statistics.\n"
            "Adapting means to estimate those on other images, and there is nothing to estimate.\n"
            "Models with LayerNorm or GroupNorm normalise every image by itself."
        )
    if momentum is not None and (isinstance(momentum, bool) or not 0 < momentum <= 1):
        raise ConfigError(f"momentum is the share of each new batch, in (0, 1]; got {momentum!r}.")
    place = torch.device(device) if device is not None else layers[0].running_mean.device  # type: ignore[union-attr]
    with preserved_modes(model), _estimating(layers, reset, momentum), torch.no_grad():
        model.eval()
        for layer in layers:
            layer.training = True
        batches = 0
        for batch in loader:
            _run(model, images_of(batch).to(place))
            batches += 1
        if not batches:
            raise ConfigError(
                "The loader gave no batches, so there is nothing to estimate statistics from.\n"
                "An iterator can be used once; pass the DataLoader itself, or a list of batches."
            )
    return model


@contextmanager
def _estimating(layers: list[_BatchNorm], reset: bool, momentum: float | None) -> Iterator[None]:
    """Set the layers up for the pass; afterwards put back their settings, and on failure their statistics."""
    settings = [layer.momentum for layer in layers]
    before = [{name: b.clone() for name, b in layer.named_buffers(recurse=False)} for layer in layers]
    states = [state for layer in layers if (state := state_of(layer)) is not None]
    programs = [state.training for state in states]
    for state in states:  # what patches put on the layer in training has no part in this
        state.training = state.evaluation
    for layer in layers:
        if reset:
            layer.reset_running_stats()
        if reset or momentum is not None:
            layer.momentum = momentum
    failed = True
    try:
        yield
        failed = False
    finally:
        for state, program in zip(states, programs, strict=True):
            state.training = program
        for layer, own, kept in zip(layers, settings, before, strict=True):
            layer.momentum = own
            counter = layer.num_batches_tracked
            # A layer that no image reached keeps what it knew.
            if failed or (reset and counter is not None and not counter):
                for name, value in kept.items():
                    getattr(layer, name).copy_(value)


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"A batch of {len(images)} leaves a BatchNorm with one value per channel, which has no variance.\n"
            "Statistics are those of a batch.\nUse larger batches, and drop_last=True where the last one is short."
        ) from error
