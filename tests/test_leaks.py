"""What is deleted is freed, and what is done again and again costs no more memory each time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxgraft
from fxgraft.graph.tracing.editing import After, Output
from toys import LABELS, Net, Toy, images, net

SIZE = (3, 8, 8)
METHODS: dict[str, dict[str, Any]] = {
    "rsc": {"layer": "stage2"},
    "crossnorm": {},
    "selfnorm": {},
    "mixmo": {"members": 2},
    "taps": {"layers": ["stage1", "stage2"]},
    "diversification": {},
}


@pytest.fixture
def _uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("method", METHODS)
def test_a_deleted_model_is_freed_at_once(method: str) -> None:
    model = fxgraft.patch(net(), method, input_size=SIZE, **METHODS[method])
    x = images()
    fxgraft.loss(model, model(x, target=LABELS), LABELS).backward()
    model.eval()(x)
    alive = [weakref.ref(module) for module in model.modules()]
    del model
    assert [type(ref()) for ref in alive if ref() is not None] == []


@pytest.mark.usefixtures("_uncollected")
def test_a_model_that_was_looked_at_and_unpatched_is_freed_at_once() -> None:
    model = net()
    fxgraft.patch(
        model, Toy(at=(("stage1.0", After("conv1")), ("stage2", Output())), learned=True), name="toy"
    )
    fxgraft.sites(model, input_size=SIZE)
    fxgraft.unpatch(model)
    alive = weakref.ref(model)
    del model
    assert alive() is None


def test_a_class_made_in_a_function_goes_with_its_model() -> None:
    def made() -> weakref.ref[type]:
        local = type("Local", (Net,), {})
        model = fxgraft.patch(local(), Toy(), name="toy")
        model(images())
        return weakref.ref(local)

    kind = made()
    gc.collect()
    assert kind() is None


def cycles(count: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(1), nn.Linear(16, 4))
    toy = Toy(at=(("0", Output()), ("", After("_1"))), learned=True)
    before: list[int] = []
    for number in range(count):
        if number in (count // 4, count - 1):
            gc.collect()
            before.append(len(gc.get_objects()))
        fxgraft.patch(model, toy, name="toy", input_size=(3, 2, 2))
        fxgraft.unpatch(model)
    assert before[1] - before[0] < 50 + count // 20


def steps(count: int) -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    fxgraft.patch(model, "taps", layers="stage1", input_size=SIZE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before: list[int] = []
    x = images()
    for number, (_, y) in enumerate(fxgraft.with_targets([(x, LABELS)] * count)):
        if number in (count // 4, count - 1):
            gc.collect()
            before.append(len(gc.get_objects()))
        fxgraft.loss(model, model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before[1] - before[0] < 50


def test_patching_again_and_again_keeps_nothing() -> None:
    cycles(40)


def test_steps_keep_nothing() -> None:
    steps(40)


@pytest.mark.sweep
def test_thousands_of_cycles_and_steps_keep_nothing() -> None:
    cycles(2000)
    steps(2000)
