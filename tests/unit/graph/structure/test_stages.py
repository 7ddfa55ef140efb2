"""The blocks before a site: inside of stages, and where they give several values."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from torch import Tensor, nn

from fxgraft.graph.structure.positions import positions
from fxgraft.graph.structure.sites import resolve
from fxgraft.graph.structure.stages import blocks_before, stages
from fxgraft.graph.tracing.model_trace import ModelTrace

WIDTH = 6


class Block(nn.Module):
    """Adds to tokens, and gives them in a place of its own among other values."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.gives = gives

    def forward(self, x: Tensor) -> Any:
        y = x + self.mlp(x)
        return {"tokens": y, "first": (y, 3), "second": (y.sum(), y)}[self.gives]


class Stage(nn.Module):
    def __init__(self, gives: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(gives) for _ in range(2))
        self.place = {"first": 0, "second": 1}.get(gives)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x) if self.place is None else block(x)[self.place]
        return x


class Tokens(nn.Module):
    """Two stages of two blocks each."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(gives) for _ in range(2))
        self.embed, self.norm, self.fc = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).mT)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.norm(x)[:, 0])


@pytest.mark.parametrize(("gives", "inside"), [("tokens", ""), ("first", ".add"), ("second", ".add")])
def test_stages_and_their_blocks(gives: str, inside: str) -> None:
    trace = ModelTrace(Tokens(gives), (3, 4, 4))
    (norm,) = resolve(trace, "norm")
    assert [site.name for site in blocks_before(trace, norm)] == [
        "stages.1",
        "stages.0",
        f"stages.1.blocks.1{inside}",
        f"stages.1.blocks.0{inside}",
        f"stages.0.blocks.1{inside}",
        f"stages.0.blocks.0{inside}",
    ]


def test_what_is_before_a_block() -> None:
    trace = ModelTrace(Tokens("tokens"), (3, 4, 4))
    (site,) = resolve(trace, "stages.1.blocks.1")
    assert [each.name for each in blocks_before(trace, site)][:2] == ["stages.1.blocks.0", "stages.0"]


def test_stages_stay_in_order_whatever_was_asked_before() -> None:
    """Looking at blocks runs what works in place on values of the pass, also on those that stages give."""
    trace = ModelTrace(timm.create_model("test_resnet", num_classes=3), (3, 96, 96))
    positions(trace, "post")
    assert [site.name for site in stages(trace)] == ["act1", "layer1", "layer2", "layer3", "layer4"]
