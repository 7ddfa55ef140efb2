"""CrossNorm and SelfNorm at other positions than the usual one, which is the contract's."""

from __future__ import annotations

import copy

import pytest
import torch

import fxgraft
from models.backbones import Backbone, available
from system.contract.cases import REPRESENTATIVE, bare, batch, reference, same, seeded
from system.contract.expectations import NO_JOIN

FEW = {"timm/resnet18"}


POSITIONS = [
    pytest.param(each.values[0], position, id=f"{each.id}-{position}", marks=marks)
    for index, each in enumerate(available(FEW))
    for position in ([NO_JOIN[each.id]] if each.id in NO_JOIN else ["pre", "residual", "identity"])
    if each.id in (*NO_JOIN, *REPRESENTATIVE) or (position == "pre" and index % 4 == 0)
    for marks in [[*each.marks, *([] if position == "pre" else [pytest.mark.sweep])]]
]


@pytest.mark.parametrize(("backbone", "position"), POSITIONS)
def test_the_other_positions(backbone: Backbone, position: str) -> None:
    """Evaluation starts as the bare model's, training restyles, and everything learns."""
    model = copy.deepcopy(bare(backbone))
    where = {"input_size": backbone.input_size, "position": position}
    fxgraft.patch(model, "crossnorm", p=1.0, active=None, **where)
    fxgraft.patch(model, "selfnorm", init="identity", **where)
    x, y = batch(backbone)
    assert same(seeded(model, x, y, False).out, reference(backbone, False).out)
    trained = seeded(model, x, y, True)
    assert not torch.equal(trained.out, reference(backbone, True).out)
    assert [name for name, gradient in trained.gradients.items() if not gradient.isfinite().all()] == []
    own = {name for name, _ in model.named_parameters() if "graft_" in name}
    assert own
    assert trained.gradients.keys() >= own


@pytest.mark.parametrize("backbone", [each for each in available(FEW) if each.id in REPRESENTATIVE])
def test_the_gates_are_reached(backbone: Backbone) -> None:
    model = copy.deepcopy(bare(backbone))
    fxgraft.patch(model, "selfnorm", init="identity", input_size=backbone.input_size)
    gradients = seeded(model, *batch(backbone), True).gradients
    gates = [n for n, _ in model.named_parameters() if "graft_" in n and n.endswith("norm.bias")]
    # Where the head reads class tokens alone, nothing depends on the positions of the last block.
    assert sum(n in gradients and bool(gradients[n].any()) for n in gates) >= 0.5 * len(gates) > 0
