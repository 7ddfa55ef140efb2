"""A schedule that nobody feeds, or feeds wrongly, is said once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxgraft
from fxgraft.graph.runtime import progress_watch
from fxgraft.graph.runtime.progress_watch import PASSES, ROUNDS
from models.toys import LABELS, images, net

SIZE = (3, 16, 16)
SCHEDULED: dict[str, tuple[str, dict[str, Any], str]] = {
    "start": ("rsc", {"layer": "stage2", "start": 0.5}, "start of 'rsc' follows"),
    "batch_schedule": (
        "rsc",
        {"layer": "stage2", "batch_schedule": "authors", "epochs": 30},
        "batch_schedule of 'rsc' follows",
    ),
    "both": (
        "rsc",
        {"layer": "stage2", "start": 0.5, "batch_schedule": "authors", "epochs": 30},
        "start of 'rsc', batch_schedule of 'rsc' follow the",
    ),
    "loss_start": (
        "diversification",
        {"patch": 1, "loss": "gradient_boosting", "loss_start": 0.5},
        "loss_start of 'diversification' follows",
    ),
    "decay": ("mixmo", {}, "decay of 'mixmo' follows"),
}
UNSCHEDULED: list[tuple[str, dict[str, Any]]] = [
    ("rsc", {"layer": "stage2"}),
    ("diversification", {"patch": 1, "loss": None, "loss_start": 0.5}),
    ("mixmo", {"mixing": "linear"}),
    ("mixmo", {"p": 0.0}),
    ("mixmo", {"decay": 0.0}),
    ("mixmo", {"members": 1}),
    ("selfnorm", {}),
]


def patched(method: str, options: dict[str, Any]) -> nn.Module:
    return fxgraft.patch(net(), method, input_size=SIZE, **options)


def step(model: nn.Module, call: Any = None) -> None:
    fxgraft.loss(model, (model if call is None else call)(images(size=16), target=LABELS), LABELS).backward()


def steps(model: nn.Module, count: int, call: Any = None) -> None:
    for _ in range(count):
        step(model, call)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_that_nobody_feeds(name: str) -> None:
    method, options, said = SCHEDULED[name]
    model = patched(method, options)
    assert "waits for fxgraft.set_progress, which was never called" in str(fxgraft.summary(model))
    for _ in range(PASSES):
        step(model)
    with pytest.warns(fxgraft.FxgraftWarning, match=rf"{said}(.|\n)*set_progress\(model, epoch / epochs\)"):
        step(model)
    step(model)  # once
    fxgraft.set_progress(model, 0.25)
    for each in (model, copy.deepcopy(model)):
        assert "follows fxgraft.set_progress, now 0.25" in str(fxgraft.summary(each))


@pytest.mark.parametrize("again", [False, True], ids=["once", "epoch // epochs"])
def test_progress_that_is_set_and_stands_still(again: bool) -> None:
    """Known by the epochs that have gone by: validations of several batches lie between them."""
    model = patched("mixmo", {})

    def epoch(number: int) -> None:
        if number == 0 or again:
            fxgraft.set_progress(model, number // ROUNDS)
        steps(model.train(), 2)
        for _ in range(2):
            model.eval()(images(size=16))

    for number in range(ROUNDS):
        epoch(number)
    with pytest.warns(
        fxgraft.FxgraftWarning,
        match=r"decay of 'mixmo' follows (.|\n)*stands at 0 for 11 training passes (.|\n)*and not epoch // epochs",
    ):
        steps(model.train(), 1)
    steps(model, 1)  # once


def test_progress_that_stands_still_for_long_without_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_watch, "STILL", 30)
    model = patched("mixmo", {})
    fxgraft.set_progress(model, 0.0)
    steps(model, 30)
    fxgraft.set_progress(model, 0.1)
    for _ in range(30):  # one evaluation pass is part of a step
        steps(model.train(), 1)
        model.eval()(images(size=16))
    with pytest.warns(fxgraft.FxgraftWarning, match=r"stands at 0\.1 for 31 training passes"):
        steps(model.train(), 1)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_that_is_fed(name: str) -> None:
    method, options, _ = SCHEDULED[name]
    model = patched(method, options)
    for epoch in range(3):
        fxgraft.set_progress(model, epoch / 3)
        for _ in range(PASSES // 2):
            step(model)
    model.eval()(images(size=16))
    fxgraft.set_progress(model, 1.0)  # when the training is over
    model.eval()(images(size=16))


@pytest.mark.parametrize(("method", "options"), UNSCHEDULED, ids=str)
def test_what_follows_no_schedule(method: str, options: dict[str, Any]) -> None:
    model = patched(method, options)
    assert "set_progress" not in str(fxgraft.summary(model))
    for fraction in (None, 0.0, 1.0):
        if fraction is not None:
            fxgraft.set_progress(model, fraction)
        for _ in range(PASSES + 1):
            step(model)


@pytest.mark.parametrize("epochs", [2, 5])
@pytest.mark.parametrize(
    "share", [lambda e, n: e / (n - 1), lambda e, n: (e + 1) / n], ids=["e/(n-1)", "(e+1)/n"]
)
def test_progress_that_comes_to_its_end_before_the_training(share: Callable[..., float], epochs: int) -> None:
    model = patched("mixmo", {})
    for epoch in range(epochs):
        fxgraft.set_progress(model, share(epoch, epochs))
        if epoch < epochs - 1:
            for _ in range(3):
                step(model)
    with pytest.warns(
        fxgraft.FxgraftWarning, match=r"is said to be over \(1\.0\)(.|\n)*not epoch / \(epochs - 1\)"
    ):
        steps(model, 3)


def test_a_schedule_that_is_held_at_its_end() -> None:
    """As for a look at what the last epoch does."""
    model = patched("mixmo", {})
    fxgraft.set_progress(model, 1.0)
    for _ in range(PASSES):
        step(model)


def test_compiled_passes_are_counted_where_the_loss_is_asked_for() -> None:
    model = patched("diversification", {"patch": 1, "loss": "gradient_boosting", "loss_start": 0.5})
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(fxgraft.FxgraftWarning, match="loss_start of 'diversification' follows"):
        steps(model, PASSES + 1, call=compiled)
    torch.compiler.reset()
