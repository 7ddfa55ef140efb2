"""CrossNorm's training (Tang, Gao, Zhu, Zhang, Li, Metaxas, ICCV 2021): five steps of the release's CIFAR scripts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from training_parity.releases import TOLERANCE, Typed, batch, deviation, stepping, stock

CLASSES, SIZE, PIXELS, UNITS, ACTIVE = 5, 5, 128, 4, 2
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel of every map."""
    size, channels = x.shape[:2]
    flat = x.reshape(size, channels, -1)
    mean, std = flat.mean(2), (flat.var(2) + 1e-5).sqrt()
    return mean.reshape(size, channels, 1, 1), std.reshape(size, channels, 1, 1)


def box(height: int, width: int) -> tuple[slice, slice]:
    """A box whose share of the map is uniform, drawn again until a tenth of the map or less is exceeded."""
    shares, centres = torch.rand(64).tolist(), torch.rand(64, 2).tolist()
    for share, (row, column) in zip(shares, centres, strict=True):
        tall, wide = int(height * share**0.5) // 2, int(width * share**0.5) // 2
        y, x = int(row * height), int(column * width)
        top, bottom = max(y - tall, 0), min(y + tall, height)
        left, right = max(x - wide, 0), min(x + wide, width)
        if (bottom - top) * (right - left) > 0.1 * height * width:
            return slice(top, bottom), slice(left, right)
    raise AssertionError("64 draws were not enough, choose another seed")


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
        partner = x[torch.randperm(x.shape[0])]
        if self.crop == "neither":
            inside = (slice(None), slice(None))
        else:
            inside = box(x.shape[2], x.shape[3])
            rows, columns = box(x.shape[2], x.shape[3])
            partner = partner[:, :, rows, columns]
        style_mean, style_std = moments(partner)
        content = x[:, :, inside[0], inside[1]]
        mean, std = moments(content)
        restyled = (content - mean) / std * style_std + style_mean
        mask = torch.zeros_like(x)
        mask[:, :, inside[0], inside[1]] = 1
        padded = torch.zeros_like(x)
        padded[:, :, inside[0], inside[1]] = restyled
        return x * (1 - mask) + padded

    def crossed(self, x: Tensor, chance: float = 1.0) -> Tensor:
        """A pass with some of the units on."""
        if chance == 1 or bool(torch.rand(()) < chance):
            self.on = set(torch.randperm(UNITS)[:ACTIVE].tolist())
        self.passes.append(self.on)
        out = self(x)
        self.on = set()
        return out


def agree(*logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence."""
    chances = [each.softmax(1) for each in logits]
    mixture = (sum(chances) / len(chances)).clamp(1e-7, 1).log()
    return sum(F.kl_div(mixture, each, reduction="batchmean") for each in chances) / len(chances)


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
