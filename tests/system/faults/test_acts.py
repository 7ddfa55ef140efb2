"""An exception at any line: Ctrl-C, a full memory, a full disk. A model is then as before or as after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxgraft
from models.toys import Toy, assert_same, images, net, state_of_everything
from sweeping import some
from system.faults.lines import INSIDE, SIZE, Lines, bare, distinct, nothing_else_changes, stacked

ACTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "patch": (bare, lambda m: fxgraft.patch(m, INSIDE, name="first")),
    "unpatch one": (stacked, lambda m: fxgraft.unpatch(m, "second")),
    "unpatch": (stacked, fxgraft.unpatch),
    "sites": (stacked, lambda m: fxgraft.sites(m, input_size=SIZE)),
    "patch taps": (bare, lambda m: fxgraft.patch(m, "taps", layers="stage1.0", input_size=SIZE)),
    "patch another": (stacked, lambda m: fxgraft.patch(m, Toy(factor=5), name="third")),
    "dry run": (stacked, lambda m: fxgraft.patch(m, Toy(factor=5), name="third", dry_run=True)),
    "merge": (lambda: fxgraft.patch(bare(), "rsc", layer="stage2", input_size=SIZE), fxgraft.merge),
}
LOOKS = ("sites", "dry run", "merge")


def seen(model: nn.Module) -> tuple[list[str], torch.Tensor]:
    return [g.name for g in fxgraft.grafts(model)], model(images())


@functools.cache
def after(act: str) -> tuple[list[str], torch.Tensor]:
    make, do = ACTS[act]
    model = make()
    do(model)
    return seen(model)


def check(act: str, at: int, kind: type[BaseException]) -> None:
    """Raise at one line of an act; then the model is as before or as after, and works."""
    make, do = ACTS[act]
    model = make()
    before, everything = seen(model), state_of_everything(model)
    searched = False
    with nothing_else_changes():
        try:
            with Lines(at, kind("injected")):
                do(model)
        except kind:
            pass
        except fxgraft.FxgraftError:  # what a search makes of a failure in its middle
            searched = True
        assert issubclass(kind, Exception) or not searched
        now, expected = seen(model), before
        if act not in LOOKS and now[0] != before[0]:
            expected = after(act)
        assert now[0] == expected[0]
        assert torch.equal(now[1], expected[1])
    if expected is before:
        assert_same(everything, state_of_everything(model))
    # It can still be worked with, and all can be taken off.
    if fxgraft.grafts(model):
        fxgraft.unpatch(model)
    assert not [
        n for n, m in model.named_modules() if "_fxgraft" in m.__dict__ or "_fxgraft_base" in vars(type(m))
    ]
    assert list(model.state_dict()) == list(net().state_dict())


def lines_of(act: str) -> list[tuple[str, int]]:
    make, do = ACTS[act]
    do(make())  # what is found once and remembered is remembered
    model = make()
    with Lines() as lines:
        do(model)
    return lines.places


def interrupt(act: str, kind: type[BaseException], count: int) -> None:
    """Interrupt an act at some of its lines, the same ones in every run."""
    for at in distinct(lines_of(act), count, f"{act} {kind.__name__}"):
        check(act, at, kind)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("act", some(ACTS, 4))
def test_an_interruption_at_some_lines(act: str) -> None:
    interrupt(act, KeyboardInterrupt, 6)


# What is raised in a finaliser goes nowhere: Python reports it and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "count"), [(KeyboardInterrupt, 12), (MemoryError, 4), (OSError, 4)])
@pytest.mark.parametrize("act", ACTS)
def test_an_interruption_at_more_lines(act: str, kind: type[BaseException], count: int) -> None:
    interrupt(act, kind, count)
