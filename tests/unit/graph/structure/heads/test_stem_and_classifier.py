"""Ends: which layers count as stems and classifiers, what may stand around them, what is said where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from fxgraft.errors import StructureError
from fxgraft.graph.structure.heads.stem_and_classifier import find_classifiers, find_stems
from fxgraft.graph.tracing.model_trace import ModelTrace

SIZE = (3, 16, 16)


class Start(nn.Module):
    """Begins with whatever function it is given, and ends in a classifier of its channels."""

    def __init__(self, start: Callable[[Start, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.other = nn.Conv2d(3, 6, 5, 2, 2)
        self.large = nn.Conv2d(3, 6, 3, 1, 1)
        self.shuffled = nn.Conv2d(12, 6, 1)
        self.tokens = nn.Linear(48, 6)
        self.norm = nn.BatchNorm2d(3)
        self.layer_norm = nn.LayerNorm(16)
        self.pad = nn.ReflectionPad2d(1)
        self.std = StdConv2d(3, 6, 3)
        self.scaled = ScaledStdConv2d(3, 6, 3)
        self.inner = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()))
        self.attention = nn.MultiheadAttention(48, 1, batch_first=True)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.same = Conv2dSame(3, 6, 3, 2)
        self.fc = nn.Linear(6, 4)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.start(self, x).flatten(2).mean(2))


def stems_of(start: Callable[[Start, Tensor], Tensor]) -> list[tuple[Any, ...]]:
    found = find_stems(ModelTrace(Start(start), SIZE))
    return [(stem.path, stem.layout.name, stem.shape[1:]) for stem in found]


def patches(x: Tensor) -> Tensor:
    return F.unfold(x, 4, stride=4).transpose(1, 2)


STEMS = {
    "convolution": (lambda m, x: m.conv(x), [("conv", "NCHW", (6, 8, 8))]),
    "with padding of its own": (lambda m, x: m.same(x), [("same", "NCHW", (6, 8, 8))]),
    "inside": (lambda m, x: m.inner(x), [("inner.1.0", "NCHW", (6, 14, 14))]),
    "padded": (lambda m, x: m.conv(F.pad(m.pad(x), (1, 1, 1, 1))), [("conv", "NCHW", (6, 10, 10))]),
    "normalised": (lambda m, x: m.conv((x - m.mean) / 0.25), [("conv", "NCHW", (6, 8, 8))]),
    "resized": (lambda m, x: m.conv(F.interpolate(x, scale_factor=2.0)), [("conv", "NCHW", (6, 16, 16))]),
    "pooled": (lambda m, x: m.conv(F.avg_pool2d(x, 2)), [("conv", "NCHW", (6, 4, 4))]),
    "space to depth": (
        lambda m, x: m.shuffled(F.pixel_unshuffle(x, 2)),
        [("shuffled", "NCHW", (6, 8, 8))],
    ),
    "tokens": (lambda m, x: m.tokens(patches(x)).mT, [("tokens", "NLC", (16, 6))]),
    "channels last": (
        lambda m, x: m.tokens(patches(x).unflatten(1, (4, 4))).flatten(1, 2).mT,
        [("tokens", "NHWC", (4, 4, 6))],
    ),
    "parallel": (
        lambda m, x: m.conv(x) + m.other(x),
        [("conv", "NCHW", (6, 8, 8)), ("other", "NCHW", (6, 8, 8))],
    ),
    "parallel, of two sizes": (
        lambda m, x: m.conv(x).mean((2, 3), keepdim=True) + m.large(x),
        [("conv", "NCHW", (6, 8, 8)), ("large", "NCHW", (6, 16, 16))],
    ),
    "standardised, with a gain": (lambda m, x: m.scaled(x), [("scaled", "NCHW", (6, 16, 16))]),
    "sizes alone go around": (
        lambda m, x: m.conv(x) + x.new_zeros(1) + torch.ones_like(x)[:, :1, :8, :8] * (x.shape[2] // 16),
        [("conv", "NCHW", (6, 8, 8))],
    ),
}


@pytest.mark.parametrize("name", STEMS)
def test_stems(name: str) -> None:
    start, expected = STEMS[name]
    assert stems_of(start) == expected


NO_STEM = {
    "norm first": (lambda m, x: m.conv(m.norm(x)), r"first meets 'norm' \(BatchNorm2d\)"),
    "another norm": (lambda m, x: m.conv(m.layer_norm(x)), r"first meets 'layer_norm' \(LayerNorm\)"),
    "attention first": (
        lambda m, x: m.tokens(m.attention(patches(x), patches(x), patches(x))[0]).mT,
        r"first meets 'attention' \(MultiheadAttention\)",
    ),
    "a parameter first": (
        lambda m, x: m.conv(x * m.scale),
        r"first meets mul\(\) with the parameter 'scale'",
    ),
    "weights as a function's": (
        lambda m, x: F.conv2d(x, m.conv.weight),
        r"first meets conv2d\(\) with the parameter 'conv.weight'",
    ),
    "around": (lambda m, x: m.large(x) + x.mean(1, keepdim=True), r"add\(\) gets the image past all first"),
    "standardised": (lambda m, x: m.std(x), r"'std' \(StdConv2d\) standardises or builds its weight again"),
    "twice": (lambda m, x: m.conv(x) + m.conv(x.flip(3)), r"'conv' \(Conv2d\) is called 2 times"),
    "pieces": (
        lambda m, x: m.tokens(patches(x).flatten(0, 1)).unflatten(0, (-1, 16)).mT,
        r"'tokens' \(Linear\) sees pieces of the image as samples",
    ),
}


@pytest.mark.parametrize("name", NO_STEM)
def test_no_stem(name: str) -> None:
    start, match = NO_STEM[name]
    with pytest.raises(StructureError, match=match):
        stems_of(start)


def test_parametrized_weights_are_refused() -> None:
    model = Start(lambda m, x: m.conv(x))
    nn.utils.parametrizations.weight_norm(model.conv)
    with pytest.raises(StructureError, match="makes its weight from other parameters"):
        find_stems(ModelTrace(model, SIZE))


def test_the_way_to_the_stem_is_a_function() -> None:
    model = Start(lambda m, x: m.conv(F.pad(m.pad((x - m.mean) / 0.25), (1, 1, 1, 1))))
    (stem,) = find_stems(ModelTrace(model, SIZE))
    seen: list[Tensor] = []
    model.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 3, 20, 12)
    model(x)
    assert stem.before is not None
    assert torch.equal(stem.before(model, x), seen[0])
    (plain,) = find_stems(ModelTrace(Start(lambda m, x: m.conv(x)), SIZE))
    assert plain.before is None


class End(nn.Module):
    """Ends in whatever function it is given."""

    def __init__(self, end: Callable[[End, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.fc, self.aux = nn.Linear(6, 4), nn.Linear(6, 4)
        self.conv_fc = nn.Conv2d(6, 4, 1)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Sequential(nn.Linear(6, 4), nn.Identity()))
        self.drop = nn.Dropout(0.1)
        self.mix = nn.Parameter(torch.zeros(2))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self, self.conv(x))


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


CLASSIFIERS = {
    "linear": (lambda m, x: m.fc(mean(x)), ("fc",)),
    "convolution": (lambda m, x: m.conv_fc(x.mean((2, 3), keepdim=True)).flatten(1), ("conv_fc",)),
    "class maps": (lambda m, x: m.conv_fc(x).mean((2, 3)), ("conv_fc",)),
    "no pooling needed": (lambda m, x: m.fc(x.amax((2, 3))), ("fc",)),
    "inside": (lambda m, x: m.inner(mean(x)), ("inner.2.0",)),
    "dropped and scaled": (lambda m, x: m.drop(m.fc(mean(x))) * 2.0, ("fc",)),
    "averaged": (lambda m, x: (m.fc(mean(x)) + m.aux(x.amax((2, 3)))) / 2, ("aux", "fc")),
    "stacked": (lambda m, x: torch.stack([m.fc(mean(x)), m.aux(mean(x))]).mean(0), ("aux", "fc")),
    "weighed by parameters": (
        lambda m, x: m.fc(mean(x)) * m.mix.softmax(0)[0] + m.aux(mean(x)) * m.mix.softmax(0)[1],
        ("aux", "fc"),
    ),
    "tokens": (lambda m, x: m.fc(x.flatten(2).transpose(1, 2)).mean(1), ("fc",)),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name: str) -> None:
    end, expected = CLASSIFIERS[name]
    assert find_classifiers(ModelTrace(End(end), SIZE)) == expected


def test_classifiers_behind_an_entry_of_the_output() -> None:
    two = End(lambda m, x: {"logits": m.fc(mean(x)), "aux": m.aux(mean(x))})
    assert find_classifiers(ModelTrace(two, SIZE)) == ("fc",)
    assert find_classifiers(ModelTrace(two, SIZE), "aux") == ("aux",)
    one = End(lambda m, x: {"classes": m.fc(mean(x)), "hidden": None})
    assert find_classifiers(ModelTrace(one, SIZE)) == ("fc",)


NO_CLASSIFIER = {
    "an activation after it": (lambda m, x: m.fc(mean(x)).relu(), r"relu\(\) has a part in them"),
    "features": (lambda m, x: mean(x), r"'conv' \(Conv2d\) has a part in them"),
    "a product": (lambda m, x: m.fc(mean(x)) * m.aux(mean(x)).sigmoid(), r"sigmoid\(\) has a part in them"),
    "several": (lambda m, x: (m.fc(mean(x)), m.aux(mean(x))), "returns several values"),
    "a dictionary": (lambda m, x: {"a": m.fc(mean(x)), "b": x}, "returns several values"),
    "maps": (lambda m, x: m.conv_fc(x), r"a value of shape \(2, 4, 8, 8\)"),
    "another in training": (
        lambda m, x: m.fc(mean(x)) if m.training else m.aux(mean(x)),
        r"other classifiers in training \(fc\) than in evaluation \(aux\)",
    ),
}


@pytest.mark.parametrize("name", NO_CLASSIFIER)
def test_no_classifier(name: str) -> None:
    end, match = NO_CLASSIFIER[name]
    with pytest.raises(StructureError, match=match):
        find_classifiers(ModelTrace(End(end), SIZE))


def test_a_model_that_is_a_graph() -> None:
    model = timm.create_model("resnet18", num_classes=4, channels=(8, 12, 16, 20)).eval()
    trace = ModelTrace(torch.fx.symbolic_trace(model), (3, 64, 64))
    assert [stem.path for stem in find_stems(trace)] == ["conv1"]
    assert find_classifiers(trace) == ("fc",)


@pytest.mark.parametrize("made", [spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_that_are_made_by_hooks_are_refused(made: Callable[[nn.Module], nn.Module]) -> None:
    model = End(lambda m, x: m.fc(x.mean((2, 3))))
    made(model.fc)
    with pytest.raises(
        StructureError, match=r"'fc' \(.*Linear\) of End makes its weight from other parameters"
    ):
        find_classifiers(ModelTrace(model, SIZE))
