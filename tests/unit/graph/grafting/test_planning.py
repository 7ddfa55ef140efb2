"""Plans: what is planned again when one more graft comes, and what planning leaves alone."""

from __future__ import annotations

import dataclasses
import operator
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.extend import Backbone, Make, Placement
from fxgraft.graph.grafting.graft_registry import registry_of
from fxgraft.graph.structure import positions
from fxgraft.graph.tracing import model_trace
from fxgraft.graph.tracing.editing import After, Output
from fxgraft.patches.blocks import Part
from fxgraft.patches.rsc.patch import RSCUnit
from models.toys import Net, Toy, assert_same, images, names, net, state_of_everything

SIZE = (3, 8, 8)
INSIDE = (("stage1.0", After("conv1")),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(Toy):
    """A toy that counts how often it is asked for its places."""

    asked: list[int] = dataclasses.field(default_factory=list, compare=False)

    def place(self, backbone: Backbone, make: Make) -> Sequence[Placement]:
        self.asked.append(1)
        return super().place(backbone, make)


def states(model: nn.Module) -> dict[str, Any]:
    registry = registry_of(model)
    assert registry is not None
    assert registry.plan is not None
    return dict(registry.plan.states)


def test_one_more_graft_plans_only_what_is_new() -> None:
    model, first, second = net(), Counted(at=INSIDE), Counted(at=(("stage2.1", After("conv2")),), factor=3)
    fxgraft.patch(model, first, name="first", input_size=SIZE)
    before = states(model)
    fxgraft.patch(model, second, name="second", input_size=SIZE)
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert states(model)["stage1.0"] is before["stage1.0"]
    fxgraft.unpatch(model, "first")
    assert len(second.asked) == 1
    fresh = fxgraft.patch(net(), second, name="second", input_size=SIZE)
    assert names(model) == names(fresh)
    assert torch.equal(model.eval()(images()), fresh.eval()(images()))


@pytest.mark.parametrize("at", [INSIDE, (("stage1.0", Output()),)])
def test_a_part_that_gets_one_more_is_compiled_again(at: Any) -> None:
    one, both = net(), net()
    for model, grafts in ((one, ((INSIDE, 2.0), (at, 3.0))), (both, ((at, 3.0), (INSIDE, 2.0)))):
        for number, (places, factor) in enumerate(grafts):
            fxgraft.patch(model, Toy(at=places, factor=factor), name=f"g{number}", input_size=SIZE)
    assert torch.allclose(one.eval()(images()), both.eval()(images()))
    assert not torch.equal(one(images()), net().eval()(images()))


def change_a_setting(model: Net) -> None:
    model.drop.p = 0.5


def replace_a_layer(model: Net) -> None:
    model.stage1[0] = net().stage1[0]


def train(model: Net) -> None:
    model.train()(images())


@pytest.mark.parametrize("change", [change_a_setting, replace_a_layer, train])
def test_a_model_that_changed_is_planned_from_the_start(change: Callable[[Net], None]) -> None:
    model, first = net(), Counted(at=INSIDE)
    fxgraft.patch(model, first, name="first", input_size=SIZE)
    change(model)
    fxgraft.patch(model, Toy(), name="second", input_size=SIZE)
    assert len(first.asked) > 1


def test_a_call_of_the_model_lets_go_of_what_was_found_on_the_way() -> None:
    model = fxgraft.patch(net().eval(), Counted(at=INSIDE), name="first", input_size=SIZE)
    registry = registry_of(model)
    assert registry is not None
    assert registry.plan is not None
    assert registry.plan.look.traces
    model(images())
    assert not registry.plan.look.traces


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("method", ["selfnorm", "taps", "rsc", "crossnorm", "diversification", "mixmo"])
def test_a_dry_run_tells_the_units_that_are_there_nothing(method: str, changed: bool) -> None:
    options: dict[str, Any] = {"taps": {"layers": "stage1"}, "rsc": {"layer": "stage2"}}.get(method, {})
    model = fxgraft.patch(net(), method, input_size=SIZE, **options)
    if changed:
        model.register_forward_hook(lambda *_: None)
    units = [unit for graft in fxgraft.grafts(model) for unit in graft.units.values()]
    before = [dict(unit.__dict__) for unit in units]
    everything = state_of_everything(model)
    fxgraft.patch(model, Toy(), name="toy", dry_run=True, input_size=SIZE)
    assert_same(everything, state_of_everything(model))
    for unit, kept in zip(units, before, strict=True):
        assert unit.__dict__.keys() == kept.keys()
        assert all(unit.__dict__[name] is value for name, value in kept.items())


def seen(model: nn.Module) -> Any:
    """What of a model another thread could find changed."""
    buffers = [(name, id(each), each._version) for name, each in model.named_buffers()]
    modules = [(name, type(each), each.training) for name, each in model.named_modules()]
    return modules, buffers, list(model._modules)


def dry(model: nn.Module) -> None:
    fxgraft.patch(model, Toy(at=(("stage2", Output()), ("", After("fc")))), name="third", dry_run=True)


ACTS: dict[str, Callable[[nn.Module], Any]] = {
    "dry run": dry,
    "dry run of a method": lambda m: fxgraft.patch(m, "crossnorm", input_size=SIZE, dry_run=True),
    "dry run of taps": lambda m: fxgraft.patch(m, "taps", layers="stage2", input_size=SIZE, dry_run=True),
    "sites": lambda m: fxgraft.sites(m, input_size=SIZE),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("patched", [False, True])
def test_threads_that_call_a_model_see_nothing_of_a_look_at_it(act: str, patched: bool) -> None:
    found: list[tuple[Tensor, Any]] = []
    live: list[nn.Module] = []

    class Watched(Net):
        """While it is looked at, the model itself runs in eight other threads."""

        def forward_head(self, value: Tensor) -> Tensor:
            if live and threading.current_thread() is here:
                with ThreadPoolExecutor(8) as pool:
                    found.extend(pool.map(call, live * 8))
            return super().forward_head(value)

    def call(model: nn.Module) -> tuple[Tensor, Any]:
        with torch.no_grad():
            return model(images()), seen(model)

    here = threading.current_thread()
    model = Watched()
    with torch.random.fork_rng(devices=[]):
        if patched:
            fxgraft.patch(model, "selfnorm", input_size=SIZE)
            fxgraft.patch(model, Toy(at=INSIDE), name="toy", input_size=SIZE)
    model.eval()
    model.stage2.train()  # neither mode, so that setting one shows
    for each in model.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.eval()
    right, everything = model(images()), seen(model)
    live.append(model)
    ACTS[act](model)
    live.clear()
    assert len(found) >= 8
    for out, then in found:
        assert torch.equal(out, right)
        assert then == everything


def test_two_grafts_in_dense_blocks_call_every_unit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by graft, a part of the second one would be called once for every later layer of its block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("densenet121", block_config=(2, 4), growth_rate=4, num_classes=3).eval()
        fxgraft.patch(model, "selfnorm", name="first", input_size=(3, 32, 32))
        fxgraft.patch(model, "selfnorm", name="second", gates=2, input_size=(3, 32, 32))
        for parameter in (p for graft in fxgraft.grafts(model) for p in graft.parameters()):
            nn.init.normal_(parameter)
    called: list[nn.Module] = []
    forward = Part.forward
    monkeypatch.setattr(Part, "forward", lambda unit, x: (called.append(unit), forward(unit, x))[1])
    x = images(2, 32)
    out = model(x)
    parts = [unit for graft in fxgraft.grafts(model) for unit in graft.units_of(Part)]
    assert len(parts) > 10
    assert sorted(map(id, called)) == sorted(map(id, parts))
    fxgraft.unpatch(model, "first")
    assert not torch.allclose(model(x), out)


STACK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("taps", {"layers": -1}),
    ("rsc", {"layer": -1}),
    ("crossnorm", {}),
    ("selfnorm", {}),
    ("diversification", {}),
)


class Work:
    """Counts the passes of fake images and the traces that planning makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = 0
        self.traces: list[Any] = []
        run, make = model_trace.observe, model_trace.trace

        def observe(*args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            return run(*args, **kwargs)

        def trace(module: nn.Module, call: Any, training: bool, *rest: Any) -> Any:
            self.traces.append((training, *rest[:3]))  # what is opened, and the module's name
            return make(module, call, training, *rest)

        monkeypatch.setattr(model_trace, "observe", observe)
        monkeypatch.setattr(model_trace, "trace", trace)


def small(name: str) -> nn.Module:
    options = {"densenet121": {"block_config": (2, 3, 2), "growth_rate": 4}}.get(name, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=3, **options).eval()


def stacked(model: nn.Module, together: bool, stack: Any = STACK) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if together:
            text = " + ".join(
                ":".join([method, *(f"{key}={value}" for key, value in options.items())])
                for method, options in stack
            )
            return fxgraft.patch(model, text, input_size=(3, 96, 96))
        for method, options in stack:
            fxgraft.patch(model, method, input_size=(3, 96, 96), **options)
        return model


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["densenet121", "test_resnet"])
def test_grafts_beside_each_other_trace_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, name: str, together: bool
) -> None:
    work = Work(monkeypatch)
    stacked(small(name), together)
    assert work.passes == 1
    assert len(work.traces) == len(set(map(repr, work.traces)))


def test_positions_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    find = positions.dense_layers
    monkeypatch.setattr(
        positions, "dense_layers", lambda trace, position: (asked.append(position), find(trace, position))[1]
    )
    stacked(small("densenet121"), together=False)
    assert asked == ["conv1_pre"]


@pytest.mark.parametrize("name", ["densenet121", "test_resnet"])
def test_one_by_one_gives_what_together_gives(name: str) -> None:
    one, both = stacked(small(name), together=False), stacked(small(name), together=True)
    registries = [registry for model in (one, both) if (registry := registry_of(model)) is not None]
    assert registries[0].recorded() == registries[1].recorded()
    assert names(one) == names(both)
    x, y = images(4, 96), torch.arange(4) % 3
    for training in (False, True):
        outs = []
        for model in (one, both):
            model.train(training)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                outs.append(model(x, target=y))
        assert torch.equal(*outs)


@pytest.mark.parametrize("name", ["densenet121", "test_resnet"])
def test_a_model_is_as_it_was_after_grafts_one_by_one(name: str) -> None:
    model = small(name)
    before = state_of_everything(model)
    assert_same(before, state_of_everything(fxgraft.unpatch(stacked(model, together=False))))


def rests(model: nn.Module) -> list[Any]:
    return [
        unit.rest
        for graft in fxgraft.grafts(model)
        if graft.name == "rsc"
        for unit in graft.units_of(RSCUnit)
    ]


def test_the_rest_of_the_network_is_followed_again_where_a_unit_acts_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small("test_resnet")
    fxgraft.patch(model, "rsc", layer="layer2", input_size=(3, 96, 96))
    bare = rests(model)
    fxgraft.patch(model, "selfnorm", name="early", layers="layer1", input_size=(3, 96, 96))
    assert all(map(operator.is_, rests(model), bare))
    fxgraft.patch(model, "selfnorm", name="late", layers="layer4", input_size=(3, 96, 96))
    late = rests(model)
    assert not any(map(operator.is_, late, bare))
    work = Work(monkeypatch)
    fxgraft.patch(model, "crossnorm", input_size=(3, 96, 96))  # for training alone
    assert all(map(operator.is_, rests(model), late))
    assert work.passes == 0
    fxgraft.unpatch(model, "late")
    assert all(map(operator.is_, rests(model), bare))
    registry = registry_of(model)
    assert registry is not None
    model.train()(images(4, 96), target=torch.arange(4) % 3)
    assert registry.renewals == 0
