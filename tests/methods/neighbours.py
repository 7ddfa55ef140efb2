"""The numbers of the releases of MixStyle, EFDMix and DSU, and networks with these in their forward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_data import GOLDEN
from methods.releases import TOLERANCE, Step, Typed, batch, deviation, stepping

CASES = {"mixstyle": 1e-6, "efdmix": 1e-6, "dsu": 1e-5}
"""Tolerance of each file in float32."""


def arrays(file: str, case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What was put into one call of a release, what it drew, and what came out."""
    with np.load(GOLDEN / f"neighbours_{file}.npz", allow_pickle=False) as archive:
        found = {key.partition(".")[2]: archive[key] for key in archive.files if key.startswith(f"{case}.")}
    tensors = {key: torch.from_numpy(value) for key, value in found.items()}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def check(case: dict[str, Tensor], function: Callable[[Tensor], Tensor], tolerance: float) -> None:
    """Compare a function's output and its gradient with the release's."""
    x = case["x"].requires_grad_()
    y = function(x)
    y.backward(case["cot"])
    assert x.grad is not None
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.detach(), case["y"], rtol=0, atol=tolerance * case["y"].abs().max().item())
    scale = case["grad_x"].abs().max().item()
    torch.testing.assert_close(x.grad, case["grad_x"], rtol=0, atol=tolerance * scale)


class Release(Typed):
    """The network with a change behind its stages, where a release has it; the first two of six are in the stem.

    Args:
        network: of timm, whose weights it takes.
        change: of a map.
        at: numbers of the places: 0 behind the first convolution, 1 behind the pooling, 2 to 5 behind the stages.
        p: probability of a change, drawn for each.
    """

    def __init__(self, network: nn.Module, change: Callable[[Tensor], Tensor], at: tuple[int, ...], p: float):
        super().__init__(network)
        self.change, self.at, self.p = change, at, p
        self.changed: list[bool] = []

    def act(self, place: int, x: Tensor) -> Tensor:
        if place not in self.at:
            return x
        self.changed.append(torch.rand(()).item() < self.p)
        return self.change(x) if self.changed[-1] else x

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.act(0, self.conv1(x)))), 3, 2, 1)
        x = self.act(1, x)
        for index in range(4):
            x = self.act(index + 2, F.relu(getattr(self, f"layer{index + 1}")[0](x)))
        return x


def check_training(model: nn.Module, ours: Step, reference: Release, sizes: tuple[int, int, int]) -> None:
    """Compare five steps of training with the release's; in them a change was drawn, and none was.

    Args:
        model: patched.
        ours: its step.
        reference: the release's network.
        sizes: of the batches, see `batch`.
    """

    def theirs(step: int) -> Tensor:
        x, y = batch(step, *sizes)
        return F.cross_entropy(reference(x), y)

    found = deviation(
        stepping(ours, torch.optim.SGD(model.parameters(), 0.01, 0.9)),
        stepping(theirs, torch.optim.SGD(reference.parameters(), 0.01, 0.9)),
        (model.state_dict, reference.state_dict),
    )
    assert found < TOLERANCE
    assert set(reference.changed) == {True, False}
