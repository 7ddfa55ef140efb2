"""CrossNorm's training (Tang, Gao, Zhu, Zhang, Li, Metaxas, ICCV 2021): five steps of the release's CIFAR scripts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from methods.releases import TOLERANCE, Typed, batch, deviation, stepping, stock
from methods.styles import agree, restyled

CLASSES, SIZE, PIXELS, UNITS, ACTIVE = 5, 5, 128, 4, 2
OTHER = pytest.mark.filterwarnings("ignore:The preset .* was published for:fxgraft.FxgraftWarning")
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


class Release(Typed):
    """The network with a CrossNorm at the end of every block."""

    def __init__(self, network: nn.Module, crop: str) -> None:
        super().__init__(network)
        self.crop = crop
        self.on: set[int] = set()
        self.passes: list[set[int]] = []

    def post(self, index: int, x: Tensor) -> Tensor:
        if index not in self.on:
            return x
        return restyled(x, self.crop)

    def crossed(self, x: Tensor, chance: float = 1.0) -> Tensor:
        """A pass with some of the units on."""
        if chance == 1 or bool(torch.rand(()) < chance):
            self.on = set(torch.randperm(UNITS)[:ACTIVE].tolist())
        self.passes.append(self.on)
        out = self(x)
        self.on = set()
        return out


@OTHER
@pytest.mark.parametrize(("preset", "chance"), [("cifar10_wrn", 0.5), ("cifar10_wrn_cnsn", 0.75)])
def test_five_steps_of_crossnorm(preset: str, chance: float) -> None:
    model, crop = stock(CLASSES), "neither" if preset == "cifar10_wrn" else "both"
    reference = Release(stock(CLASSES), crop)
    fxgraft.patch(model, "crossnorm", preset=preset, p=chance, input_size=(3, PIXELS, PIXELS))

    def ours(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return fxgraft.loss(model, model(x), y)

    def theirs(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return F.cross_entropy(reference.crossed(x, chance), y)

    assert _trained(model, reference, ours, theirs) < TOLERANCE
    assert set() in reference.passes
    assert set().union(*reference.passes) == set(range(UNITS))


@OTHER
def test_five_steps_with_consistency() -> None:
    model, reference, compared = stock(CLASSES), Release(stock(CLASSES), "both"), []
    fxgraft.patch(model, "crossnorm", preset="cifar100_wrn_cnsn_consistency", input_size=(3, PIXELS, PIXELS))

    def ours(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return fxgraft.loss(model, model(x), y)

    def theirs(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        clean = reference(x)
        loss = F.cross_entropy(clean, y)
        compared.append(bool(torch.rand(()) < 0.5))
        return loss + 10 * agree(clean, reference.crossed(x), reference.crossed(x)) if compared[-1] else loss

    assert _trained(model, reference, ours, theirs) < TOLERANCE
    assert set(compared) == {True, False}


def _trained(model: nn.Module, reference: nn.Module, ours: Any, theirs: Any) -> float:
    return deviation(
        stepping(ours, torch.optim.SGD(model.parameters(), **SGD)),
        stepping(theirs, torch.optim.SGD(reference.parameters(), **SGD)),
        (model.state_dict, reference.state_dict),
    )
