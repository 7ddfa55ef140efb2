"""SelfNorm's training (Tang, Gao, Zhu, Zhang, Li, Metaxas, ICCV 2021): five steps from the release's own start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from methods.releases import TOLERANCE, WIDTHS, Typed, batch, deviation, stepping, stock
from methods.styles import Gate, moments, statistics

CLASSES, SIZE, PIXELS = 5, 5, 96
OTHER = pytest.mark.filterwarnings("ignore:The preset .* was published for:fxgraft.FxgraftWarning")
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


class Release(Typed):
    """The network with a SelfNorm at the end of every block."""

    def __init__(self, network: nn.Module, gates: int) -> None:
        super().__init__(network)
        names = ("g", "f")[:gates]
        self.gates = nn.ModuleList(nn.ModuleDict({n: Gate(width) for n in names}) for width in WIDTHS)
        self.double()

    def post(self, index: int, x: Tensor) -> Tensor:
        looked_at = statistics(x)
        gates: Any = self.gates[index]
        g = gates["g"](looked_at)
        if "f" not in gates:
            return x * g
        return x * g + moments(x)[0] * (gates["f"](looked_at) - g)

    def named(self) -> dict[str, Tensor]:
        """The state under the names that the patched network has for it."""
        found: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            if not key.startswith("gates."):
                found[key] = value
                continue
            _, index, gate, kind, name = key.split(".")
            unit = f"layer{int(index) + 1}.0.graft_selfnorm.{gate}"
            if kind == "fc":
                found[f"{unit}.mean_weight"], found[f"{unit}.std_weight"] = value[:, 0].unbind(1)
            else:
                found[f"{unit}.norm.{name}"] = value
        return found


@OTHER
@pytest.mark.parametrize("gates", [1, 2])
def test_five_steps_of_the_release(gates: int) -> None:
    model, reference = stock(CLASSES), Release(stock(CLASSES), gates)
    fxgraft.patch(model, "selfnorm", preset="cifar100_wrn", gates=gates, input_size=(3, PIXELS, PIXELS))
    with torch.no_grad():
        started = model.state_dict()
        for key, value in reference.named().items():
            value.copy_(started[key])

    def ours(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return fxgraft.loss(model, model(x), y)

    def theirs(step: int) -> Tensor:
        x, y = batch(step, SIZE, PIXELS, CLASSES)
        return F.cross_entropy(reference(x), y)

    worst = deviation(
        stepping(ours, torch.optim.SGD(model.parameters(), **SGD)),
        stepping(theirs, torch.optim.SGD(reference.parameters(), **SGD)),
        (model.state_dict, reference.named),
    )
    assert worst < TOLERANCE
