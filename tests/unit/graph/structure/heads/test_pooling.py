"""Heads: what counts as one, where it is rewritten, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import SiteError, StructureError
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.heads.head import Head, find_head
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.editing import After, Editor, Replace, Span
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.trace import Traced
from fxgraft.patches.diversification.patch import maps

SIZE = (3, 16, 16)


class Body(nn.Module):
    """Ends in whatever function it is given, with a classifier ``fc`` of 4 classes over 6 features."""

    def __init__(self, head: Callable[[Body, Tensor], Tensor], features: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.fc = nn.Linear(features, 4)
        self.aux = nn.Linear(6, 4)
        self.conv_fc = nn.Conv2d(6, 4, 1)
        self.one = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.2)
        self.ending = head

    def forward(self, x: Tensor) -> Tensor:
        return self.ending(self, self.conv(x))


def head_of(head: Callable[[Body, Tensor], Tensor], name: str | None = None, features: int = 6) -> Head:
    return find_head(ModelTrace(Body(head, features), SIZE), name)


AVERAGES = {
    "mean over two": lambda m, x: m.fc(x.mean((2, 3))),
    "mean over two, from the back": lambda m, x: m.fc(x.mean(dim=[-1, -2])),
    "mean with dimensions as arguments": lambda m, x: m.fc(torch.mean(x, (2, 3), keepdim=True).flatten(1)),
    "adaptive module": lambda m, x: m.fc(m.one(x).flatten(1)),
    "adaptive function": lambda m, x: m.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)),
    "average over the whole map": lambda m, x: m.fc(F.avg_pool2d(x, 8).squeeze(-1).squeeze(-1)),
    "channels last": lambda m, x: m.fc(x.permute(0, 2, 3, 1).mean((1, 2))),
    "tokens": lambda m, x: m.fc(x.flatten(2).transpose(1, 2).mean(1)),
    "channels, then positions": lambda m, x: m.fc(x.flatten(2).mean(-1)),
    "dropout as a function": lambda m, x: m.fc(F.dropout(m.one(x).flatten(1), 0.3, m.training)),
    "dropout as a module": lambda m, x: m.fc(m.drop(m.one(x)).flatten(1)),
    "view by the batch": lambda m, x: m.fc((pooled := m.one(x)).view(pooled.shape[0], -1)),
    "1x1 convolution": lambda m, x: m.conv_fc(m.one(x)).flatten(1),
    "scaled logits": lambda m, x: m.fc(m.one(x).flatten(1)) * 2,
    "two classifiers of one average": lambda m, x: (m.fc(y := m.one(x).flatten(1)) + m.aux(m.drop(y))) / 2,
    "two classifiers, stacked": lambda m, x: torch.stack((m.fc(y := x.mean((2, 3))), m.aux(y))).mean(0),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_are_recognised_and_the_rewrite_is_exact(kind):
    torch.manual_seed(0)
    model = Body(AVERAGES[kind]).train()
    x = torch.randn(2, *SIZE)
    torch.manual_seed(1)
    expected = model(x)
    fxgraft.patch(model, "diversification", alpha=1.0, input_size=SIZE)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(fxgraft.unpatch(model).eval()(x), model(x))
    scale = 2 if kind == "scaled logits" else 1
    torch.testing.assert_close(scale * maps(model, x).mean((2, 3)), model(x))


OTHERS = {
    "a maximum": (lambda m, x: m.fc(x.amax((2, 3))), 6, "a maximum over positions"),
    "half of each": (
        lambda m, x: m.fc(0.5 * (x.mean((2, 3)) + x.amax((2, 3)))),
        6,
        "which has 2 inputs",
    ),
    "joined": (
        lambda m, x: m.fc(torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)),
        12,
        "several values joined",
    ),
    "flattened": (lambda m, x: m.fc(x.flatten(1)), 384, r"a whole map of shape \(6, 8, 8\), flattened"),
    "several cells": (
        lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 2).flatten(1)),
        24,
        r"a whole map of shape \(6, 2, 2\)",
    ),
    "a class token": (lambda m, x: m.fc(x.flatten(2).transpose(1, 2)[:, 0]), 6, "a class token"),
    "the average of a class token alone": (
        lambda m, x: m.fc(
            torch.cat((x.new_zeros(x.shape[0], 1, 6), x.flatten(2).transpose(1, 2)), 1)[:, :1].mean(1)
        ),
        6,
        "a class token",
    ),
    "attention": (
        lambda m, x: m.fc((x.flatten(2) * x.flatten(2).softmax(-1)).sum(-1)),
        6,
        "isn.t a plain average over positions",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_poolings_are_refused_with_the_reason(kind):
    head, features, message = OTHERS[kind]
    with pytest.raises(
        StructureError, match=f"{message}[\\s\\S]*A head is one linear layer behind an average"
    ):
        head_of(head, features=features)


def test_a_norm_that_is_written_out_is_run_at_every_position():
    def normed(m: Body, x: Tensor) -> Tensor:
        pooled = m.one(x).flatten(1)
        return m.fc(pooled * torch.rsqrt(pooled.square().mean(1, keepdim=True) + 1e-6))

    torch.manual_seed(0)
    found, model = head_of(normed), Body(normed).train()
    assert found.classifiers == ("fc",)
    assert not found.training.affine
    fxgraft.patch(model, "diversification", alpha=1.0, input_size=SIZE)
    x = model.conv.weight.new_ones(2, *SIZE)
    model.conv = nn.Conv2d(3, 6, 3, 2)  # without a border all positions are alike, and so is their average
    torch.testing.assert_close(model(x), fxgraft.unpatch(model)(x))


def test_gem_and_attention_modules_are_named():
    class GeM(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)

    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), GeM(), nn.Linear(6, 4))
    with pytest.raises(StructureError, match="a generalised mean"):
        find_head(ModelTrace(model, SIZE))
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        global_pool="map",
        img_size=32,
        embed_dim=24,
        depth=1,
        num_heads=2,
        num_classes=3,
    )
    with pytest.raises(StructureError, match="attention pooling"):
        find_head(ModelTrace(vit))


def test_no_classifier():
    with pytest.raises(StructureError, match="No linear classifier was found at the end of Body"):
        head_of(lambda m, x: x.mean((2, 3)))
    with pytest.raises(StructureError, match="No linear classifier"):
        find_head(ModelTrace(timm.create_model("resnet18", num_classes=0, channels=(8, 8, 8, 8))))


class TestSeveral:
    @staticmethod
    def both(m: Body, x: Tensor) -> Tensor:
        pooled = m.one(x).flatten(1)
        return (m.fc(pooled) + m.aux(pooled)) / 2

    @staticmethod
    def apart(m: Body, x: Tensor) -> Tensor:
        return m.fc(m.one(x).flatten(1)) + m.aux(m.one(x.relu()).flatten(1))

    def test_that_read_averages_of_their_own_are_named_in_the_error(self):
        with pytest.raises(
            StructureError, match=r"2 classifiers: 'aux', 'fc'[\s\S]*average of its own[\s\S]*head='aux'"
        ):
            head_of(self.apart)

    @pytest.mark.parametrize("name", ["aux", "fc"])
    @pytest.mark.parametrize("kind", ["both", "apart"])
    def test_one_can_be_chosen(self, name, kind):
        assert head_of(getattr(self, kind), name).classifiers == (name,)

    def test_that_read_one_average_are_one_head(self):
        assert head_of(self.both).classifiers == ("aux", "fc")

    def test_new_ones_are_found_by_their_names(self):
        torch.manual_seed(0)
        model = Body(self.both).train()
        fxgraft.patch(model, "diversification", alpha=1.0, input_size=SIZE)
        model.fc, model.aux = nn.Linear(6, 5), nn.Linear(6, 5)
        x = torch.randn(2, *SIZE)
        got = model(x)
        torch.testing.assert_close(got, fxgraft.unpatch(model)(x))

    def test_each_can_be_patched(self):
        model = Body(self.both).train()
        bare = Body(self.both).train()
        bare.load_state_dict(model.state_dict())
        x = torch.randn(2, *SIZE)
        for name in ("fc", "aux"):
            fxgraft.patch(model, "diversification", name=name, head=name, alpha=1.0, input_size=SIZE)
        torch.testing.assert_close(model(x), bare(x))
        fxgraft.unpatch(model, "fc")
        torch.testing.assert_close(model(x), bare(x))

    def test_an_auxiliary_head_that_gives_no_logits_can_be_chosen(self):
        model = torchvision.models.googlenet(num_classes=3, init_weights=False)
        fxgraft.patch(model, "diversification", head="fc", patch=1, input_size=(3, 64, 64))
        out = model.train()(torch.randn(2, 3, 64, 64))
        assert out.logits.shape == out.aux_logits1.shape == (2, 3)

    def test_logits_put_together_where_the_map_is_out_of_reach_are_refused(self):
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.one(x) + self.two(x)

        model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Pair())
        with pytest.raises(StructureError, match=r"follows the classifier '3.one'[\s\S]*the output of '3'"):
            find_head(ModelTrace(model, SIZE), "3.one")

    def test_a_name_must_be_a_classifier(self):
        with pytest.raises(StructureError, match=r"There is no layer 'fcc'[\s\S]*'fc'"):
            head_of(AVERAGES["mean over two"], "fcc")
        with pytest.raises(StructureError, match="'conv' is a Conv2d, no linear layer"):
            head_of(AVERAGES["mean over two"], "conv")


class TestOwner:
    def test_is_the_smallest_module_with_pooling_and_classifier(self):
        found = find_head(ModelTrace(timm.create_model("regnetx_002"), (3, 64, 64)))
        assert (found.owner, found.classifiers) == ("head", ("head.fc",))
        found = find_head(ModelTrace(timm.create_model("resnet18"), (3, 64, 64)))
        assert (found.owner, found.span) == ("", Span("layer4", "fc"))

    def test_of_a_traced_model_is_the_model(self):
        bare = timm.create_model("regnetx_002", num_classes=4).train()
        model = torch.fx.symbolic_trace(bare)
        fxgraft.patch(model, "diversification", patch=1, alpha=1.0, input_size=(3, 64, 64))
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(x), bare(x))

    def test_class_maps_that_are_there_already_are_used(self):
        model = torchvision.models.squeezenet1_1(num_classes=5)
        found = find_head(ModelTrace(model, (3, 64, 64)))
        assert (found.owner, found.classifiers, found.shape[1:]) == ("classifier", (), (5, 3, 3))

    def test_only_the_head_is_opened(self):
        trace = ModelTrace(timm.create_model("regnetx_002"), (3, 64, 64))
        find_head(trace)
        opened = {path for _, _, around, deep in trace._graphs for path in (*around, *deep)}
        assert all(
            path.startswith("head") or path in ("", "global_pool", "global_pool.pool") for path in opened
        )


class Double(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class TestSpan:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graft_a = Double()
            self.graft_b = Double()

        def forward(self, x: Tensor) -> Tensor:
            first = torch.relu(x)
            second = torch.exp(first)
            third = torch.neg(second)
            return torch.abs(third)

    def edited(self, *edits: tuple) -> tuple[Traced, Callable[..., Tensor]]:
        trace = ModelTrace(self.Chain(), (3, 4, 4))
        traced = trace.fresh_graph("", training=True)
        editor = Editor(traced)
        for edit, unit in edits:
            editor.apply(edit, unit)
        traced.graph.lint()
        return traced, compile_graph(traced.graph, {}, "chain")

    def test_replaces_everything_between(self):
        traced, function = self.edited((Span("relu", "neg"), "graft_a"))
        x = torch.randn(2, 3)
        assert torch.equal(function(self.Chain(), x), torch.abs(2 * torch.relu(x)))
        assert [node.name for node in traced.graph.nodes if node.op == "call_function"] == ["relu", "abs_1"]

    def test_edits_at_its_ends_stack(self):
        x = torch.randn(2, 3)
        for start_first in (True, False):
            edits = [(Span("relu", "neg"), "graft_a"), (After("relu"), "graft_b")]
            _, function = self.edited(*(reversed(edits) if start_first else edits))
            assert torch.equal(function(self.Chain(), x), torch.abs(4 * torch.relu(x)))
        _, function = self.edited((Span("relu", "neg"), "graft_a"), (After("neg"), "graft_b"))
        assert torch.equal(function(self.Chain(), x), torch.abs(4 * torch.relu(x)))

    def test_nothing_can_be_placed_inside(self):
        with pytest.raises(SiteError, match="'exp' lies inside a part of the network that another patch"):
            self.edited((Span("relu", "neg"), "graft_a"), (After("exp"), "graft_b"))
        with pytest.raises(SiteError, match="One patch acts between 'relu' and 'neg'"):
            self.edited((After("exp"), "graft_b"), (Span("relu", "neg"), "graft_a"))
        with pytest.raises(SiteError, match="lies inside a part"):
            self.edited((Span("relu", "neg"), "graft_a"), (Replace("exp"), "graft_b"))

    def test_values_that_others_use_stay(self):
        class Shared(self.Chain):
            def forward(self, x: Tensor) -> Tensor:
                first = torch.relu(x)
                second = torch.exp(first)
                return torch.neg(second) + second

        traced = ModelTrace(Shared(), (3, 4, 4)).fresh_graph("", training=True)
        Editor(traced).apply(Span("relu", "neg"), "graft_a")
        x = torch.randn(2, 3)
        got = compile_graph(traced.graph, {}, "shared")(Shared(), x)
        assert torch.equal(got, 2 * torch.relu(x) + torch.exp(torch.relu(x)))


@pytest.mark.parametrize(
    ("name", "where", "closed"),
    [
        ("resnet18", "layer4", True),
        ("efficientnet_b0", "bn2", True),
        ("densenet121", "features", True),
        ("mobilenetv3_small_050", "blocks", False),
        ("convnext_atto", "stages", False),
        ("swin_tiny_patch4_window7_224", "norm", True),
        ("vit_tiny_patch16_224", None, False),
    ],
)
def test_the_pooled_map_is_the_last_before_the_average(name: str, where: str | None, closed: bool) -> None:
    backbone = Backbone.of(timm.create_model(name, num_classes=4))
    site = backbone.pooled_map()
    assert (site and site.name) == where
    assert site is None or bool(backbone.rest(site).tail) == closed


def test_the_pooled_map_is_a_value_where_no_module_gives_it() -> None:
    site = Backbone.of(Body(lambda m, x: m.fc(x.relu().mean((2, 3)))), SIZE).pooled_map()
    assert (site and (site.name, site.path, site.shape)) == ("relu", "", (2, 6, 8, 8))
    for head in (lambda m, x: m.fc(x.amax((2, 3))), lambda m, x: m.conv_fc(x).mean((2, 3))):
        assert Backbone.of(Body(head), SIZE).pooled_map() is None  # a maximum; maps that hold classes
