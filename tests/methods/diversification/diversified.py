"""What the tests of the diversification patch share: small networks and batches."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft

CLASSES = 20
NEUTRAL = {"alpha": 1.0}


class Net(nn.Module):
    """Convolution, average pooling, dropout, one linear layer; maps of 8×8 for images of 16×16."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(F.relu(self.conv(x))).flatten(1)))


def net(**options) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options).train()


def small_resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("resnet18", channels=(8, 8, 8, 16), num_classes=CLASSES, output_stride=8)


def images(batch: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=g), torch.randint(CLASSES, (batch,), generator=g)


def patched(model: nn.Module | None = None, **options) -> nn.Module:
    return fxgraft.patch(model or net(), "diversification", input_size=(3, 16, 16), **options)
