"""Small networks with MixMo, and ways to look at what a pass mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxgraft
from models.small import batch, net

SMALL: dict[str, Any] = {"input_size": (3, 24, 24)}


def patched(model: nn.Module | None = None, **options: Any) -> Any:
    return fxgraft.patch(net() if model is None else model, "mixmo", **SMALL, **options)


def unit(model: nn.Module, kind: Any) -> Any:
    (found,) = (each for each in fxgraft.grafts(model)[0].units.values() if isinstance(each, kind))
    return found


def last_pairing(model: nn.Module) -> Any:
    """What the last pass mixed."""
    graft = fxgraft.grafts(model)[0]
    return graft.context.left.notes[graft.name]


def trained(model: Any, steps: int = 3) -> Any:
    """The model after a few steps at a rate that moves every member away from where it started."""
    x, y = batch()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        fxgraft.loss(model, model.train()(x, target=y), y).backward()
        optimiser.step()
    return model
