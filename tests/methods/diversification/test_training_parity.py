"""Diversification block and gradient-boosting loss (Sun, Cholakkal, Khan, Khan, Shao, AAAI 2020): five steps of both.

The method of the paper's 87.7 is the two together. There is no release of the authors; the details are those of the
public re-implementation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fxgraft
from methods.releases import TOLERANCE, Typed, batch, deviation, stepping, stock

CLASSES, SIZE, PIXELS = 24, 3, 200
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
ALPHA, PATCH, HARDEST = 0.1, 3, 15


class Paper(Typed):
    """The network with 1×1 convolution and damping in place of its head."""

    def diversified(self, x: Tensor) -> Tensor:
        maps = F.conv2d(self.features(x), self.fc.weight[:, :, None, None], self.fc.bias)
        size, classes, height, width = maps.shape
        rows, columns = height // PATCH, width // PATCH
        assert (rows, columns) == (2, 2)
        assert height % PATCH == 1, "a border that no patch covers belongs to the test"
        peak_drawn = torch.rand(size, classes) < 0.5
        patch_drawn = torch.rand(size, classes, rows, columns) < 0.5
        factor = torch.ones_like(maps)
        for image in range(size):
            for k in range(classes):
                each = factor[image, k]
                for row in range(rows):
                    for column in range(columns):
                        if patch_drawn[image, k, row, column]:
                            top, left = row * PATCH, column * PATCH
                            each[top : top + PATCH, left : left + PATCH] = ALPHA
                peak = divmod(int(maps[image, k].argmax()), width)
                each[peak] = ALPHA if peak_drawn[image, k] else 1.0
        return F.adaptive_avg_pool2d(maps * factor, 1).flatten(1)


def boosting(logits: Tensor, y: Tensor) -> Tensor:
    """−s_y + log(e^{s_y} + Σ e^{s_i}) over the highest-scoring wrong classes i, averaged over the batch."""
    total = logits.new_zeros(())
    for scores, label in zip(logits, y.tolist(), strict=True):
        wrong = torch.cat((scores[:label], scores[label + 1 :])).sort(descending=True)[0][:HARDEST]
        total = total - scores[label] + (scores[label].exp() + wrong.exp().sum()).log()
    return total / len(logits)


def test_five_steps_of_block_and_loss() -> None:
    model, reference = stock(CLASSES), Paper(stock(CLASSES))
    fxgraft.patch(model, "diversification", preset="paper", input_size=(3, PIXELS, PIXELS))

    def ours(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return fxgraft.loss(model, model(x), y)

    def theirs(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return boosting(reference.diversified(x), y)

    worst = deviation(
        stepping(ours, torch.optim.SGD(model.parameters(), **SGD)),
        stepping(theirs, torch.optim.SGD(reference.parameters(), **SGD)),
        (model.state_dict, reference.state_dict),
    )
    assert worst < TOLERANCE
