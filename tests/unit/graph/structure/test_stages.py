"""The blocks before a site: inside of stages, and where they give several values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxgraft.errors import StructureError
from fxgraft.graph.structure.blocks import blocks_before
from fxgraft.graph.structure.heads.head import pooled_map
from fxgraft.graph.structure.positions import positions
from fxgraft.graph.structure.sites import list_sites, resolve
from fxgraft.graph.structure.stages import main_stages, stages, stem_output
from fxgraft.graph.tracing.model_trace import ModelTrace
from models.toys import net

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


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv(x)
        x += shortcut
        return x


class Maps(nn.Module):
    """Three numbers of places; the head reads a map that was written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, WIDTH, 3, padding=1), nn.MaxPool2d(2)
        self.first, self.second, self.third = Residual(), Residual(), Residual()
        self.head = nn.Conv2d(WIDTH, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = self.second(self.pool(x))
        x = self.third(self.pool(x))
        return self.head(x).mean((2, 3))


class Pairs(nn.Module):
    """Stages that give a pair, and are declared."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [{"module": name, "num_chs": WIDTH} for name in ("first", "second")]
        self.embed, self.fc = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.first, self.second = Block("first"), Block("first")

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(self.embed(x.flatten(2).mT))
        x, _ = self.second(x)
        return self.fc(x.mean(1))


@pytest.mark.parametrize(
    ("model", "words", "expected"),
    [
        (Maps, "**", ["first", "second", "third"]),
        (Pairs, "second.add", ["first.add", "second.add"]),
    ],
)
def test_what_was_asked_before_changes_no_stage(model: Any, words: str, expected: list[str]) -> None:
    fresh, asked = ModelTrace(model(), (3, 16, 16)), ModelTrace(model(), (3, 16, 16))
    assert all(site.shape is not None for site in list_sites(asked, words))
    assert [site.name for site in stages(asked)] == [site.name for site in stages(fresh)] == expected


QUESTIONS: dict[str, Callable[[ModelTrace], Any]] = {
    "sites": lambda trace: [(site.name, site.shape, site.layout) for site in list_sites(trace)],
    "positions": lambda trace: [site.name for site in positions(trace, "post")],
    "stages": lambda trace: [site.name for site in stages(trace)],
    "main stages": lambda trace: [site.name for site in main_stages(trace)],
    "stem": lambda trace: site.name if (site := stem_output(trace)) else None,
    "pooled map": lambda trace: site.name if (site := pooled_map(trace)) else None,
    "blocks": lambda trace: [[block.name for block in blocks_before(trace, site)] for site in stages(trace)],
}


@pytest.mark.parametrize("model", [Maps, net])
def test_no_question_changes_the_answer_to_another(model: Callable[[], nn.Module]) -> None:
    fresh = {name: ask(ModelTrace(model(), (3, 16, 16))) for name, ask in QUESTIONS.items()}
    for order in (list(QUESTIONS), list(QUESTIONS)[::-1]):
        trace = ModelTrace(model(), (3, 16, 16))
        assert {name: QUESTIONS[name](trace) for name in order} == fresh


class Called(nn.Module):
    """A stem, then one block that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, WIDTH, 3, 2, 1), nn.Linear(WIDTH, 5)
        self.block = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.fc(x.mean((2, 3)))


class Registers(nn.Module):
    """Blocks on tokens behind which others stand that are no places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
        self.registers = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.blocks = nn.Sequential(*(Behind() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat((x, self.registers.expand(len(x), -1, -1)), 1)
        return self.fc(self.blocks(x)[:, :-2].mean(1))


class Behind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Called, "'block' gives .*it is called 3 times"),
        (Registers, "'blocks.0' gives .*positions isn't seen"),
    ],
)
def test_stages_that_would_end_in_front_of_the_blocks(model: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(StructureError, match=f"cannot be told: {why}(?s:.*)would end at 'stem'"):
        stages(ModelTrace(model(), (3, 16, 16)))


class OfLayers(nn.Module):
    """A plain network as tutorials write it: activations and poolings are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Linear(8 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 2)
        x = functional.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        return self.head(x.flatten(1))


class OfModules(nn.Module):
    """The same with modules for all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(8 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def test_stages_of_plain_layers_end_behind_their_functions() -> None:
    functions, modules = (ModelTrace(model, (3, 32, 32)) for model in (OfLayers(), OfModules()))
    assert [site.name for site in stages(functions)] == ["relu", "relu_1", "max_pool2d_1"]
    assert [site.name for site in stages(modules)] == ["features.2", "features.6", "features"]
    assert [site.shape for site in stages(functions)] == [site.shape for site in stages(modules)]
