"""Shadows: what is looked at in place of a model, and what says that looking again would show the same."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxgraft
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.shadow import Shadow
from models.toys import Net, assert_same, images, net, state_of_everything

FLAG = False


class Helper:
    """No module, and holds one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Reaching(nn.Module):
    """Holds on to its own layers in all the ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.listed = [self.layer]
        self.method = self.run
        self.partial = functools.partial(Reaching.run, self)
        self.closure = (lambda layer: lambda x: layer(x))(self.layer)
        self.default = lambda x, layer=self.layer: layer(x)
        self.helper = Helper(self.layer)
        self.weak = weakref.ref(self.layer)
        self.named = {"a": (self.layer, 1)}
        self.constant = object()

    def run(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :3]
        for way in (self.listed[0], self.method, self.partial, self.closure, self.default):
            x = way(x)
        held = self.weak()
        assert held is not None
        return self.named["a"][0](held(self.helper.layer(x)))


def test_every_way_to_a_layer_leads_to_its_look_alike() -> None:
    model = Reaching()
    shadow = Shadow(model).model
    assert type(shadow) is Reaching
    assert shadow.layer is not model.layer
    assert shadow.layer.weight is model.layer.weight
    assert shadow.constant is model.constant
    called: list[nn.Module] = []
    for each in (model.layer, shadow.layer):
        each.register_forward_hook(lambda module, *_: called.append(module))
    x = images(2)
    assert torch.equal(shadow(x), model(x))
    assert called == [shadow.layer] * 8 + [model.layer] * 8


def test_containers_are_the_shadows_own() -> None:
    model = nn.Linear(3, 3)
    model.seen = {"a": [1]}
    shadow = Shadow(model).model
    shadow.seen["a"].append(2)
    shadow.seen["b"] = 3
    assert model.seen == {"a": [1]}


def test_what_a_forward_notes_is_noted_on_the_shadow() -> None:
    class Notes(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            notes.append(self)
            return super().forward(x)

    notes: list[nn.Module] = []
    model = Notes()
    before = state_of_everything(model)
    assert ModelTrace(model, (3, 8, 8)).observation.output("").shape == (2, 4)
    assert_same(before, state_of_everything(model))
    assert notes
    assert all(each is not model for each in notes)


def test_two_looks_at_the_same() -> None:
    model = net()
    first = Shadow(model)
    model(images())  # in training: statistics move
    assert not first.same_as(Shadow(model))
    first = Shadow(model)
    model.eval()
    model(images())
    assert first.same_as(Shadow(model))
    ModelTrace(first, (3, 8, 8)).graph("", training=True)
    assert first.same_as(Shadow(model))
    assert not first.same_as(Shadow(net()))


def replace_a_layer(model: Net) -> None:
    model.stage1[0] = net().stage1[0]


def replace_one_without_tensors(model: Net) -> None:
    model.pool = nn.AdaptiveAvgPool2d(1)


def exchange_parameters(model: Net) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach())


def write_to_a_parameter(model: Net) -> None:
    with torch.no_grad():
        model.fc.weight.mul_(2)


def set_a_flag(model: Net) -> None:
    model.drop.p = 0.5


def add_to_a_list(model: Net) -> None:
    model.listed.append(1)  # type: ignore[operator,union-attr]


def set_an_entry_of_an_object(model: Net) -> None:
    model.helper.layer = model.stem  # type: ignore[union-attr]


def freeze(model: Net) -> None:
    model.fc.weight.requires_grad_(False)


def hook(model: Net) -> None:
    model.fc.register_forward_hook(lambda *_: None)


def change_the_precision(model: Net) -> None:
    model.double()


def change_the_class(model: Net) -> None:
    model.__class__ = type("Other", (Net,), {})


def set_a_global(model: Net) -> None:
    sys.modules[__name__].FLAG = True


def replace_the_forward(model: Net) -> None:
    model.fc.forward = lambda x: x  # type: ignore[method-assign]


CHANGES = (
    replace_a_layer,
    replace_one_without_tensors,
    exchange_parameters,
    write_to_a_parameter,
    set_a_flag,
    add_to_a_list,
    set_an_entry_of_an_object,
    freeze,
    hook,
    change_the_precision,
    change_the_class,
    set_a_global,
    replace_the_forward,
)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change: Callable[[Net], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FLAG", False)

    class Here(Net):
        """Of this file, whose globals its forward may read."""

    model = Here()
    model.listed = []  # type: ignore[assignment]
    model.helper = Helper(model.fc)  # type: ignore[assignment]
    first = Shadow(model)
    assert first.same_as(Shadow(model))
    change(model)
    assert not first.same_as(Shadow(model))


class Holding(nn.Module):
    """Holds things that are no modules, and that lead to no module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.method, self.weak = self.one.forward, weakref.ref(self.one)
        self.config = types.SimpleNamespace(alpha=1.0, inner=types.SimpleNamespace(beta=[1]))
        self.slotted = Slotted()
        self.array = np.zeros(2)
        self.number = 0.0


class Slotted:
    __slots__ = ("alpha",)


HELD: dict[str, Callable[[Holding], object]] = {
    "another method": lambda m: setattr(m, "method", m.two.forward),
    "another function of the same layer": lambda m: setattr(m, "method", m.one.extra_repr),
    "a weak reference": lambda m: setattr(m, "weak", weakref.ref(m.two)),
    "a namespace": lambda m: setattr(m.config, "alpha", 2.0),
    "a namespace in one": lambda m: m.config.inner.beta.append(2),
    "a slot": lambda m: setattr(m.slotted, "alpha", 2.0),
    "an array": lambda m: m.array.fill(1),
    "a sign": lambda m: setattr(m, "number", -0.0),
}


@pytest.mark.parametrize("change", HELD)
def test_what_is_held_beside_modules_shows(change: str) -> None:
    model = Holding()
    before = Shadow(model)
    HELD[change](model)
    assert not Shadow(model).same_as(before)


class Reading(nn.Module):
    """Reads the mode of a layer that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.fc = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.relu(x) + functional.dropout(x, self.drop.p, self.drop.training)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True], ids=["patched in evaluation", "patched in training"])
@pytest.mark.parametrize("method", ["selfnorm", "taps"])
def test_the_mode_of_a_layer_is_that_of_the_pass(method: str, training: bool) -> None:
    options = {"layers": ["conv"]} if method == "taps" else {}
    model = Reading()
    x = torch.randn(2, 3, 8, 8)
    wanted = model.eval()(x)
    fxgraft.patch(model.train(training), method, input_size=(3, 8, 8), **options)
    assert torch.equal(model.eval()(x), wanted)
    assert not torch.equal(model.train()(x), model(x))
