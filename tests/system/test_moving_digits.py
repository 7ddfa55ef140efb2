"""Training on generated clips: digits that move, which bare and patched networks of clips learn to tell apart."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tools.readme import own_methods
from torch import Tensor, nn

import fxgraft
from models.volumes import VideoNet

pytestmark = pytest.mark.sweep
FRAMES, SIDE = 4, 14


@functools.cache
def moving_digits(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clips (N, 3, T, S, S) of the digits 0 to 3, each going across in a direction of its own."""
    digits = pytest.importorskip("sklearn.datasets").load_digits(n_class=4)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(digits.target), generator=g)[:count]
    clips = torch.zeros(count, 3, FRAMES, SIDE, SIDE)
    for clip, digit in zip(clips, torch.tensor(digits.images)[chosen].float() / 16, strict=True):
        row, column, down, right = torch.randint(0, 3, (4,), generator=g).tolist()
        for frame in range(FRAMES):
            top, left = (row + frame * (down - 1)) % 6, (column + frame * (right - 1)) % 6
            clip[:, frame, top : top + 8, left : left + 8] = digit
    return clips, torch.tensor(digits.target)[chosen]


METHODS: dict[str, dict[str, Any]] = {
    "rsc": {},
    "crossnorm": {"layers": ["norm"]},
    "selfnorm": {"layers": ["norm"]},
    "diversification": {"patch": 2},
    "mixmo": {},
    "mixstyle": {"layers": ["norm"]},
    "dsu": {"layers": ["norm"]},
    "taps": {"layers": ["layer1"]},
}
"""All methods but GAM, which adapts a network that has learned."""


@functools.cache
def trained(method: str | None = None, told: bool = True) -> tuple[nn.Module, float]:
    """Train a small network of clips; return it with the share of new clips that it tells right.

    Args:
        method: that is put on it; None for none.
        told: whether the labels are those of the clips, or of others.
    """
    torch.manual_seed(0)
    model = VideoNet(16)
    if method is not None:
        fxgraft.patch(model, method, input_size=(3, FRAMES, SIDE, SIDE), **METHODS[method])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = moving_digits()
    y = y if told else y[torch.randperm(len(y))]
    for step in range(500):
        part = torch.randperm(len(x))[:32]
        fxgraft.set_progress(model, step / 500) if method else None
        out = model.train()(x[part], target=y[part]) if method else model.train()(x[part])
        fxgraft.loss(model, out, y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    new, labels = moving_digits(120, 1)
    with torch.no_grad():
        return model, (model.eval()(new).argmax(1) == labels).float().mean().item()


def test_every_method_that_trains_is_here() -> None:
    assert METHODS.keys() == own_methods().keys() - {"gam"}


def test_moving_digits_are_learned_from_their_labels() -> None:
    assert trained()[1] > 0.7  # by chance 0.25
    assert trained(told=False)[1] < 0.45


@pytest.mark.parametrize("method", METHODS)
def test_moving_digits_are_learned_with_a_method(method: str) -> None:
    model, accuracy = trained(method)
    assert accuracy > 0.7
    learned, alone = (each.get_submodule("layer1.0").weight for each in (model, trained()[0]))
    assert torch.equal(learned, alone) == (method == "taps")
