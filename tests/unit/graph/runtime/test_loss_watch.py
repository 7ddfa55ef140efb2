"""What a training may leave out is said once: the schedule that nobody feeds, the parameters that nobody trains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxgraft
from fxgraft.graph.runtime import loss_watch
from fxgraft.graph.runtime.loss_watch import MOVES, PASSES, ROUNDS
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


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, call: Any = None) -> None:
    fxgraft.loss(model, (model if call is None else call)(images(size=16), target=LABELS), LABELS).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def steps(
    model: nn.Module, count: int, optimizer: torch.optim.Optimizer | None = None, call: Any = None
) -> None:
    for _ in range(count):
        step(model, optimizer, call)


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
    monkeypatch.setattr(loss_watch, "STILL", 30)
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


ADDS: dict[str, dict[str, Any]] = {"selfnorm": {}, "mixmo": {"decay": 0.0}}


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {
        "sgd": torch.optim.SGD(model.parameters(), 0.01),
        "adam": torch.optim.AdamW(model.parameters(), 0.01),
        "one by one": torch.optim.SGD(model.parameters(), 0.01, foreach=False),
        "head": torch.optim.SGD([*model.parameters()][-2:], 0.01),
    }


@pytest.mark.parametrize("clear", ["optimizer", "model"])
@pytest.mark.parametrize("method", ADDS)
@pytest.mark.parametrize("which", ["sgd", "adam", "one by one", "head"])
def test_an_optimiser_from_before_the_patch(method: str, which: str, clear: str) -> None:
    model = net()
    optimizer = optimizers(model)[which]
    fxgraft.patch(model, method, input_size=SIZE, **ADDS[method])

    def train() -> None:
        for _ in range(3 * MOVES):
            model.zero_grad()
            step(model, optimizer if clear == "optimizer" else None)
            if clear == "model":
                optimizer.step()

    with pytest.warns(
        fxgraft.FxgraftWarning, match=rf"of '{method}' \(.*graft_.*\) on this Net get gradients"
    ) as found:
        train()
    assert len(found) == 1
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("method", ADDS)
@pytest.mark.parametrize("which", ["sgd", "adam", "one by one"])
def test_an_optimiser_that_knows_of_them(method: str, which: str) -> None:
    model = patched(method, ADDS[method])
    optimizer = optimizers(model)[which]
    for _ in range(2 * MOVES):
        step(model, optimizer)
    assert not any(p._backward_hooks for p in model.parameters())


class PastVersions(torch.optim.Optimizer):
    """Writes to ``.data``, which leaves the versions of some of the tensors as they are."""

    def step(self, closure: Any = None) -> None:
        for index, p in enumerate(self.param_groups[0]["params"]):
            if p.grad is not None:
                (p.data if index > 9 else p.detach()).add_(p.grad, alpha=-0.01)


def test_an_optimiser_that_writes_past_the_versions() -> None:
    model = patched("selfnorm", {})
    optimizer = PastVersions(model.parameters(), {})
    for _ in range(3 * MOVES):
        step(model, optimizer)


def test_what_gets_no_gradient_or_is_frozen_or_not_stepped() -> None:
    """Frozen on purpose; gradients that are only looked at; micro-batches that are accumulated."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    fxgraft.patch(model, "selfnorm", input_size=SIZE)
    for p in fxgraft.grafts(model)[0].parameters():
        p.requires_grad_(False)
    for _ in range(2 * MOVES):
        step(model, optimizer)
    accumulating = patched("selfnorm", {})
    for _ in range(4 * MOVES):
        step(accumulating)


def test_discriminators_without_an_optimiser() -> None:
    model = patched("gam", {"layers": ["stage2", "fc"], "hidden": 8})
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def play() -> None:
        for _ in range(3 * MOVES):
            game = fxgraft.gam.gam_losses(model, images(size=16), images(size=16, seed=1))
            game.discriminator.backward()
            game.mapping.backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(fxgraft.FxgraftWarning, match="12 parameters of 'gam' on this Net get gradients"):
        play()


def test_a_supervised_training_before_the_game() -> None:
    model = patched("gam", {"layers": ["stage2", "fc"], "hidden": 8})
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3 * MOVES):
        F.cross_entropy(model(images(size=16)), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_while_it_is_looked_for(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    fxgraft.patch(model, "selfnorm", input_size=SIZE)
    step(model, optimizer)
    twin = copied(model)
    assert not any(p._backward_hooks for p in twin.parameters())
    fxgraft.unpatch(model)
    assert not any(p._backward_hooks for p in model.parameters())


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_computes_nothing_for_it() -> None:
    """The first pass and later ones run the same operations."""
    model = patched("selfnorm", {})
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    seen = []
    for _ in range(2 * MOVES):
        with Counts() as counts:
            model(images(size=16))
        seen.append(counts.names)
        step(model, optimizer)
    assert all(names == seen[0] for names in seen)
