"""What a unit sees of a pass: its graft's share of it, in its own thread, and an error outside of one."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.graph.tracing.editing import Output
from models.toys import LABELS, Toy, images, net

SIZE = (3, 8, 8)
STAGES = (("stage1", Output()), ("stage2", Output()))


def counting(model: nn.Module, name: str, number: Any, seen: list[Any]) -> None:
    """Patch two stages with units that share one number and hand on the sizes of what they saw."""

    class Counts(fxgraft.extend.Unit):
        def forward(self, x: Tensor) -> Tensor:
            before = self.run.get("size")
            self.run.put("size", len(x))
            seen.append((name, self.run.shared("number", lambda: next(number)), before))
            return x

    class Counting(Toy):
        def unit(self) -> Any:
            return Counts()

    fxgraft.patch(model, Counting(at=STAGES, modes="training"), name=name, input_size=SIZE)


def test_units_share_with_their_graft_alone_and_within_one_pass() -> None:
    model, number, seen = net(), itertools.count(), []
    counting(model, "one", number, seen)
    counting(model, "other", number, seen)
    model(images())
    assert seen == [("one", 0, None), ("other", 1, None), ("one", 0, 4), ("other", 1, 4)]
    model(images(3))
    assert seen[4:] == [("one", 2, None), ("other", 3, None), ("one", 2, 3), ("other", 3, 3)]


def test_passes_of_two_threads_share_nothing() -> None:
    model, seen = net(), []
    meet = threading.Barrier(2, timeout=60)
    counting(model, "one", itertools.count(), seen)

    def wait(*_: Any) -> None:
        meet.wait()

    def run(batch: int) -> None:
        model(images(batch))

    model.down.register_forward_hook(wait)  # until both are between the two units
    threads = [threading.Thread(target=run, args=(batch,)) for batch in (4, 6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    later = sorted((number, size) for _, number, size in seen if size is not None)
    assert sorted(number for number, _ in later) == [0, 1]
    assert sorted(size for _, size in later) == [4, 6]


def test_outside_of_a_pass_a_unit_has_none() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage1", input_size=SIZE)
    unit = fxgraft.grafts(model)[0].units["stage1"]
    assert unit.current is None
    with pytest.raises(fxgraft.SiteError, match="'rsc' acts inside a pass of its model"):
        _ = unit.run.training
    with pytest.raises(fxgraft.SiteError, match="Call the model, not its parts"):
        model.stage1(torch.randn(4, 8, 8, 8))
    model(images(), target=LABELS)
    assert unit.current is None
