"""DSU against its release: its numbers, and five steps of training with all six places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft.patches.dsu import perturb_moments
from methods.neighbours import CASES, Release, arrays, check, check_training
from methods.releases import batch, stock

CLASSES, SIZE, PIXELS = 5, 6, 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_numbers_of_the_release(dtype: torch.dtype) -> None:
    case = arrays("dsu", "dsu_0", dtype)
    tolerance = 1e-12 if dtype == torch.float64 else CASES["dsu"]
    check(case, lambda x: perturb_moments(x, case["eps_0"], case["eps_1"]), tolerance)


def perturbed(x: Tensor) -> Tensor:
    """By hand, as the paper writes it."""
    mean, std = x.mean((2, 3)), (x.var((2, 3)) + 1e-6).sqrt()
    noise = [torch.randn(x.shape[:2]) for _ in range(2)]
    new_mean, new_std = (
        each + draw * (each.var(0) + 1e-6).sqrt() for each, draw in zip((mean, std), noise, strict=True)
    )
    mean, std, new_mean, new_std = (each[..., None, None] for each in (mean, std, new_mean, new_std))
    return (x - mean) / std * new_std + new_mean


def test_five_steps_of_training_with_six_places() -> None:
    model = fxgraft.patch(stock(CLASSES), "dsu", preset="pacs", input_size=(3, PIXELS, PIXELS))
    assert list(fxgraft.grafts(model)[0].units) == ["conv1", "maxpool", *(f"layer{i}" for i in range(1, 5))]
    reference = Release(stock(CLASSES), perturbed, tuple(range(6)), 0.5)

    def ours(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return fxgraft.loss(model, model(x), y)

    check_training(model, ours, reference, (SIZE, PIXELS, CLASSES))
