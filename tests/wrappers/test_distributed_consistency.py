"""CrossNorm's consistency loss under DDP and FSDP2: its extra passes join the step of the wrapped model."""

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

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def trained(kind: str | None) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps with SelfNorm and the consistency loss; every process sees the same batch and draws alike."""
    torch.manual_seed(0)
    original = Net()
    fxgraft.patch(original, "crossnorm", consistency=True, p=1.0, active=None, input_size=(3, 16, 16))
    fxgraft.patch(original, "selfnorm", input_size=(3, 16, 16))
    x, y = torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
    model: nn.Module = original
    if kind == "ddp":
        model = DistributedDataParallel(original)
    elif kind == "fsdp2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for part in (*original.blocks, original):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        parts = fxgraft.losses(original, model(x), y)
        sum(parts.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        losses += [part.item() for part in parts.values()]
    state = original.state_dict().items()
    return losses, {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for kind in ("ddp", "fsdp2"):
            try:
                result: Any = trained(kind)
            except Exception as error:  # reported by the test of this kind
                result = f"{type(error).__name__}: {error}"
            torch.save(result, f"{folder}/{kind}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_equal_batches_train_as_one_process_does(folder: Path, kind: str) -> None:
    losses, state = trained(None)
    assert min(losses[1::2]) > 0  # the divergence
    for rank in range(WORLD):
        found = torch.load(f"{folder}/{kind}-{rank}.pt")
        assert not isinstance(found, str), found
        assert found[0] == pytest.approx(losses, rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)
