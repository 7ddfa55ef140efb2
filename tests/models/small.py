"""Small networks that place a known value in front of a known tail, and ways to look at what RSC did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import RSCRecord, record
from fxgraft.patches.rsc.tensors import apply_selection

CLASSES = 5
SITES = pytest.mark.parametrize("layer", ["layer1", "act2"], ids=["general", "closed_form"])
"""Sites of a `Net` on either side of where the closed form starts."""


class OpaqueLinear(nn.Linear):
    """A linear layer that no closed form recognises, so that the rest of the network runs again."""


class Net(nn.Module):
    """Two convolutional stages with BatchNorm, then pooling, dropout and one linear layer.

    Behind ``layer2`` the tail is the closed form, behind ``layer1`` it is not.
    """

    def __init__(
        self, dropout: float = 0.0, inplace: bool = False, norm: bool = True, linear: Any = nn.Linear
    ) -> None:
        super().__init__()
        bn = nn.BatchNorm2d if norm else nn.Identity
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), bn(8))
        self.act1 = nn.ReLU(inplace=inplace)
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), bn(12))
        self.act2 = nn.ReLU(inplace=inplace)
        self.drop = nn.Dropout(dropout)
        self.fc = linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.layer1(x))
        x = self.act2(self.layer2(x)).mean((2, 3))
        return self.fc(self.drop(x))


def net(seed: int = 0, **options: Any) -> Net:
    """A `Net` whose BatchNorm has seen data, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(**options)
        model(torch.randn(16, 3, 24, 24))
    return model


def batch(size: int = 6, height: int = 24, width: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and labels, the same ones each time."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, height, width, generator=g), torch.randint(CLASSES, (size,), generator=g)


def recorded(model: nn.Module, x: Tensor, target: Tensor) -> tuple[Any, list[RSCRecord]]:
    """One training pass and what it muted."""
    with record(model) as records:
        out = model(x, target=target)
    return out, records


def final_mask(entry: RSCRecord) -> Tensor:
    """The mask that the pass was multiplied by, in canonical form."""
    return apply_selection(entry.mask, entry.selected)


def patched(model: nn.Module, layer: Any, **options: Any) -> nn.Module:
    """The model with RSC at `layer`, sites resolved on 24×24 images."""
    size = options.pop("input_size", (3, 24, 24))
    return fxgraft.patch(model, "rsc", layer=layer, input_size=size, **options)  # type: ignore[return-value]


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def muted_counts(mask: Tensor) -> list[int]:
    """How many entries of each sample a mask mutes."""
    return (mask == 0).flatten(1).sum(1).tolist()
