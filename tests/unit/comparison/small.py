"""The network that comparisons of a few steps train."""

from __future__ import annotations

import torch
from torch import nn


class Small(nn.Module):
    """A convolution, a norm, average pooling and a classifier."""

    def __init__(self, num_classes: int, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes)."""
        return self.fc(self.pool(self.act(self.norm(self.stem(x)))).flatten(1))
