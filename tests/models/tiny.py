"""A network, and images with labels, so small that a training of another library's takes no time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fxgraft
from models.toys import LABELS, Net, images

SIZE = (3, 16, 16)
BATCHES = 2


def patched(method: str = "rsc", **options: object) -> nn.Module:
    """The network with a method that needs labels, by default RSC on every sample."""
    torch.manual_seed(0)
    options = options or ({"batch_share": 1.0} if method == "rsc" else {})
    return fxgraft.patch(Net(), method, input_size=SIZE, **options)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(size=SIZE[1], seed=seed), LABELS) for seed in range(BATCHES)]


def dataset() -> Dataset[tuple[Tensor, ...]]:
    x, y = (torch.cat(each) for each in zip(*batches(), strict=True))
    return TensorDataset(x, y)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """The batches, in order."""
    return DataLoader(dataset(), batch_size=len(LABELS))


def by_hand(model: nn.Module, epochs: int = 1) -> dict[str, Tensor]:
    """What the weights are after the training that every client is to do."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(epochs):
        for step, (x, y) in enumerate(batches()):
            torch.manual_seed(1 + epoch * BATCHES + step)
            fxgraft.set_progress(model, (epoch + step / BATCHES) / epochs)
            fxgraft.loss(model, model(x, target=y), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def assert_trained(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare weights and buffers, after training."""
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-5, atol=1e-6)
