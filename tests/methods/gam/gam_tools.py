"""Small networks with GAM on them, and ways to compare what a step did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxgraft
from models.small import exactly, net

SIZE = (3, 24, 24)
TAPS = ["layer1", "act2", "fc"]


def images(size: int = 6, seed: int = 1, side: int = 24) -> Tensor:
    return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed))


def patched(model: nn.Module | None = None, layers: Any = TAPS, **options: Any) -> nn.Module:
    size = options.pop("input_size", SIZE)
    return fxgraft.patch(model or net(), "gam", layers=layers, input_size=size, **options)  # type: ignore[return-value]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in after.items():
        exactly(value, before[key])
