"""The scope of a batch where decisions are data, as in compiled calls: one of the two, at every kind of site."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxgraft
from fxgraft.extend import draws
from fxgraft.patches.rsc.patch import record
from models.small import CLASSES, SITES, batch, net


@SITES
@pytest.mark.parametrize(("drawn", "scope"), [(0.1, "spatial"), (0.9, "channel")])
def test_it_is_that_scope(layer: str, drawn: float, scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    found = []
    for chosen in ("both", scope):
        model = fxgraft.patch(net(), "rsc", layer=layer, scope=chosen, input_size=x.shape[1:]).train()
        with monkeypatch.context() as patched:
            if chosen == "both":
                patched.setattr(draws, "as_data", lambda: True)
                patched.setattr(torch, "rand", lambda *size, **options: torch.full((), drawn))
            with record(model) as records:
                out = model(x, target=y)
        found.append((out, records[0]))
    (out, ours), (expected, theirs) = found
    torch.testing.assert_close(out, expected)
    assert torch.equal(ours.selected, theirs.selected)
    assert torch.equal(ours.mask, theirs.mask.expand_as(ours.mask))
    assert 0 < ours.selected.sum() < len(x)


def test_more_classes_than_channels_compile() -> None:
    torch.compiler.reset()
    model = net()
    model.fc = torch.nn.Linear(model.fc.in_features, 50 * CLASSES)
    x, _ = batch()
    fxgraft.patch(model, "rsc", input_size=x.shape[1:]).train()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(x, target=torch.full((len(x),), 50 * CLASSES - 1)).shape == (len(x), 50 * CLASSES)
    torch.compiler.reset()
