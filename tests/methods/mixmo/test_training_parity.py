"""MixMo's training (Ramé, Sun, Cord, ICCV 2021): five steps of the release's configurations, and what they evaluate to.

The release adds 3e-4 · Σ p² over all parameters to its loss. Its gradient is that of a weight decay of 6e-4, which is
what the patched network is trained with.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from methods.releases import TOLERANCE, Typed, batch, deviation, stepping, stock

CLASSES, SIZE, PIXELS, REPEATED, L2 = 6, 4, 64, 2, 3e-4
SGD = {"lr": 0.0125, "momentum": 0.9, "nesterov": True}
EPOCHS = 300
PROGRESS = (0.0, 0.3, 0.6, 0.9, 0.95)
"""Of the training, before each step: the last is in the twelfth where the probability falls."""


def boxes(share: Tensor, height: int, width: int) -> Tensor:
    """CutMix's box for every sample: ones inside."""
    rows, columns = torch.rand(2, len(share))
    masks = torch.zeros(len(share), 1, height, width, dtype=torch.float64)
    for mask, area, row, column in zip(masks, share.tolist(), rows.tolist(), columns.tolist(), strict=True):
        tall, wide = int(height * area**0.5) // 2, int(width * area**0.5) // 2
        y, x = int(row * height), int(column * width)
        mask[0, max(y - tall, 0) : min(y + tall, height), max(x - wide, 0) : min(x + wide, width)] = 1
    return masks


class Release(Typed):
    """The network with two first and two last layers."""

    def __init__(self, network: nn.Module, mixing: str, root: float) -> None:
        super().__init__(network)
        self.mixing, self.root = mixing, root
        self.second_conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.second_fc = nn.Linear(self.fc.in_features, CLASSES)
        self.double()
        self.chance = 0.5
        self.cut: list[bool] = []

    def masks(self, rows: int, height: int, width: int) -> Tensor:
        """What the first member has of every position, (rows, 1, H or 1, W or 1)."""
        kappa = torch.distributions.Dirichlet(torch.full((rows, 2), 2.0, dtype=torch.float64)).sample()[:, 0]
        if self.mixing == "sum":
            return torch.full((rows, 1, 1, 1), 0.5, dtype=torch.float64)
        self.cut.append(self.mixing == "cut" and bool(torch.rand(()) < self.chance))
        if not self.cut[-1]:
            return kappa[:, None, None, None]
        first = boxes(kappa, height, width)
        swapped = int(torch.rand(2).argsort()[0]) == 1
        return 1 - first if swapped else first

    def stem(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.conv1(x) + self.second_conv(x)
        first, second = self.conv1(x), self.second_conv(x[self.order])
        mask = self.masks(len(x), *first.shape[2:])
        self.share = mask.mean((1, 2, 3))
        return 2 * (mask * first + (1 - mask) * second)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(x).mean((2, 3))
        return (self.fc(pooled) + self.second_fc(pooled)) / 2

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.repeat(REPEATED, 1, 1, 1), y.repeat(REPEATED)
        self.order = torch.rand(1, len(x)).argsort(1)[0]
        pooled = self.features(x).mean((2, 3))
        roots = torch.stack((self.share, 1 - self.share)) ** (1 / self.root)
        weights = 2 * roots / roots.sum(0)
        total = torch.zeros((), dtype=torch.float64)
        for head, labels, weight in zip((self.fc, self.second_fc), (y, y[self.order]), weights, strict=True):
            target = F.one_hot(labels, CLASSES) * weight[:, None]
            total = total - (target * head(pooled).log_softmax(1)).sum(1).mean()
        return total

    def named(self) -> dict[str, Tensor]:
        """The state under the names that the patched network has for it."""
        found = {}
        for key, value in self.state_dict().items():
            layer, _, name = key.removeprefix("second_").rpartition(".")
            found[f"{layer.replace('conv', 'conv1')}.graft_mixmo.{name}_1" if "second" in key else key] = (
                value
            )
        return found


@pytest.mark.parametrize("preset", ["cifar_linear", "cifar_cut", "cifar_mimo"])
def test_five_steps_of_the_release(preset: str) -> None:
    model = stock(CLASSES)
    mixing, root = {"linear": ("linear", 3), "cut": ("cut", 3), "mimo": ("sum", 1)}[preset.split("_")[1]]
    reference = Release(stock(CLASSES), mixing, root)
    fxgraft.patch(model, "mixmo", preset=preset, repetitions=REPEATED, input_size=(3, PIXELS, PIXELS))
    with torch.no_grad():
        started = model.state_dict()
        for key, value in reference.named().items():
            value.copy_(started[key])

    def ours(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        fxgraft.set_progress(model, PROGRESS[step])
        return fxgraft.loss(model, model(x, target=y), y)

    def theirs(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        epoch = int(PROGRESS[step] * EPOCHS) + 1  # the release counts from 1
        reference.chance = 0.5 * min(1.0, 12 * (1 - epoch / EPOCHS))
        optimiser.zero_grad()
        loss = reference.loss(x, y)
        (loss + L2 * sum(p.square().sum() for p in reference.parameters())).backward()
        optimiser.step()
        return loss

    optimiser = torch.optim.SGD(reference.parameters(), **SGD)
    worst = deviation(
        stepping(ours, torch.optim.SGD(model.parameters(), weight_decay=2 * L2, **SGD)),
        theirs,
        (model.state_dict, reference.named),
    )
    assert worst < TOLERANCE
    assert mixing != "cut" or set(reference.cut) == {True, False}
    x, _ = batch(9, SIZE, PIXELS, CLASSES)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=0, atol=TOLERANCE)
