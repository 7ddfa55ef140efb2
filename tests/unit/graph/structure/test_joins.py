"""Residual joins are found by structure, in every form they are written in, and nothing else is taken for one."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath, drop_path
from torch import Tensor, fx, nn
from torchvision.ops import stochastic_depth

import fxgraft
from fxgraft.graph.structure.joins import POSITIONS, Join, residual_joins
from fxgraft.graph.tracing.branches import iadd
from fxgraft.graph.tracing.editing import After, Edge
from fxgraft.graph.tracing.model_trace import ModelTrace


def edit(join: Join, position: str) -> Any:
    """What a unit at a position of a join does in evaluation."""
    edits = join.sites[position].edits
    return None if edits is None else edits.evaluation


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
    """Additions that aren't residual joins."""

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
    return residual_joins(ModelTrace(model, size))


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
    assert set(join.sites) == set(POSITIONS)
    graph = ModelTrace(Stack(FORMS[form]), (4, 4, 4)).graph("block", training=False).graph
    total = next(node for node in graph.nodes if f"block.{node.name}" == join.name)
    assert total.target in (operator.add, iadd, torch.add, "add_")
    assert join.sites["identity"].node in [node.name for node in total.all_input_nodes]
    # A branch ends in front of what drops it.
    assert join.sites["residual"].node == {"scaled": "mul"}.get(
        form, next(n.name for n in total.all_input_nodes if n.name != join.sites["identity"].node)
    )
    assert "branch" not in join.sites["identity"].node
    assert edit(join, "post") == After(total.name)


@pytest.mark.parametrize("form", ["plus projected", "in place projected", "pre-activated"])
def test_pre_is_seen_by_the_branch_alone(form: str) -> None:
    (join,) = joins(Stack(FORMS[form]))
    fork = "relu" if form == "pre-activated" else "x"
    assert edit(join, "pre") == Edge(fork, ("branch",))
    assert join.sites["identity"].node == "shortcut"


def test_a_shortcut_given_as_an_argument() -> None:
    (join,) = joins(ByArgument())
    assert join.owner == "inner"
    assert join.sites["identity"].node == "residual"
    assert edit(join, "pre") == Edge("x", ("branch",))


def test_two_arguments_of_different_origin_are_no_join() -> None:
    class Fusion(ByArgument):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, torch.ones_like(x).cumsum(1))

    assert not joins(Fusion())


def test_decoys_are_not_taken_for_joins() -> None:
    assert not joins(Decoys())


def test_scores_with_relative_positions_are_no_join_where_heads_lie_among_the_images() -> None:
    """The one is a projection of queries; the other is made of keys as well, which share the image with them."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.keys = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1)
            self.relative = nn.Linear(2, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q = self.query(x).reshape(x.shape[0] * 2, 2, -1).transpose(1, 2)
            k, v = self.keys(x).reshape(x.shape[0] * 2, 4, -1).split([2, 2], 1)
            scores = (q @ k) * 0.5 + self.relative(q)
            return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(x.shape)

    assert not joins(Stack(Heads()))


def test_joins_of_a_model_that_arrives_traced() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    traced = fx.symbolic_trace(model)
    found = joins(traced, (3, 64, 64))
    assert len(found) == 8
    assert {join.owner for join in found} == {""}
    assert [j.sites["identity"].node for j in found][:3] == [
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
    (join,) = residual_joins(ModelTrace(TwoStreams(), (3, 4, 4)))
    assert join.name == "block.add"
    assert edit(join, "pre") == Edge("x", ("flatten",))


def _conv(channels: int = 4, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=groups)


class Adding(nn.Module):
    """Adds in a way that a test gives, as a function of the module and its input."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.one, self.other, self.third = _conv(), _conv(), _conv()
        self.depthwise, self.norm = _conv(groups=4), nn.BatchNorm2d(4)
        self.branch, self.down = Branch(), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.pool = nn.MaxPool2d(2)
        self.add = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, x)


SUMS: dict[str, tuple[Any, str]] = {
    "parallel convolutions": (lambda m, x: torch.relu(m.one(x) + m.other(x) + m.third(x)), ""),
    "parallel convolutions and an identity": (
        lambda m, x: torch.relu(m.one(x) + m.other(x) + m.norm(x)),
        "block",
    ),
    "the identity first": (lambda m, x: torch.relu(m.norm(x) + m.one(x) + m.other(x)), "block"),
    "parallel branches": (lambda m, x: x + m.branch(x) + m.one(m.norm(x)).relu(), "block"),
    "a position encoding": (lambda m, x: m.depthwise(x) + x, "depthwise"),
    "a depthwise layer": (lambda m, x: torch.relu(m.depthwise(x) + x), "block"),
    "a scaled shortcut and pooling": (
        lambda m, x: x * m.scale + nn.functional.avg_pool2d(x, 3, 1, 1) - m.scale,
        "block",
    ),
    "a pooled shortcut": (
        lambda m, x: x.unflatten(2, (-1, 2)).amax(3)[..., ::2] + m.pool(m.branch(x)),
        "block",
    ),
    "a shortcut in two parts": (
        lambda m, x: torch.cat((x[:, :, :1], m.norm(x)[:, :, 1:]), 2) + m.branch(x),
        "block",
    ),
    "a pre-activated projection": (
        lambda m, x: m.one(m.norm(x).relu()) + m.branch(m.norm(x)).tanh(),
        "block",
    ),
    "two networks": (lambda m, x: m.one(m.branch(x).relu()) + m.branch(m.other(x).relu()), ""),
    "a gate": (lambda m, x: m.one(x) * (x.mean(1, True) + m.branch(x).mean(1, True)), ""),
    "keys beside a query": (lambda m, x: _attended(m, m.one(x), m.other(x)), ""),
    "another part": (lambda m, x: torch.cat((x[:, :2], x.chunk(2, 1)[1] + m.branch(x)[:, 2:]), 1), ""),
    "a part": (
        lambda m, x: torch.cat((x[:, :2] + m.branch(x)[:, 2:], m.pool(x).repeat(1, 1, 2, 2)), 1),
        "part",
    ),
    "a cell": (lambda m, x: torch.cat((x + m.branch(x), m.norm(x) + m.branch(m.one(x))), 1), ""),
    "a rotation": (lambda m, x: x * m.scale + x.roll(1, 1) * m.scale.sin(), ""),
    "an update of low rank": (lambda m, x: m.one(x) + _low_rank(m, x), ""),
}


def _attended(m: Any, q: Tensor, k: Tensor) -> Tensor:
    return m.third((q @ k.mT).softmax(-1) @ k) + q


def _low_rank(m: Any, x: Tensor) -> Tensor:
    return m.up(m.down_(x)) * 2.0


def _adding(name: str) -> tuple[nn.Module, str]:
    forward, kind = SUMS[name]
    module = Adding(forward)
    module.down_, module.up = nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 4, 1, bias=False)
    last = nn.Sequential(nn.Conv2d({"a part": 6, "a cell": 8}.get(name, 4), 4, 1), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(module, last), kind


@pytest.mark.parametrize("name", SUMS)
def test_what_a_residual_join_is(name: str) -> None:
    model, kind = _adding(name)
    assert [each.kind for each in joins(model, (4, 8, 8))] == ([kind] if kind else [])


def test_several_branches_have_no_end_and_patching_there_says_so() -> None:
    model, _ = _adding("parallel branches")
    assert [site.op for site in fxgraft.sites(model, "residual", input_size=(4, 8, 8))] == [
        *("pre", "identity", "post"),
    ]
    with pytest.raises(
        fxgraft.StructureError,
        match=r"No residual join of Sequential has a position 'residual': '0\.add'\.\nThey add several branches",
    ) as caught:
        fxgraft.patch(model, "selfnorm", position="residual", input_size=(4, 8, 8))
    assert len(str(caught.value).splitlines()) == 3
    fxgraft.patch(model, "selfnorm", layers="0.branch", input_size=(4, 8, 8))


def test_a_sum_of_a_layers_parts_within_a_branch_is_none() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Adding(SUMS["parallel convolutions and an identity"][0])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    assert [each.owner for each in joins(Stack(Outer()))] == ["block"]


def test_a_block_that_concatenates_the_rest_itself_is_taken_whole() -> None:
    (found,) = joins(nn.Sequential(Partial(), nn.Conv2d(6, 4, 1)))
    assert edit(found, "post") == After("cat")
    assert edit(found, "residual") == Edge("branch", ("getitem", "getitem_1"))
    assert edit(found, "identity") == Edge("x", ("add",))


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        shortcut, x = x, self.branch(x)
        return torch.cat((x[:, :4] + shortcut, x[:, 4:]), 1)


class Dropping(nn.Module):
    """A branch that is dropped by a module or a function, with a scale in front or behind."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.branch, self.drop, self.how = Branch(), DropPath(0.5), how
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.how == "scaled behind":
            return x + self.scale * drop_path(y, 0.5, self.training)
        if self.how == "function":
            return x + drop_path(self.scale * y, 0.5, self.training)
        if self.how == "torchvision":
            return x + stochastic_depth(y, 0.5, "row", self.training)
        return x + self.scale * self.drop(y)


@pytest.mark.parametrize("how", ["module", "function", "scaled behind", "torchvision"])
def test_a_branch_ends_in_front_of_what_drops_it(how: str) -> None:
    """A dropped branch stays zero: what a unit there makes of it is dropped, in both modes at the same place."""
    model = nn.Sequential(Dropping(how), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(64, 4, 4, 4)
    fxgraft.patch(model, "selfnorm", position="residual", input_size=(4, 4, 4))
    (unit,) = fxgraft.grafts(model)[0].units.values()
    seen = []
    unit.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.train()(x)
    model.eval()(x)
    assert all(bool(each.flatten(1).any(1).all()) for each in seen)  # no row is zero
    torch.testing.assert_close(seen[0], seen[1])


def test_an_adapter_is_no_join() -> None:
    peft = pytest.importorskip("peft")
    model = timm.create_model("test_resnet", num_classes=3)
    names = [each.name for each in joins(model, (3, 64, 64))]
    for targets in (["conv2"], ["layer1.0.conv1", "fc"], ["conv2", "layer2.0.downsample.1"]):
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets, r=2))
        assert [each.name for each in joins(adapted.base_model.model, (3, 64, 64))] == names
    tokens = timm.create_model("test_vit", num_classes=3)
    adapted = peft.get_peft_model(
        copy.deepcopy(tokens), peft.LoraConfig(target_modules=["qkv", "fc1", "fc2"], r=2)
    )
    assert len(joins(adapted.base_model.model, (3, 160, 160))) == len(joins(tokens, (3, 160, 160)))


def test_where_nothing_is_decided_the_sums_are_shown_and_can_be_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = _conv(), _conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    class Closed(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.one(x) if x.sum() > 0 else x

    def model(block: nn.Module) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )

    with pytest.raises(
        fxgraft.StructureError, match=r"aren.t joins as far as can be seen: '1.add'.*\n.*as '1.add'"
    ):
        fxgraft.patch(model(Odd()), "crossnorm", position="post", input_size=(3, 8, 8))
    named = fxgraft.patch(model(Odd()), "crossnorm", layers="1.add", input_size=(3, 8, 8))
    assert list(fxgraft.grafts(named)[0].units) == ["1.add"]


def test_the_summary_says_which_kind_of_block_the_units_are_on() -> None:
    blocks = [_adding(name)[0] for name in ("a position encoding", "a part")]
    model = nn.Sequential(
        blocks[0][0], blocks[1][0], nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    fxgraft.patch(model, "crossnorm", position="post", input_size=(4, 8, 8))
    said = str(fxgraft.summary(model))
    assert "2 units (post; 1 of them on depthwise convolutions with a shortcut" in said
    assert "1 of them on a part of their blocks' channels" in said


def test_one_join_among_other_blocks_leaves_the_others_their_units() -> None:
    layers = [each for _ in range(12) for each in (_conv(), nn.ReLU())]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), *layers, Plus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    fxgraft.patch(model, "selfnorm", input_size=(3, 8, 8))
    assert len(fxgraft.grafts(model)[0].units) == 15
    fxgraft.patch(model, "crossnorm", position="post", input_size=(3, 8, 8))
    assert len(fxgraft.grafts(model)[1].units) == 1
