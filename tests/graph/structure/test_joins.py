"""Residual joins are found by structure, in every form they are written in, and nothing else is taken for one."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import fxgraft
from fxgraft.graph.structure.joins import POSITIONS, residual_joins
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.branches import iadd
from fxgraft.graph.tracing.editing import After, Edge


class Branch(nn.Sequential):
    def __init__(self, channels: int = 4) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1))


class Block(nn.Module):
    """A block around a branch, with a projected shortcut if asked for; subclasses write the addition."""

    def __init__(self, projected: bool = False) -> None:
        super().__init__()
        self.branch = Branch()
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if projected else nn.Identity()
        self.act = nn.ReLU(inplace=True)


class Plus(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.branch(x)
        x += shortcut
        return self.act(x)


class Function(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.shortcut(x), self.norm(self.branch(x)))


class Method(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).add_(self.shortcut(x))


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(self.norm(x)) * self.gamma)


class PreActivated(Block):
    def forward(self, x: Tensor) -> Tensor:
        ready = self.norm(x).relu()
        return self.branch(ready) + self.shortcut(ready)


class Viewed(Block):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.branch(x).flatten(2).transpose(1, 2)
        return (shortcut + x.transpose(1, 2).reshape(shortcut.shape)).contiguous()


class Sliced(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, :4] + self.branch(x)[:, :4], x), dim=1)[:, :4]


FORMS = {
    "plus": Plus(),
    "plus projected": Plus(projected=True),
    "in place": InPlace(),
    "in place projected": InPlace(projected=True),
    "function": Function(),
    "method": Method(projected=True),
    "scaled": Scaled(),
    "pre-activated": PreActivated(projected=True),
    "viewed": Viewed(),
    "sliced": Sliced(),
}


class ByArgument(nn.Module):
    """The shortcut is made by the caller and added by the block."""

    class Inner(Block):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.branch(x) + residual

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()
        self.project = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.project(x))


class Decoys(nn.Module):
    """Additions that are no residual joins."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(2, 16, 16))
        self.place = nn.Parameter(torch.zeros(2, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.second(x)  # parallel convolutions
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens, tokens), dim=2) + self.place  # position embedding
        q, k, v = self.query(tokens), self.key(tokens), self.value(tokens)
        q = q * self.place.cos() + q.roll(1, -1) * self.place.sin()  # rotary embedding
        attention = q @ k.transpose(1, 2) + self.bias  # position bias
        out = attention.softmax(-1) @ v + q  # residual pooling inside attention
        return out.mean(1)


def joins(model: nn.Module, size: tuple[int, int, int] = (4, 4, 4)) -> list[Any]:
    return residual_joins(Anatomy(model, size))


class Stack(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_found_once(form: str) -> None:
    (join,) = joins(Stack(FORMS[form]))
    assert join.owner == "block"
    assert set(join.edits) == set(POSITIONS)
    graph = Anatomy(Stack(FORMS[form]), (4, 4, 4)).graph("block", training=False).graph
    total = next(node for node in graph.nodes if f"block.{node.name}" == join.name)
    assert total.target in (operator.add, iadd, torch.add, "add_")
    operands = [join.edits["residual"].node, join.edits["identity"].node]
    assert sorted(operands) == sorted(node.name for node in total.all_input_nodes)
    assert "branch" not in join.edits["identity"].node
    assert join.edits["post"] == After(total.name)


@pytest.mark.parametrize("form", ["plus projected", "in place projected", "pre-activated"])
def test_pre_is_seen_by_the_branch_alone(form: str) -> None:
    (join,) = joins(Stack(FORMS[form]))
    fork = "relu" if form == "pre-activated" else "x"
    assert join.edits["pre"] == Edge(fork, ("branch",))
    assert join.edits["identity"].node == "shortcut"


def test_a_shortcut_given_as_an_argument() -> None:
    (join,) = joins(ByArgument())
    assert join.owner == "inner"
    assert join.edits["identity"].node == "residual"
    assert join.edits["pre"] == Edge("x", ("branch",))


def test_two_arguments_of_different_origin_are_no_join() -> None:
    class Fusion(ByArgument):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, torch.ones_like(x).cumsum(1))

    assert not joins(Fusion())


def test_decoys_are_not_taken_for_joins() -> None:
    assert not joins(Decoys())


def test_joins_of_a_model_that_arrives_traced() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    traced = fx.symbolic_trace(model)
    found = joins(traced, (3, 64, 64))
    assert len(found) == 8
    assert {join.owner for join in found} == {""}
    assert [j.edits["identity"].node for j in found][:3] == [
        "maxpool",
        "layer1_0_act2",
        "layer2_0_downsample_1",
    ]


@pytest.mark.parametrize(
    ("model", "blocks", "first"),
    [
        ("resnet50", 16, "layer1.0.add"),
        ("test_vit", 12, "blocks.0.add"),
        ("resnetv2_18", 8, "stages.0.blocks.0.add"),
    ],
)
def test_joins_of_well_known_models(model: str, blocks: int, first: str) -> None:
    bare = timm.create_model(model, num_classes=2)
    found = joins(bare, (3, 160, 160) if model == "test_vit" else (3, 64, 64))
    assert len(found) == blocks
    assert found[0].name == first


def test_the_listing_shows_every_join_with_its_positions() -> None:
    model = timm.create_model("resnet18", num_classes=2)
    sites = fxgraft.sites(model, "residual")
    assert sites.names[:5] == [f"layer1.0.add:{position}" for position in (*POSITIONS, "output")]
    # Five of each of eight joins, and of the three with a projected shortcut what that reads as well.
    assert len(sites) == 43
    assert [n for n in sites.names if n.endswith(":pre_with_projection")] == [
        f"layer{stage}.0.add:pre_with_projection" for stage in (2, 3, 4)
    ]
    pre, post = (next(s for s in sites if s.name == f"layer2.0.add:{p}") for p in ("pre", "post"))
    assert (pre.shape, post.shape) == ((2, 64, 56, 56), (2, 128, 28, 28))
    assert post.layout == "NCHW"


def test_the_listing_of_a_plain_stack_is_empty_and_patching_it_says_what_there_is() -> None:
    model = timm.create_model("vgg11", num_classes=2, mlp_ratio=0.01)
    assert len(fxgraft.sites(model, "residual")) == 0
    with pytest.raises(fxgraft.StructureError, match="10 convolutions, 0 norms, 10 activations") as caught:
        fxgraft.patch(model, "crossnorm", position="post", input_size=(3, 64, 64))
    assert "'conv', 'act'" in str(caught.value)


class Sized(nn.Module):
    """A join whose branch reads the size of its input, and a fusion that reads the size of the other stream."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x + self.conv(x.flatten(2).reshape(batch, channels, height, width))
        return x + self.other(y).reshape(x.shape[0], channels, height, width)


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.block = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), Sized()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x), self.side(x)).mean((2, 3))


def test_reading_a_size_is_no_part_of_a_branch() -> None:
    (join,) = residual_joins(Anatomy(TwoStreams(), (3, 4, 4)))
    assert join.name == "block.add"
    assert join.edits["pre"] == Edge("x", ("flatten",))
