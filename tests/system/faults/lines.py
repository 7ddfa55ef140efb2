"""The lines of fxgraft that an act runs, and an exception at any of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

import fxgraft
from fxgraft.graph import atomic as whole
from fxgraft.graph.runtime import forward_context as passes
from fxgraft.graph.tracing.editing import After, Output
from models.toys import Toy, net

HOME = str(Path(fxgraft.__file__).parent)
SIZE = (3, 8, 8)
CALL, CHECKPOINT = nn.Module.__call__, torch.utils.checkpoint.checkpoint
INSIDE = Toy(at=(("stage1.0", After("conv1")), ("stage2", Output())), factor=3, learned=True)


class Lines:
    """Notes the lines of fxgraft that a block runs, and raises at one of them."""

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        self.at, self.error = at, error
        self.places: list[tuple[str, int]] = []

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.places) - 1 == self.at:
                self.strike()
        return self._line

    def strike(self) -> None:
        """Do what is to happen at that line."""
        if self.error is not None:
            raise self.error

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(HOME) else None

    def __enter__(self) -> Lines:
        self.before = sys.gettrace()  # a measurement of coverage, perhaps
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)


def bare() -> nn.Module:
    return net().eval()


def stacked() -> nn.Module:
    model = fxgraft.patch(bare(), INSIDE, name="first")
    model.stage1.add_module("later", nn.Identity())  # behind the unit, among the children
    return fxgraft.patch(model, Toy(factor=2), name="second")


@contextmanager
def nothing_else_changes(draws: bool = False) -> Iterator[None]:
    """Check that a block leaves what the process shares as it was; torch's random state unless the block draws."""
    chance, torch_chance = random.getstate(), torch.get_rng_state()
    yield
    assert nn.Module.__call__ is CALL
    assert torch.utils.checkpoint.checkpoint is CHECKPOINT
    assert not getattr(passes._running, "stack", ())
    assert not whole._lock._is_owned()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert random.getstate() == chance
    assert draws or torch.equal(torch.get_rng_state(), torch_chance)


def distinct(places: list[tuple[str, int]], count: int, seed: str) -> list[int]:
    """Choose so many different lines, and one time that each of them runs; the same ones for one seed."""
    chance = random.Random(seed)
    times: dict[tuple[str, int], list[int]] = {}
    for index, place in enumerate(places):
        times.setdefault(place, []).append(index)
    chosen = chance.sample(sorted(times), min(count, len(times)))
    return [chance.choice(times[place]) for place in chosen]
