"""accelerate: one process, lower precision, and two processes of the gloo backend."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxgraft
from models.tiny import BATCHES, SIZE, assert_trained, by_hand, dataset, loader, patched
from models.toys import CLASSES

WORLD = 2


@pytest.fixture(autouse=True)
def _state() -> None:
    """accelerate keeps its settings for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(model: nn.Module, data: DataLoader[tuple[Tensor, ...]], accelerator: Accelerator) -> nn.Module:
    """Three lines of a loop with accelerate are changed: progress, labels, loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for step, (x, y) in enumerate(data):
        torch.manual_seed(1 + step)
        fxgraft.set_progress(model, step / len(data))
        out = model(x, target=y)
        accelerator.backward(fxgraft.loss(model, out, y))
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def test_one_process() -> None:
    model = train(patched(), loader(), Accelerator(cpu=True))
    assert_trained(model.state_dict(), by_hand(patched()))


def test_published_labels() -> None:
    """The prepared loader is wrapped; labels and images are those of its batches."""
    accelerator = Accelerator(cpu=True)
    model, data = accelerator.prepare(patched(), loader())
    count = 0
    for x, y in fxgraft.with_targets(data):
        fxgraft.loss(model, model(x), y).backward()
        count += 1
    assert count == BATCHES


def test_a_loader_with_labels_is_sharded_as_the_loader_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes each gets its batches alone, and a method that needs labels says whom to wrap."""
    accelerator = Accelerator(cpu=True)
    labelled = fxgraft.with_targets(DataLoader(dataset(), batch_size=2))
    assert not isinstance(labelled, DataLoader)
    with monkeypatch.context() as several:
        several.setattr(dist, "is_initialized", lambda: True)
        several.setattr(dist, "get_world_size", lambda: WORLD)
        assert isinstance(labelled, DataLoader)
        assert isinstance(labelled, type(fxgraft.with_targets([])))
        assert not isinstance(fxgraft.with_targets([]), DataLoader)
        assert type(accelerator.prepare(labelled)) is not type(labelled)
        shards = [
            prepare_data_loader(labelled, num_processes=WORLD, process_index=rank, put_on_device=False)
            for rank in range(WORLD)
        ]
    seen = [torch.cat([x for x, _ in shard]) for shard in shards]
    assert len(seen[0]) + len(seen[1]) == len(dataset())  # type: ignore[arg-type]
    assert not torch.equal(*seen)
    with pytest.raises(fxgraft.TargetError, match="with the loader that accelerate or Lightning returns"):
        patched()(next(iter(shards[0]))[0])


def test_lower_precision() -> None:
    """accelerate sets a forward on the instance; taken off again, the model can be unpatched."""
    model = train(patched(), loader(), Accelerator(cpu=True, mixed_precision="bf16"))
    assert [graft.name for graft in fxgraft.grafts(model)] == ["rsc"]
    fxgraft.unpatch(model)


class Halves(nn.Module):
    """Without BatchNorm, so that two processes on halves of a batch compute what one does on the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def halves() -> nn.Module:
    torch.manual_seed(0)
    options = {"layer": "conv", "scope": "channel", "batch_share": 1.0}
    return fxgraft.patch(Halves(), "rsc", input_size=SIZE, **options)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # accelerate wants to be told of an address, and then takes the group that is there, which needs none.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    model = train(halves(), DataLoader(dataset(), batch_size=2), accelerator)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    PartialState().destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.sweep
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    expected = by_hand(halves())
    for rank in range(WORLD):
        assert_trained(torch.load(tmp_path / f"{rank}.pt"), expected)
