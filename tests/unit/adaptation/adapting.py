"""A small game of activation matching, for the tests of the loop and of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxgraft
from fxgraft.patches.gam import step as gam

SOURCE = torch.randn(14, 3, 6, 6, generator=torch.Generator().manual_seed(1))
TARGET = 2 * torch.randn(11, 3, 6, 6, generator=torch.Generator().manual_seed(2)) + 1


class Net(nn.Module):
    """Statistics, dropout and two taps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(self.bn(self.conv(x)).relu()).flatten(1)))


def network(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    options = {
        "layers": ["bn", "fc"],
        "hidden": 8,
        "matching": "gaussian",
        "statistics": "running",
        **options,
    }
    return fxgraft.patch(Net(), "gam", input_size=(3, 6, 6), **options)


def loaders(batch: int = 4, **options: Any) -> list[DataLoader[Any]]:
    return [
        DataLoader(
            TensorDataset(images, torch.zeros(len(images))), batch, shuffle=True, drop_last=True, **options
        )
        for images in (SOURCE, TARGET)
    ]


def with_generators() -> list[DataLoader[Any]]:
    made = loaders()
    for seed, loader in enumerate(made):
        loader.generator = loader.sampler.generator = torch.Generator().manual_seed(seed)
    return made


def everything(model: nn.Module, optimizers: Any = ()) -> list[Tensor]:
    """All that a run changes."""
    held = [*model.state_dict().values(), *gam.discriminators(model).state_dict().values()]
    for optimizer in optimizers:
        for state in optimizer.state_dict()["state"].values():
            held += [torch.as_tensor(value) for value in state.values() if value is not None]
    return [each.clone() for each in held]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def adam(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    players = gam.discriminators(model)
    return torch.optim.Adam(players.parameters(), 1e-2), torch.optim.Adam(model.parameters(), 1e-2)


def adapted(folder: Path, steps: int) -> list[Any]:
    """Adapt with a checkpoint after every step, or go on from one; return all that the run ends with."""
    model = network()
    pair = adam(model)
    loaders = with_generators()
    fxgraft.adapt(model, *loaders, steps=steps, optimizers=pair, checkpoint=folder, checkpoint_every=1)
    return everything(model, pair)
