"""RSC's ImageNet variant against a loop written from its description."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft.patches.rsc import tensors as core
from fxgraft.patches.rsc.patch import record
from models.toys import Net


def possible(scores: list[float]) -> tuple[int, list[int]]:
    """How many positions of one sample are muted, and among which: the top half if it has so many."""
    positions = len(scores)
    third = positions // 3
    median = sorted(scores, reverse=True)[positions // 2]
    above = [i for i, score in enumerate(scores) if score > median]
    return third, above if len(above) >= third else list(range(positions))


def rows(positions: int) -> Tensor:
    """Distinct scores, scores with many ties, and scores that all tie."""
    rng = random.Random(positions)
    distinct = rng.sample(range(1000), positions)
    tied = [min(each, 400) for each in distinct]
    few = [0.0] * (positions - 1) + [1.0]
    return torch.tensor([distinct, tied, few, [2.0] * positions], dtype=torch.float64)


@pytest.mark.parametrize("positions", [1, 2, 3, 4, 9, 16, 49, 196])
def test_a_random_third_of_the_top_half(positions: int) -> None:
    scores = rows(positions)
    torch.manual_seed(0)
    drawn = torch.stack([core.random_top_half_mask(scores, 1 / 3) for _ in range(400)])
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    for b, sample in enumerate(scores.tolist()):
        count, among = possible(sample)
        muted = drawn[:, b] == 0
        assert (muted.sum(1) == count).all()
        # Each of them equally often, and nothing else ever.
        wanted = torch.zeros(positions)
        wanted[among] = count / max(len(among), 1)
        torch.testing.assert_close(muted.float().mean(0), wanted, rtol=0, atol=0.13)
        assert not muted[:, wanted == 0].any()


def test_the_schedule() -> None:
    wanted = {0: 6, 18: 6, 19: 5.5, 38: 5.5, 39: 5, 58: 5, 59: 4.5, 78: 4.5, 79: 4, 99: 4}
    for epoch, part in wanted.items():
        assert core.imagenet_share_schedule(epoch) == pytest.approx(1 / part)


@pytest.mark.parametrize("scope", ["spatial", "channel"])
def test_on_a_model(scope: Any) -> None:
    model = fxgraft.patch(
        Net(), "rsc", strategy="random_top_half", scope=scope, batch_schedule="imagenet", epochs=100,
        input_size=(3, 32, 32),
    ).train()  # fmt: skip
    fxgraft.set_progress(model, 0.79)
    (unit,) = (u for u in fxgraft.grafts(model)[0].units.values() if hasattr(u, "batch_share"))
    assert unit.batch_share == pytest.approx(1 / 4)
    y = torch.arange(8) % 4
    with record(model) as records:
        fxgraft.loss(model, model(torch.randn(8, 3, 32, 32), target=y), y).backward()
    mask = records[0].mask.flatten(1)
    share = 1 / 3 if scope == "spatial" else 1 / 3.2
    assert ((mask == 0).sum(1) == int(mask.shape[1] * share)).all()
    assert records[0].selected.sum() <= 2
