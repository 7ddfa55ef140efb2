"""What a network ends in: linear tails, and the logits in a structured output."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import StructureError, TraceError
from fxgraft.graph.structure.heads.outputs import logits_node, with_logits
from fxgraft.graph.structure.rest_of_network import tail_layer
from fxgraft.graph.tracing.model_trace import ModelTrace
from models.toys import LABELS, assert_same, evaluate, images, net, rest, state_of_everything, value_at


def built(name: str, **kwargs: Any) -> nn.Module:
    library, _, model = name.partition("/")
    if library == "torchvision":
        return getattr(torchvision.models, model)(num_classes=4, **kwargs)
    return timm.create_model(model, num_classes=4, **kwargs)


@pytest.mark.parametrize(
    ("name", "layer", "linear"),
    [
        ("timm/test_resnet", "layer4", "fc"),
        ("timm/test_resnet", -1, "fc"),
        ("timm/resnet10t", "layer4.0", "fc"),
        ("timm/regnety_002", "s4", "head.fc"),
        ("torchvision/resnet18", "layer4", "fc"),
        ("torchvision/mobilenet_v3_small", "features", None),  # two linear layers with an activation between
        ("torchvision/densenet121", "features", None),  # an activation before the pooling
        ("timm/test_resnet", "layer3", None),  # a stage between
        ("timm/test_convnext", "stages.3", None),  # a norm between pooling and classifier
        ("timm/test_vit", "blocks.5", None),  # tokens
        ("timm/densenet121", "features.denseblock4", None),
        ("timm/dpn48b", "features.conv5_1", None),  # a convolution as classifier
    ],
)
def test_linear_tails(name: str, layer: Any, linear: str | None) -> None:
    model = built(name)
    _, after = rest(model, layer, (3, 64, 64) if name != "timm/test_vit" else (3, 160, 160))
    assert (after.tail.linear if after.tail else None) == linear
    if after.tail is not None:
        layer_now = tail_layer(model, after.tail)
        assert layer_now is model.get_submodule(str(linear))


class Tail(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.fc, self.pool = nn.Conv2d(3, 6, 1), nn.Linear(6, 4), nn.AdaptiveAvgPool2d(1)
        self.max, self.two = nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(2)
        self.drop, self.wide = nn.Dropout(0.3), nn.Linear(24, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        match self.kind:
            case "mean":
                return self.fc(x.mean((2, 3)))
            case "mean of negative dims":
                return self.fc(x.mean(dim=[-1, -2]))
            case "torch.mean":
                return self.fc(torch.mean(x, (2, 3)))
            case "functional":
                return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, (1, 1)), 1))
            case "dropout":
                return self.fc(nn.functional.dropout(self.drop(self.pool(x)).flatten(1), 0.2, self.training))
            case "max":
                return self.fc(self.max(x).flatten(1))
            case "two by two":
                return self.wide(self.two(x).flatten(1))
            case "relu":
                return self.fc(self.pool(x.relu()).flatten(1))
            case "scaled":
                return self.fc(self.pool(x).flatten(1)) * 2
            case "used twice":
                return self.fc(self.pool(x).flatten(1)) + x.sum((1, 2, 3)).unsqueeze(1)
            case "mean of one dim":
                return self.fc(x.mean(3).mean(2))
            case "mean of channels":
                return self.wide(x.mean(1).flatten(1)[:, :24])
            case "no pooling":
                return self.wide(x.flatten(1)[:, :24])
        raise LookupError


@pytest.mark.parametrize("kind", ["mean", "mean of negative dims", "torch.mean", "functional", "dropout"])
def test_tails_in_other_words_are_recognised(kind: str) -> None:
    _, after = rest(Tail(kind), "conv", (3, 16, 16))
    assert after.tail is not None
    assert after.tail.linear == "fc"


@pytest.mark.parametrize(
    "kind",
    [
        "max",
        "two by two",
        "relu",
        "scaled",
        "used twice",
        "mean of one dim",
        "mean of channels",
        "no pooling",
    ],
)
def test_tails_with_anything_between_are_not(kind: str) -> None:
    model = Tail(kind).eval()
    site, after = rest(model, "conv", (3, 16, 16))
    assert after.tail is None
    x = images(size=16)
    with torch.no_grad():
        z, out, context = value_at(model, site, after.captured, x)
        assert torch.equal(evaluate(after, model, z, context), out)


def test_entries_that_a_constructor_does_not_take_are_kept() -> None:
    out = Filled(torch.zeros(2, 4))
    out.note = "kept"
    other = with_logits(out, torch.ones(2, 4))
    assert type(other) is Filled
    assert other.note == "kept"
    assert torch.equal(other.logits, torch.ones(2, 4))
    assert not out.logits.any()


def test_a_tail_whose_layer_was_converted_is_no_plain_layer_any_more() -> None:
    model = net()
    _, after = rest(model, "stage2", (3, 16, 16))
    assert after.tail is not None
    model.fc = nn.Sequential(nn.Linear(16, 4))
    assert tail_layer(model, after.tail) is None


class Named(NamedTuple):
    out: Tensor
    aux: Tensor


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor


@dataclasses.dataclass
class Filled:
    """An output with an entry that its constructor does not take."""

    logits: Tensor
    note: str = dataclasses.field(init=False, default="")


class Returns(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.conv, self.fc, self.aux = nn.Conv2d(3, 6, 1), nn.Linear(6, 4), nn.Linear(6, 4)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).mean((2, 3))
        return self.wrap(self.fc(x), self.aux(x))


STRUCTURED: dict[str, tuple[Any, list[Any]]] = {
    "dict": (lambda a, b: {"aux": b, "out": a}, [None, "out"]),
    "dict of logits": (lambda a, b: {"logits": a, "x": b}, [None, "logits"]),
    "dataclass": (lambda a, b: Output(logits=a, hidden=b), [None, "logits"]),
    "dataclass by position": (lambda a, b: Output(a, b), [None, "logits"]),
    "named tuple": (lambda a, b: Named(a, b), [None, "out", 0]),
    "tuple": (lambda a, b: (b, a), [1]),
    "list": (lambda a, b: [a, b], [0]),
    "tensor": (lambda a, b: a, [None]),
    "nothing": (lambda a, b: None, []),
}


@pytest.mark.parametrize(("kind", "output"), [(k, o) for k, (_, all_) in STRUCTURED.items() for o in all_])
def test_the_logits_of_structured_outputs(kind: str, output: Any) -> None:
    model = Returns(STRUCTURED[kind][0])
    trace = ModelTrace(model, (3, 8, 8))
    node = logits_node(trace.values("", trace.graph("", training=False)), output, "Returns")
    assert (node.op, node.target) == ("call_module", "fc")


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        ("dict", "logit", r"Returns returns several values, and 'logit' is not one(?s:.*)'aux', 'out'"),
        ("dict", 0, r"0 is not one of them"),
        ("dataclass", "out", r"It has: 'logits', 'hidden'"),
        (
            "tuple",
            None,
            r"Returns returns several values, and which of them holds the logits is not clear(?s:.*)It has: 0, 1",
        ),
        ("tuple", 2, r"2 is not one of them"),
        ("list", "out", r"It has: 0, 1(?s:.*)output="),
        ("nothing", None, r"Returns returns nothing that could be logits"),
        ("tensor", "out", r"returns a single value, which has no entry 'out'"),
    ],
)
def test_errors_of_structured_outputs(kind: str, output: Any, message: str) -> None:
    model = Returns(STRUCTURED[kind][0])
    before = state_of_everything(model)
    trace = ModelTrace(model, (3, 8, 8))
    with pytest.raises(StructureError, match=message):
        logits_node(trace.values("", trace.graph("", training=False)), output, "Returns")
    with pytest.raises(StructureError, match=message):
        fxgraft.patch(model, "rsc", layer="conv", output=output, input_size=(3, 8, 8))
    assert_same(before, state_of_everything(model))


@pytest.mark.parametrize(("kind", "output"), [(k, o) for k, (_, all_) in STRUCTURED.items() for o in all_])
def test_structured_outputs_train(kind: str, output: Any) -> None:
    model = Returns(STRUCTURED[kind][0])
    fxgraft.patch(model, "rsc", layer="conv", output=output, input_size=(3, 8, 8))
    out = model(images(), target=LABELS)
    fxgraft.loss(model, out, LABELS).backward()
    assert model.fc.weight.grad is not None


@dataclasses.dataclass
class Halved:
    """An output whose constructor computes."""

    logits: Tensor

    def __post_init__(self) -> None:
        self.logits = self.logits / 2


def test_a_constructor_that_computes_is_not_repeated() -> None:
    model = Returns(lambda a, b: Halved(a))
    before = state_of_everything(model)
    with pytest.raises(TraceError, match=r"how a Halved is made(?s:.*)The graph would do it twice"):
        fxgraft.patch(model, "rsc", layer="conv", input_size=(3, 8, 8))
    assert_same(before, state_of_everything(model))
    out = Halved(torch.ones(2, 4))
    assert torch.equal(with_logits(out, torch.full((2, 4), 3.0)).logits, torch.full((2, 4), 3.0))


def test_dictionaries_of_other_classes() -> None:
    """torch.fx makes a plain dictionary of them; where no graph makes the output, it keeps its class."""
    model = Returns(lambda a, b: defaultdict(list, logits=a))
    before = state_of_everything(model)
    with pytest.raises(TraceError, match=r"plain dictionary of a defaultdict.*dict\(\.\.\.\)"):
        fxgraft.patch(model, "rsc", layer="conv", input_size=(3, 8, 8))
    assert_same(before, state_of_everything(model))
    out = defaultdict(list, logits=torch.ones(2, 4), aux=torch.ones(1))
    made = with_logits(out, torch.zeros(2, 4))
    assert (type(made), made["unknown"], list(out)) == (defaultdict, [], ["logits", "aux"])
    assert torch.equal(made["logits"], torch.zeros(2, 4))
    assert torch.equal(out["logits"], torch.ones(2, 4))


@pytest.mark.parametrize("output", ["typo", 5])
def test_an_entry_that_is_not_there_is_never_another(output: Any) -> None:
    model = Returns(lambda a, b: {"logits": a, "aux": b} if output == "typo" else (a, b))
    fxgraft.patch(model, "crossnorm", consistency=True, layers="conv", output=output, input_size=(3, 8, 8))
    with pytest.raises(StructureError, match=rf"{output!r} is not one of them"):
        fxgraft.loss(model, model(images(), target=LABELS), LABELS)
