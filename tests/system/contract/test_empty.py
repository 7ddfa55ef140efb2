"""A batch of no images: the bare networks return (0, K), and so do patched ones, in both modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxgraft
from models.toys import CLASSES, images, net

WAYS: list[tuple[str, dict[str, Any]]] = [
    ("taps", {"layers": ["stage2"]}),
    ("crossnorm", {"p": 1.0}),
    ("crossnorm", {"p": 1.0, "crop": "both", "consistency": True}),
    ("selfnorm", {}),
    ("selfnorm", {"gates": 2}),
    ("rsc", {}),
    ("rsc", {"layer": "stage1"}),
    ("rsc", {"strategy": "random"}),
    ("diversification", {}),
    ("mixmo", {}),
    ("mixmo", {"mixing": "cut", "repetitions": 2}),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("method", "options"), WAYS, ids=str)
def test_an_empty_batch_passes(method: str, options: dict[str, Any], training: bool) -> None:
    model = fxgraft.patch(net(), method, **options, input_size=(3, 8, 8)).train(training)
    y = torch.zeros(0, dtype=torch.long)
    out = model(images()[:0], target=y) if training else model(images()[:0])
    assert out.shape[-2:] == (0, CLASSES)
    loss = fxgraft.loss(model, out, y)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(b.isfinite().all() for b in model.buffers() if b.is_floating_point())
    model.zero_grad()
    y = torch.arange(4) % CLASSES
    fxgraft.loss(model, model(images(), target=y) if training else model(images()), y).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
