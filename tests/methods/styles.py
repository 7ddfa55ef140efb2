"""CrossNorm and SelfNorm by hand, as the release writes them, and networks that have them in their forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.published import places


def moments(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel of every map."""
    size, channels = x.shape[:2]
    flat = x.reshape(size, channels, -1)
    mean, std = flat.mean(2), (flat.var(2) + eps).sqrt()
    return mean.reshape(size, channels, 1, 1), std.reshape(size, channels, 1, 1)


def box(height: int, width: int) -> tuple[slice, slice]:
    """A box whose share of the map is uniform, drawn again until a tenth of the map or less is exceeded."""
    shares, centres = torch.rand(64).tolist(), torch.rand(64, 2).tolist()
    for share, (row, column) in zip(shares, centres, strict=True):
        tall, wide = int(height * share**0.5) // 2, int(width * share**0.5) // 2
        y, x = int(row * height), int(column * width)
        top, bottom = max(y - tall, 0), min(y + tall, height)
        left, right = max(x - wide, 0), min(x + wide, width)
        area = (bottom - top) * (right - left)
        if area > 0.1 * height * width and area > 1:
            return slice(top, bottom), slice(left, right)
    raise AssertionError("64 draws were not enough, choose another seed")


def restyled(x: Tensor, crop: str) -> Tensor:
    """CrossNorm of a batch: statistics of another image, from a box or for a box."""
    partner = x[torch.randperm(x.shape[0])]
    inside = box(x.shape[2], x.shape[3]) if crop in ("content", "both") else (slice(None), slice(None))
    if crop in ("style", "both"):
        rows, columns = box(x.shape[2], x.shape[3])
        partner = partner[:, :, rows, columns]
    style_mean, style_std = moments(partner)
    content = x[:, :, inside[0], inside[1]]
    mean, std = moments(content)
    mask, padded = torch.zeros_like(x), torch.zeros_like(x)
    mask[:, :, inside[0], inside[1]] = 1
    padded[:, :, inside[0], inside[1]] = (content - mean) / std * style_std + style_mean
    return x * (1 - mask) + padded


class Gate(nn.Module):
    """A convolution of each channel's mean and deviation, and its normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv1d(channels, channels, 2, groups=channels, bias=False)
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, statistics: Tensor) -> Tensor:
        return torch.sigmoid(self.bn(self.fc(statistics)))[..., None]


def statistics(x: Tensor) -> Tensor:
    """What a gate looks at: (B, C, 2)."""
    return torch.stack([each.flatten(1) for each in moments(x, 1e-12)], 2)


def agree(*logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence."""
    chances = [each.softmax(1) for each in logits]
    mixture = (sum(chances) / len(chances)).clamp(1e-7, 1).log()
    return sum(F.kl_div(mixture, each, reduction="batchmean") for each in chances) / len(chances)


class Typed(nn.Module):
    """A network with both units written into its forward: CrossNorm at one place of every block, SelfNorm at another.

    Args:
        network: of `networks`, with the weights to start from.
        styled: the place of CrossNorm, None for no CrossNorm.
        gated: the place of SelfNorm, None for no SelfNorm.
        gates: one for every block, for SelfNorm.
        active: how many CrossNorm units are on, where any are.
        crop: see `restyled`.
    """

    def __init__(
        self,
        network: nn.Module,
        styled: str | None = None,
        gated: str | None = None,
        gates: Sequence[nn.Module] = (),
        active: int = 1,
        crop: str = "neither",
    ) -> None:
        super().__init__()
        self.network, self.gates = copy.deepcopy(network), nn.ModuleList(gates)
        self.styled, self.gated, self.active, self.crop = styled, gated, active, crop
        self.on: set[int] = set()
        self.seen: dict[str, int] = {}
        for each in places(self.network):
            each.unit = self.unit

    def unit(self, place: str, x: Tensor) -> Tensor:
        index = self.seen[place] = self.seen.get(place, -1) + 1
        if place == self.styled and index in self.on:
            x = restyled(x, self.crop)
        return x * self.gates[index](statistics(x)) if place == self.gated else x

    def forward(self, x: Tensor, chance: float = 0.0) -> Tensor:
        """A pass that has CrossNorm on with a probability."""
        self.seen.clear()
        self.on = set()
        if chance == 1 or (chance > 0 and bool(torch.rand(()) < chance)):
            count = 1 if self.styled == "input" else sum(1 for _ in places(self.network))
            self.on = set(torch.randperm(count)[: self.active].tolist())
        if self.styled == "input" and self.on:
            x = restyled(x, self.crop)
        return self.network(x)
