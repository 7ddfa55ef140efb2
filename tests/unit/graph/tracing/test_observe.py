"""Shapes of recurrent layers, which are looked at on one position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import StructureError
from fxgraft.graph.tracing.observe import observe

SIZE = (3, 8, 8)


class Rows(nn.Module):
    """Reads the rows of an image one after the other."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, single: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(24, 5, batch_first=batch_first, **options)
        self.batch_first, self.single = batch_first, single

    def forward(self, x: Tensor) -> Any:
        rows = x.transpose(1, 2).flatten(2)
        if self.single:
            return self.rnn(rows[0])
        return self.rnn(rows if self.batch_first else rows.transpose(0, 1))


@pytest.mark.parametrize("single", [False, True], ids=["batch", "one sequence"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "both ways"]
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_shapes(kind: Any, options: dict[str, Any], batch_first: bool, single: bool) -> None:
    model = Rows(kind, batch_first, single, **options)
    out, state = model(torch.zeros(2, *SIZE))
    seen = observe(model, SIZE).output("rnn")
    assert seen[0].shape == out.shape
    states = [(seen[1], state)] if isinstance(state, Tensor) else zip(seen[1], state, strict=True)
    assert all(found.shape == expected.shape for found, expected in states)


def test_a_long_sequence_on_the_meta_device_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = nn.LSTM.forward

    def counted(self: nn.LSTM, x: Tensor, *args: Any) -> Any:
        lengths.append(x.shape[1])
        return forward(self, x, *args)

    monkeypatch.setattr(nn.LSTM, "forward", counted)
    model = Rows(nn.LSTM, batch_first=True, single=False).to("meta")
    assert observe(model, (3, 500, 8)).output("rnn")[0].shape == (2, 500, 5)
    assert lengths == [1]


def test_lazy_modules_are_named_before_their_first_call() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), head)
    with pytest.raises(
        StructureError, match=r"Sequential is lazy: '0.weight', '0.bias', '4.2.weight' and 1 oth"
    ):
        fxgraft.patch(model, "rsc", layer="3")
    model(torch.zeros(2, *SIZE))
    assert fxgraft.grafts(fxgraft.patch(model, "rsc", layer="3", input_size=SIZE))
