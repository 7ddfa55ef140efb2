"""Training on generated clips: digits that move, which bare and patched networks of clips learn to tell apart."""

from __future__ import annotations

import functools

import pytest
import torch
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


def trained(method: str | None, **options: object) -> tuple[nn.Module, float]:
    """Train a small network of clips; return it with the share of new clips that it tells right."""
    torch.manual_seed(0)
    model = VideoNet(16)
    if method is not None:
        fxgraft.patch(model, method, input_size=(3, FRAMES, SIDE, SIDE), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = moving_digits()
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


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (None, {}),
        ("rsc", {}),
        ("selfnorm", {"layers": ["norm"]}),
    ],
)
def test_moving_digits_are_learned(method: str | None, options: dict[str, object]) -> None:
    _, accuracy = trained(method, **options)
    assert accuracy > 0.6  # by chance 0.25
