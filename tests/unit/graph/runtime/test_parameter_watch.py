"""Parameters of a graft that no optimiser moves are said once."""

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
from fxgraft.graph.runtime.parameter_watch import MOVES
from models.toys import LABELS, images, net

SIZE = (3, 16, 16)
ADDS: dict[str, dict[str, Any]] = {"selfnorm": {}, "mixmo": {"decay": 0.0}}


def patched(method: str, options: dict[str, Any]) -> nn.Module:
    return fxgraft.patch(net(), method, input_size=SIZE, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    fxgraft.loss(model, model(images(size=16), target=LABELS), LABELS).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


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
