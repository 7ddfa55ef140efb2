"""Models of one's own, by functions that a recipe may name."""

from __future__ import annotations

from torch import Tensor, nn


class Own(nn.Module):
    """A small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.layer1(x).mean((2, 3))))


class Reads(Own):
    """Reads an attribute that may be there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * getattr(self, "scale", 1.0))


def build(width: int = 4) -> nn.Module:
    return Own(width)


def computing(width: int = 4) -> nn.Module:
    """A constructor that reads values, which cannot be done without memory."""
    model = Own(width)
    assert model.fc.weight.sum().item() < 1e6
    return model


def nothing() -> None:
    return None
