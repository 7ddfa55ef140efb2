"""Patch first, wrap after: DDP and FSDP2 in two processes, against one process on the whole batch."""

from __future__ import annotations

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
from fxgraft.patches.rsc.patch import record

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2
STEPS = 3


class Net(nn.Module):
    """Two stages without BatchNorm, so that one process on the whole batch computes the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def patched(layers: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    # Every sample is muted, so that what is muted does not depend on who else is in the batch.
    fxgraft.patch(model, "rsc", layer=layers, scope="channel", batch_share=1.0, input_size=(3, 16, 16))
    return model


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 16, generator=g), torch.randint(5, (8,), generator=g)


def train(model: nn.Module, original: nn.Module, x: Tensor, y: Tensor) -> tuple[list[float], int]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, muted = [], 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        with record(original) as records:
            loss = fxgraft.loss(original, model(x, target=y), y)
        muted += sum(int((entry.mask == 0).sum()) for entry in records)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, muted


def wrapped(original: nn.Module, kind: str) -> nn.Module:
    """Shard or replicate a patched model; one kind shards a part of a stage and the linear layer as well."""
    if kind == "ddp":
        return DistributedDataParallel(original)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    inner = [original.layer2[0], original.fc] if kind == "fsdp2_nested" else []
    for part in (original.layer1, *inner, original.layer2, original):
        fully_shard(part, mesh=mesh)
    return original


def worker(rank: int, folder: str) -> None:
    """Train every case in one process of the group, and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for name, (kind, layers) in CASES.items():
            try:
                result: Any = case(rank, kind, layers)
            except Exception as error:  # reported by the test of this case
                result = f"{type(error).__name__}: {error}"
            torch.save(result, f"{folder}/{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def case(rank: int, kind: str, layers: list[str]) -> dict[str, Any]:
    original = patched(layers)
    model = wrapped(original, kind)
    x, y = batch()
    losses, muted = train(model, original, *(each.chunk(WORLD)[rank] for each in (x, y)))
    with torch.no_grad():
        out = model.eval()(x)
    tensors = original.state_dict().items()
    state = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in tensors}
    with pytest.raises(fxgraft.WrappedModelError) as refused:
        fxgraft.patch(model, "rsc", layer="layer1", scope="spatial", name="late")
    return {"losses": losses, "muted": muted, "state": state, "out": out, "refused": str(refused.value)}


CASES = {
    f"{kind}-{name}": (kind, layers)
    for kind in ("ddp", "fsdp2", "fsdp2_nested")
    for name, layers in (("closed_form", ["layer2"]), ("general", ["layer1", "layer2"]))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind; started once, since starting them is most of the time."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, folder: Path) -> None:
    ranks = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD)]
    assert not [rank for rank in ranks if isinstance(rank, str)], ranks

    reference = patched(CASES[name][1])
    x, y = batch()
    losses, muted = train(reference, reference, x, y)
    assert muted > 0
    assert sum(rank["muted"] for rank in ranks) == muted
    mean = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        expected = reference.eval()(x)
    for rank in ranks:
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(rank["state"][key], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["out"], expected, rtol=1e-5, atol=1e-6)
        assert "Patch first, wrap after" in rank["refused"]
