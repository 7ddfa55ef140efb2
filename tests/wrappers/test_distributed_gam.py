"""The game in two processes under DDP, against one process on the whole batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxgraft
from fxgraft.patches.gam import patch as gam
from patches.gam.gam_tools import contents, images, patched
from patches.small import net

WORLD = 2


def play(model: nn.Module, original: nn.Module, x_source: Tensor, x_target: Tensor) -> None:
    judges = gam.discriminators(original)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (judges, original)]
    for _ in range(3):
        step = fxgraft.gam_losses(model, x_source, x_target)
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


GAMES = {
    "drift": {"layers": ["layer1", "fc"], "drift": 0.1},
    "head_untapped": {"layers": "layer1", "drift": 0},
}


def game(name: str) -> nn.Module:
    torch.manual_seed(0)
    # Without batch statistics anywhere, so that one process on the whole batch computes the same.
    return patched(net(norm=False), matching=None, hidden=20, **GAMES[name])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for name in GAMES:
            original = game(name)
            model = DistributedDataParallel(original)
            play(model, original, images(8, 1).chunk(WORLD)[rank], images(4, 2).chunk(WORLD)[rank])
            state = {**original.state_dict(), **gam.discriminators(original).state_dict()}
            torch.save(state, f"{folder}/{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_adapt_as_one(tmp_path: Path):
    mp.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    for name in GAMES:
        reference = game(name)
        before = contents(reference)
        play(reference, reference, images(8, 1), images(4, 2))
        expected = {**reference.state_dict(), **gam.discriminators(reference).state_dict()}
        assert torch.equal(reference.fc.weight, before["fc.weight"]) == (name == "head_untapped")
        for rank in range(WORLD):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
