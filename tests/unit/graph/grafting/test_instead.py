"""`Instead`: a unit in place of a module's whole forward; options of a call that are meant for the grafts."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

import fxgraft
from fxgraft.graph.grafting.graft import Graft, Placer
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.editing import After, Input, Instead, Output


class Scaled(Unit):
    """Runs the module's own operation with its weight times `gain` and, if it has one, a parameter more."""

    def __init__(self, gain, extra=False):
        super().__init__()
        self.gain = gain
        self.extra = nn.Parameter(torch.zeros(())) if extra else None

    def forward(self, module, x):
        factor = self.gain * self.run.options.get("loudness", 1.0)
        out = nn.functional.linear(x, module.weight * factor, module.bias)
        return out if self.extra is None else out + self.extra


class Shift(Unit):
    def forward(self, x):
        return x + 1


@dataclass(frozen=True)
class Placing(Placer):
    placements: tuple
    call_options: ClassVar[tuple[str, ...]] = ("loudness",)

    def place(self, backbone, make):
        units = [make(key, kind) for key, kind, *_ in self.placements]
        return [
            Placement(owner, edit, key, unit)
            for unit, (key, _, owner, edit) in zip(units, self.placements, strict=True)
        ]


@pytest.fixture
def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def grafted(model, *placements):
    GraftRegistry().install(model, [Graft("it", Placing(placements), input_size=(3, 2, 2))])
    return model


def test_the_unit_runs_in_place_of_the_forward_with_the_living_module(model):
    x = torch.randn(4, 3, 2, 2)
    expected = model[3](model[2](nn.functional.linear(x.flatten(1), 2 * model[1].weight, model[1].bias)))
    grafted(model, ("a", lambda: Scaled(2.0), "1", Instead()))
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        model[1].weight.zero_()
    assert torch.equal(model(x), model[3](model[2](model[1].bias.expand(4, 6))))


def test_hooks_outputs_and_copies_stay(model):
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    grafted(
        model,
        ("a", lambda: Scaled(2.0, extra=True), "1", Instead()),
        ("b", Shift, "1", Output()),
    )
    x = torch.randn(4, 3, 2, 2)
    out = model(x)
    assert torch.equal(seen[0], nn.functional.linear(x.flatten(1), 2 * model[1].weight, model[1].bias) + 1)
    assert "1.graft_it_a.extra" in model.state_dict()
    assert torch.equal(copy.deepcopy(model)(x), out)


def test_taking_it_off_restores_the_forward(model):
    x = torch.randn(4, 3, 2, 2)
    before, keys = model(x), list(model.state_dict())
    grafted(model, ("a", lambda: Scaled(2.0, extra=True), "1", Instead()))
    fxgraft.unpatch(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


def test_two_units_in_place_of_one_forward_are_refused(model):
    with pytest.raises(fxgraft.SiteError, match=r"cannot share '1': one replaces its whole forward"):
        grafted(model, ("a", lambda: Scaled(1.0), "1", Instead()), ("b", lambda: Scaled(1.0), "1", Instead()))
    assert type(model[1]) is nn.Linear


def test_a_unit_inside_a_replaced_forward_is_refused():
    outer = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(12, 6), nn.ReLU()))
    with pytest.raises(fxgraft.SiteError, match="never run"):
        grafted(outer, ("a", lambda: Scaled(1.0), "1", Instead()), ("b", lambda: Shift(), "1", After("_0")))
    assert type(outer[1]) is nn.Sequential


def test_declared_options_of_a_call_reach_the_units_and_not_the_model(model):
    grafted(model, ("a", lambda: Scaled(1.0), "1", Instead()))
    x = torch.randn(4, 3, 2, 2)
    loud = model(x, loudness=3.0)
    assert torch.equal(model(x), model(x, loudness=1.0))
    assert not torch.equal(loud, model(x))
    with pytest.raises(TypeError, match="quietness"):
        model(x, quietness=1.0)


def test_the_first_argument_may_be_given_by_name(model):
    grafted(model, ("a", Shift, "", Input()))
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(model(input=x), model(x))


def test_a_unit_on_a_module_that_another_patch_leaves_out_is_refused_at_once():
    model = timm.create_model("test_resnet", num_classes=4)
    fxgraft.patch(model, "mixmo", input_size=(3, 32, 32))
    keys = list(model.state_dict())
    with pytest.raises(
        fxgraft.SiteError, match=r"'mixmo' acts on 'fc', which 'diversification' leaves out in training"
    ):
        fxgraft.patch(model, "diversification", patch=1, input_size=(3, 32, 32))
    assert list(model.state_dict()) == keys
    assert [graft.name for graft in fxgraft.grafts(model)] == ["mixmo"]
