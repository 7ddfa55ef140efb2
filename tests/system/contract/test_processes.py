"""Patch first, wrap after: DDP and FSDP2 in two processes, against one process."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fxgraft
from fxgraft.patches import gam
from system.contract.cases import METHODS, SMALL, Cell

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2
STEPS = 3
SIZE = (3, 16, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


class Net(nn.Module):
    """Two residual blocks without BatchNorm, so that one process on the whole batch computes the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.blocks = nn.Sequential(Block(), Block())
        self.down = nn.Conv2d(6, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.down(self.blocks(self.stem(x)))).mean((2, 3)))


# Whose result does not depend on who else is in the batch: two halves train as the whole does.
BY_SAMPLE: dict[str, Mapping[str, Any]] = {
    "rsc": {"layer": "down", "scope": "channel", "batch_share": 1.0},
    "rsc, two sites": {"layer": ["blocks", "down"], "scope": "channel", "batch_share": 1.0},
    "taps": {"layers": ["blocks.0", "down"]},
}
# Others see the same batch in every process and draw alike.
ALIKE: dict[str, Mapping[str, Any]] = {
    **{method: Cell(method, SMALL).options() for method in METHODS if method not in BY_SAMPLE},
    "crossnorm, consistency": {"consistency": True, "p": 1.0, "active": None},
}
KINDS = ("ddp", "fsdp2", "fsdp2_nested")
CASES = [(kind, name) for kind in KINDS for name in (*BY_SAMPLE, *ALIKE)]


def patched(name: str) -> nn.Module:
    torch.manual_seed(0)
    method = name.partition(",")[0]
    options = {**BY_SAMPLE, **ALIKE}.get(name)
    options = Cell(method, SMALL).options() if options is None else options  # a method that came later
    return fxgraft.patch(Net(), method, input_size=SIZE, **options)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, *SIZE, generator=g), torch.randint(5, (8,), generator=g)


def wrapped(original: nn.Module, kind: str) -> nn.Module:
    """Replicate or shard a patched model; one kind shards a part of a block and the linear layer as well."""
    if kind == "ddp":
        return DistributedDataParallel(original)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    inner: Sequence[nn.Module] = [original.blocks[0].conv1, original.fc] if kind == "fsdp2_nested" else []
    for part in (*inner, *original.blocks, original.down, original):
        fully_shard(part, mesh=mesh)
    return original


def trained(model: nn.Module, original: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    learning = [p for p in original.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    torch.manual_seed(2)
    losses = []
    for step in range(STEPS):
        fxgraft.set_progress(model, step / STEPS)
        optimizer.zero_grad()
        loss = fxgraft.loss(model if kind_of(model) == "ddp" else original, model(x, target=y), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = original.state_dict().items()
    with torch.no_grad():
        out = model.eval()(batch()[0])
    return {
        "losses": losses,
        "out": out,
        "state": {key: v.full_tensor() if isinstance(v, DTensor) else v for key, v in state},
    }


def kind_of(model: nn.Module) -> str:
    return "ddp" if isinstance(model, DistributedDataParallel) else ""


def case(kind: str, name: str) -> dict[str, Any]:
    original = patched(name)
    model = wrapped(original, kind)
    x, y = batch()
    if name in BY_SAMPLE:
        x, y = (each.chunk(WORLD)[dist.get_rank()] for each in (x, y))
    found = trained(model, original, x, y)
    with pytest.raises(fxgraft.WrappedModelError) as refused:
        fxgraft.patch(model, "taps", layers="stem", name="late")
    return {**found, "refused": str(refused.value)}


def worker(rank: int, folder: str, modules: list[str], cases: list[tuple[str, str]]) -> None:
    """Train every case in one process of the group, and write down what came of it."""
    torch.set_num_threads(1)
    for module in modules:  # which register the methods
        importlib.import_module(module)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for kind, name in cases:
            try:
                result: Any = case(kind, name)
            except Exception as error:  # reported by the test of this case
                result = f"{type(error).__name__}: {error}"
            torch.save(result, f"{folder}/{kind}-{name}-{rank}.pt")
        for name in GAMES:
            original = game(name)
            model = DistributedDataParallel(original)
            play(model, original, images(8, 1).chunk(WORLD)[rank], images(4, 2).chunk(WORLD)[rank])
            torch.save(contents(original), f"{folder}/{name}-{rank}.pt")
        dist.barrier()  # neither leaves the group while the other one still talks to it
    finally:
        dist.destroy_process_group()
    os._exit(
        0
    )  # all is written; on a busy machine the interpreter's end may abort over threads that gloo left


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind of the cases to run; started once, since starting them takes long."""
    folder = tmp_path_factory.mktemp("processes")
    # Other tests of this process may have registered more, which no other process can import.
    known = fxgraft.methods()
    modules = sorted({known[name.partition(",")[0]].__module__ for _, name in CASES})
    wanted = {
        (item.callspec.params["kind"], item.callspec.params["name"])
        for item in request.session.items
        # By the function: tests of other files have the same name.
        if isinstance(item, pytest.Function) and item.function is test_two_processes_train_as_one
    }
    mp.spawn(worker, (str(folder), modules, [case for case in CASES if case in wanted]), nprocs=WORLD)
    return folder


@pytest.mark.works_with("DDP, two processes", where={"kind": "ddp"})
@pytest.mark.works_with("FSDP2, two processes", where={"kind": "fsdp2"})
@pytest.mark.works_with("FSDP2, parts of blocks sharded as well", where={"kind": "fsdp2_nested"})
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_processes_train_as_one(kind: str, name: str, folder: Path) -> None:
    ranks = [torch.load(folder / f"{kind}-{name}-{rank}.pt") for rank in range(WORLD)]
    assert not [rank for rank in ranks if isinstance(rank, str)], ranks
    reference = patched(name)
    expected = trained(reference, reference, *batch())
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=1e-5, atol=1e-6)
    for rank in ranks:
        assert "Patch first, wrap after" in rank["refused"]
        torch.testing.assert_close(rank["out"], expected["out"], rtol=1e-5, atol=1e-6)
        assert rank["state"].keys() == expected["state"].keys()
        for key, value in expected["state"].items():
            torch.testing.assert_close(rank["state"][key], value, rtol=1e-5, atol=1e-6)


# The game of "gam" has a loss and an optimiser of its own.

GAMES: dict[str, Mapping[str, Any]] = {
    "drift": {"layers": ["down", "fc"], "drift": 0.1},
    "head_untapped": {"layers": "down", "drift": 0},
}


def game(name: str) -> nn.Module:
    torch.manual_seed(0)
    return fxgraft.patch(Net(), "gam", matching=None, hidden=20, input_size=SIZE, **GAMES[name])


def images(size: int, seed: int) -> Tensor:
    return torch.randn(size, *SIZE, generator=torch.Generator().manual_seed(seed))


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: v.clone() for key, v in {**model.state_dict(), **gam.discriminators(model).state_dict()}.items()
    }


def play(model: nn.Module, original: nn.Module, x_source: Tensor, x_target: Tensor) -> None:
    judges = gam.discriminators(original)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (judges, original)]
    for _ in range(STEPS):
        step = fxgraft.gam.gam_losses(model, x_source, x_target)
        for optimizer in optimizers:
            optimizer.zero_grad()
        step.mapping.backward()
        step.discriminator.backward()
        if dist.is_initialized():
            for p in judges.parameters():
                dist.all_reduce(p.grad)
                p.grad /= WORLD
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", GAMES)
def test_two_processes_adapt_as_one(name: str, folder: Path) -> None:
    reference = game(name)
    before = contents(reference)
    play(reference, reference, images(8, 1), images(4, 2))
    expected = contents(reference)
    assert torch.equal(expected["fc.weight"], before["fc.weight"]) == (name == "head_untapped")
    for rank in range(WORLD):
        found = torch.load(folder / f"{name}-{rank}.pt")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
