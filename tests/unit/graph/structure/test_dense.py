"""Densely connected layers: what replaces a layer's input is what is concatenated onwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import fxgraft
from fxgraft import StructureError
from fxgraft.graph.structure.dense import dense_layers
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.patches.crossnorm.patch import CrossNormUnit
from fxgraft.patches.crossnorm.tensors import crossnorm
from fxgraft.patches.selfnorm import SelfNormUnit

SMALL: dict[str, Any] = {"input_size": (3, 64, 64)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("densenet121", num_classes=3, growth_rate=4, block_config=(3, 2)),
    "torchvision": lambda: torchvision.models.DenseNet(4, (3, 2), num_classes=3),
}


def block(layers: nn.Module, x: Tensor, unit: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The authors' dense block: each layer changes all that came before, and what it concatenates is the changed."""
    for index, layer in enumerate(layers.values() if hasattr(layers, "values") else layers.children()):
        x = unit(index, x)
        h = layer.norm1(x)
        h = layer.norm2(layer.conv1(layer.relu1(h) if hasattr(layer, "relu1") else h))
        x = torch.cat((x, layer.conv2(layer.relu2(h) if hasattr(layer, "relu2") else h)), 1)
    return x


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_crossnorm_replaces_what_all_later_layers_see(make: Callable[[], nn.Module]) -> None:
    bare = make().double().train()
    model = fxgraft.patch(
        copy.deepcopy(bare), "crossnorm", position="conv1_pre", p=1.0, active=None, **SMALL
    ).train()
    orders = [torch.randperm(4) for _ in range(5)]
    for unit, order in zip(fxgraft.grafts(model)[0].units_of(CrossNormUnit), orders, strict=True):
        unit._restyled = lambda x, order=order: crossnorm(x, order)  # type: ignore[assignment]
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    first = model.features.denseblock1
    first.register_forward_pre_hook(lambda _, args: seen.update(given=args[0]))
    first.register_forward_hook(lambda _, args, out: seen.update(out=out))
    out = model(x)
    wanted = block(bare.features.denseblock1, seen["given"], lambda i, z: crossnorm(z, orders[i]))
    torch.testing.assert_close(seen["out"], wanted)
    grads = [
        torch.autograd.grad(each.square().sum(), seen["given"], retain_graph=True)[0]
        for each in (seen["out"], wanted)
    ]
    torch.testing.assert_close(*grads)
    out.sum().backward()
    assert torch.equal(model.eval()(x), (bare.load_state_dict(model.state_dict()), bare.eval()(x))[1])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_selfnorm_replaces_what_all_later_layers_see(make: Callable[[], nn.Module], training: bool) -> None:
    bare = make().double().train(training)
    model = fxgraft.patch(copy.deepcopy(bare), "selfnorm", position="conv1_pre", init="authors", **SMALL)
    model.train(training)
    units = fxgraft.grafts(model)[0].units_of(SelfNormUnit)
    plain = copy.deepcopy(units)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    model.features.denseblock1.register_forward_pre_hook(lambda _, args: seen.update(given=args[0]))
    model.features.denseblock1.register_forward_hook(lambda _, args, out: seen.update(out=out))
    model(x)
    for unit, original in zip(plain, units, strict=True):
        unit.bind(layout=original.layout, context=original.context)
    wanted = block(bare.features.denseblock1, seen["given"], lambda i, z: plain[i](z))
    torch.testing.assert_close(seen["out"], wanted)


def test_both_together_in_either_order_and_taken_off() -> None:
    bare = MODELS["timm"]()
    x = torch.randn(4, 3, 64, 64)
    outs = []
    for methods in (("crossnorm", "selfnorm"), ("selfnorm", "crossnorm")):
        model = copy.deepcopy(bare).train()
        for method in methods:
            options = {"p": 1.0, "active": None} if method == "crossnorm" else {}
            fxgraft.patch(model, method, position="conv1_pre", **options, **SMALL)
        torch.manual_seed(0)
        outs.append(model(x))
        assert list(fxgraft.unpatch(model).state_dict()) == list(bare.state_dict())
    torch.testing.assert_close(*outs)


@pytest.mark.sweep
def test_evaluation_compiles_exports_and_looks_ahead() -> None:
    torch._dynamo.reset()
    model = fxgraft.patch(MODELS["timm"](), "selfnorm", position="conv1_pre", init="authors", **SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected)
        with pytest.raises(fxgraft.SiteError, match="Call the model, not its parts"):
            model.features.denseblock1(torch.randn(2, 8, 16, 16))
    with pytest.raises(fxgraft.FxgraftError, match=r"cannot start inside a densely|cannot trace"):
        fxgraft.patch(model, "rsc", layer="features.denseblock1.denselayer2", **SMALL)
    fxgraft.patch(model, "rsc", layer="features.denseblock1", **SMALL)
    fxgraft.loss(model, model.train()(x, target=torch.tensor([0, 1])), torch.tensor([0, 1])).backward()


class Around(nn.Module):
    """Calls its dense layer twice, so that no one value is what the layer joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer = Layer()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.cat((x, self.layer(x, x[:, :4]) + self.layer(x, x[:, 4:])), 1).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 3, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv2(self.conv1(torch.cat((x, y), 1)).relu())


def test_where_the_parts_cannot_be_followed_it_says_so() -> None:
    with pytest.raises(
        StructureError, match=r"it is called 2 times.*\n.*before the first norm.*\n.*conv1_post"
    ):
        fxgraft.patch(Around(), "crossnorm", position="conv1_pre", input_size=(3, 16, 16))
    fxgraft.patch(Around(), "crossnorm", position="conv1_post", input_size=(3, 16, 16))


class Ends(nn.Module):
    """A layer that concatenates itself: norm, ReLU and one convolution, or two, in its forward or in a part."""

    def __init__(self, inner: int, convs: int = 1, nested: bool = False, first: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(convs):
            layers += [nn.BatchNorm2d(inner if number == 0 else 4), nn.ReLU()]
            layers += [nn.Conv2d(inner if number == 0 else 4, 4, 3, padding=1)]
        self.branch = nn.Sequential(*layers) if nested else nn.ModuleList(layers)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if isinstance(self.branch, nn.Sequential):
            out = self.branch(out)
        else:
            for layer in self.branch:
                out = layer(out)
        return torch.cat((x, out) if self.first else (out, x), dim=1)


class Passes(nn.Module):
    """A module of the user's own that hands on what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Guarded(Ends):
    """A layer with such a module where its input comes in."""

    def __init__(self, inner: int) -> None:
        super().__init__(inner)
        self.guard = Passes()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.guard(x))


class Starts(nn.Module):
    """A layer of one convolution whose inputs the layers behind it join with what it gives."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, 4, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(torch.cat(features, 1)).relu()


class Joined(nn.Module):
    """A block of such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Starts(6), Starts(10)])

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class Aggregated(nn.Module):
    """Joins values of different depth and runs a convolution on them, whose output nothing joins with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.root = nn.Conv2d(6, 6, 3, padding=1), Root()

    def forward(self, x: Tensor) -> Tensor:
        return self.root(x, self.first(x))


class Ghost(nn.Module):
    """Joins what a convolution made with what another one made of that; the input is not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cheap = nn.Conv2d(6, 7, 1), nn.Conv2d(7, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat((x, self.cheap(x)), 1)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 14, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(torch.cat((x, y), 1))


LAYERS: dict[str, tuple[list[nn.Module], int, int]] = {
    "one convolution": ([Ends(6), Ends(10)], 2, 0),
    "two convolutions": ([Ends(6, 2), Ends(10, 2)], 2, 2),
    "in a part": ([Ends(6, nested=True), Ends(10, 2, nested=True)], 2, 1),
    "new channels first": ([Ends(6, first=False), Ends(10, first=False)], 2, 0),
    "behind a module that does nothing": ([Guarded(6), Guarded(10)], 2, 0),
    "joined by the block": ([Joined()], 2, 0),
    "a convolution of its input": ([Ghost()], 0, 0),
    "aggregation": ([Aggregated()], 0, 0),
}


@pytest.mark.parametrize(("layers", "count", "seconds"), LAYERS.values(), ids=LAYERS)
def test_layers_of_every_form(layers: list[nn.Module], count: int, seconds: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    trace = ModelTrace(copy.deepcopy(model), (3, 8, 8))
    for position, number in (("conv1_pre", count), ("conv1_post", count), ("conv2_post", seconds)):
        assert len(dense_layers(trace, position)) == number, position
    if not count:
        return
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    patched = fxgraft.patch(copy.deepcopy(model), "selfnorm", init="authors", input_size=(3, 8, 8))
    assert len(fxgraft.grafts(patched)[0].units_of(SelfNormUnit)) == count
    first = fxgraft.patch(model, "selfnorm", init="authors", position="conv1_post", input_size=(3, 8, 8))
    assert len(fxgraft.grafts(first)[0].units) == count
    for each in (patched, first):
        each.train()(x).sum().backward()


def test_a_second_convolution_that_is_not_there_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Ends(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = r"no dense layer of two convolutions.*\nFound: .*1 dense layers"
    with pytest.raises(
        StructureError, match=found + r".*\nPass position= one of 'conv1_pre', 'conv1_post', 'conv'"
    ):
        fxgraft.patch(model, "crossnorm", position="conv2_post", input_size=(3, 8, 8))


def test_dense_blocks_whose_convolutions_are_nested() -> None:
    small: dict[str, Any] = {
        "growth_rates": (8, 8),
        "num_blocks_list": (2, 1),
        "block_type": ("Block", "BlockESE"),
    }
    model = timm.create_model(
        "rdnet_tiny", num_classes=3, num_init_features=8, is_downsample_block=(None, True), **small
    )
    trace = ModelTrace(model, (3, 64, 64))
    parts = [f"dense_stages.{stage}.dense_block{i}" for stage, i in (("0.0", 0), ("0.0", 1), ("1.2", 0))]
    assert [site.name for site in dense_layers(trace, "conv1_pre")] == [f"{part}.cat" for part in parts]
    behind = dense_layers(trace, "conv2_post")
    assert [(site.name, site.block) for site in behind] == [
        (f"{part}.layers.layers.2", part) for part in parts
    ]
