"""A network with awkward values, and what forward hooks see of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fxgraft
from models.toys import CLASSES, net

SIZE = (3, 16, 16)


def tapped_net(layers: Any, **options: Any) -> nn.Module:
    """The toy network with taps."""
    return fxgraft.patch(net(), "taps", layers=layers, input_size=SIZE, **options)


def seen_by_hooks(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of module outputs, made on the spot by forward hooks of the passes to come."""
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.detach().clone()})
        )
    return seen


class Pair(nn.Module):
    """Gives two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.mean((1, 2, 3)).unsqueeze(1)


class Size(nn.Module):
    """Gives no tensor."""

    def forward(self, x: Tensor) -> tuple[int, int]:
        return int(x.shape[2]), int(x.shape[3])


class Listed(nn.Module):
    """Gives a list, which its caller goes on filling."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + 1]


class Halved(nn.Module):
    """Gives a view of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2]


class Odd(nn.Module):
    """Writes through views and bases, in one mode only, and hands on what isn't a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.halved = Halved()
        self.norm = nn.BatchNorm2d(4)
        self.before_plain = nn.Conv2d(4, 4, 1)
        self.plain = nn.ReLU()
        self.pair = Pair()
        self.grown = Listed()
        self.size = Size()
        self.only_eval = nn.Identity()
        self.before_drop = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scale, offset = self.pair(x)
        grown = self.grown(offset)
        grown.append(grown[0] * 2)
        self.size(x)
        x = self.conv(x + scale)
        half = self.halved(x)
        x.mul_(2)  # through the base of the view
        half.unsqueeze(0).add_(1)  # through a view of the view
        x = self.plain(self.before_plain(self.norm(x)))
        if not self.training:
            x = self.only_eval(x)
        x = self.drop(self.before_drop(x))
        return self.fc(x.mean((2, 3))) + grown[1]


def odd() -> Odd:
    """The same network every time, in training mode; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Odd()
