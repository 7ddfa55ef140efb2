"""RSC's training on domains (Huang, Wang, Xing, Huang, ECCV 2020): five steps of the release's PACS script."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fxgraft
from methods.releases import STEPS, TOLERANCE, Typed, batch, deviation, stepping, stock

CLASSES, EPOCHS = 7, 40
EPOCH = (0, 9, 10, 20, 35)
"""The epoch that each step is in: the share of the batch grows to 0.9, where the least change decides who is muted."""
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


class Release(Typed):
    """The network with RSC in its forward pass."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__(network)
        self.scopes: list[str] = []

    def challenged(self, x: Tensor, y: Tensor, epoch: int) -> Tensor:
        x = self.features(x)
        size, channels, height, width = x.shape
        cells = height * width
        z = x.detach().clone().requires_grad_()
        one_hot = F.one_hot(y, CLASSES).double()
        before = F.linear(z.mean((2, 3)), self.fc.weight.detach(), self.fc.bias.detach())
        (gradient,) = torch.autograd.grad((before * one_hot).sum(), z)
        z = z.detach()
        per_channel = gradient.reshape(size, channels, cells).mean(2)
        spatial = bool(torch.rand(()) < 0.5)
        self.scopes.append("spatial" if spatial else "channel")
        if spatial:
            score = (per_channel[:, :, None, None] * z).sum(1).reshape(size, cells)
            count = -(-cells // 3)
        else:
            score = per_channel
            count = -(-channels * 10 // 32)
        threshold = score.sort(1, descending=True)[0][:, count]
        mask = torch.where(score > threshold[:, None], 0.0, 1.0).double()
        mask = mask.reshape(size, 1, height, width) if spatial else mask.reshape(size, channels, 1, 1)
        with torch.no_grad():
            after = self.fc((z * mask).mean((2, 3)))
            was, became = ((each.softmax(1) * one_hot).sum(1) for each in (before, after))
            change = (was - became - 0.0001).clamp(min=0)
            least = change.sort(descending=True)[0][round(size * (0.3 + 0.2 * (epoch // 10)))]
            mask[change <= least] = 1
        return self.fc((x * mask).mean((2, 3)))


def flipped(step: int) -> tuple[Tensor, Tensor]:
    """A batch and its horizontal flip, one behind the other."""
    x, y = batch(step, 4, 128, CLASSES)
    return torch.cat((x, x.flip(-1))), torch.cat((y, y))


def test_five_steps_of_the_release() -> None:
    model, reference = stock(CLASSES), Release(stock(CLASSES))
    fxgraft.patch(model, "rsc", preset="pacs", epochs=EPOCHS, input_size=(3, 128, 128))

    def ours(step: int) -> Tensor:
        x, y = flipped(step)
        fxgraft.set_progress(model, EPOCH[step] / EPOCHS)
        return fxgraft.loss(model, model(x, target=y), y)

    def theirs(step: int) -> Tensor:
        x, y = flipped(step)
        return F.cross_entropy(reference.challenged(x, y, EPOCH[step]), y)

    worst = deviation(
        stepping(ours, torch.optim.SGD(model.parameters(), **SGD)),
        stepping(theirs, torch.optim.SGD(reference.parameters(), **SGD)),
        (model.state_dict, reference.state_dict),
    )
    assert worst < TOLERANCE
    assert set(reference.scopes) == {"spatial", "channel"}
    assert len(reference.scopes) == STEPS
