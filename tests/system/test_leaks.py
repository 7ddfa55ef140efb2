"""What is deleted is freed, and what is done again and again costs no more memory each time."""

from __future__ import annotations

import copy
import gc
import mmap
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxgraft
from fxgraft.graph.tracing.editing import After, Output
from models.toys import LABELS, Net, Toy, images, net

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


def resident() -> int:
    """Memory of this process that is in use, in bytes; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Flat:
    """Says whether a loop keeps objects, or memory that no object of Python holds."""

    def __init__(self, count: int) -> None:
        # The first quarter fills what is made once and kept.
        self.at = {count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)}
        self.count, self.number = count, 0
        self.objects: list[int] = []
        self.bytes: list[int] = []

    def measure(self) -> None:
        """Take note of one round of the loop."""
        if self.number in self.at:
            gc.collect()
            self.objects.append(len(gc.get_objects()))
            self.bytes.append(resident())
        self.number += 1

    def check(self, objects: int) -> None:
        """Compare the end with what was there after a quarter of the loop."""
        assert self.number == self.count
        assert self.objects[-1] - self.objects[0] < objects, self.objects
        # What a loop leaks it leaks in every quarter; an allocator that takes another arena does so in one.
        grown = min(later - earlier for earlier, later in pairwise(self.bytes))
        assert grown < SLACK + 1024 * self.count // 4, self.bytes


SLACK = 2**20


def cycles(count: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(1), nn.Linear(16, 4))
    toy = Toy(at=(("0", Output()), ("", After("_1"))), learned=True)
    flat = Flat(count)
    for _ in range(count):
        fxgraft.patch(model, toy, name="toy", input_size=(3, 2, 2))
        fxgraft.unpatch(model)
        flat.measure()
    flat.check(50 + count // 20)


def steps(count: int) -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    fxgraft.patch(model, "taps", layers="stage1", input_size=SIZE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    flat = Flat(count)
    x = images()
    for _, y in fxgraft.with_targets([(x, LABELS)] * count):
        fxgraft.loss(model, model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        flat.measure()
    flat.check(50)


def copies(count: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(1), nn.Linear(16, 4))
    toy = Toy(at=(("0", Output()), ("", After("_1"))), learned=True)
    fxgraft.patch(model, toy, name="toy", input_size=(3, 2, 2))
    flat = Flat(count)
    for number in range(count):
        twin = pickle.loads(pickle.dumps(model)) if number % 2 else copy.deepcopy(model)
        assert twin(torch.zeros(1, 3, 2, 2)).shape == (1, 4)
        flat.measure()
    flat.check(50 + count // 20)


def test_a_leak_is_noticed() -> None:
    kept: list[Any] = []
    flat = Flat(20)
    for number in range(20):
        pages = mmap.mmap(-1, 2**20)  # of the system's own: an allocator may have old ones to give
        pages.write(bytes([1]) * 2**20)
        kept.append((pages, {number: []}))
        flat.measure()
    with pytest.raises(AssertionError):
        flat.check(10)
    if resident():
        with pytest.raises(AssertionError):
            flat.check(1000)


@pytest.mark.parametrize(("loop", "count"), [(cycles, 40), (steps, 40), (copies, 40)])
def test_again_and_again_keeps_nothing(loop: Callable[[int], None], count: int) -> None:
    loop(count)


@pytest.mark.sweep
@pytest.mark.parametrize(("loop", "count"), [(cycles, 500), (steps, 500), (copies, 300)])
def test_hundreds_of_times_keep_nothing(loop: Callable[[int], None], count: int) -> None:
    """In a process of its own: what other tests have left would move the memory of this one."""
    paths = (str(Path(__file__).parents[1]), str(Path(fxgraft.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", f"from system import test_leaks; test_leaks.{loop.__name__}({count})"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
