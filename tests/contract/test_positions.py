"""CrossNorm and SelfNorm at the other positions of residual blocks; the default one is the contract's."""

from __future__ import annotations

import copy

import pytest
import torch

import fxgraft
from contract.cases import REPRESENTATIVE, bare, batch, reference, same, seeded
from contract.expectations import EXPECTED
from zoo.backbones import Backbone, available

NO_JOIN = EXPECTED["selfnorm"].refusals
FEW = {"timm/resnet18"}


POSITIONS = [
    pytest.param(each.values[0], position, id=f"{each.id}-{position}", marks=marks)
    for each in available(FEW)
    if each.id not in NO_JOIN
    for position in ("pre", "residual", "identity")
    if position == "pre" or each.id in REPRESENTATIVE
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
    instead = NO_JOIN[backbone.name].instead if backbone.name in NO_JOIN else {}
    fxgraft.patch(model, "selfnorm", init="identity", input_size=backbone.input_size, **(instead or {}))
    gradients = seeded(model, *batch(backbone), True).gradients
    reached = [n for n, g in gradients.items() if "graft_" in n and n.endswith("norm.bias") and g.any()]
    # Where the head reads class tokens alone, nothing depends on the positions of the last block.
    assert len(reached) >= 0.5 * len(fxgraft.grafts(model)[0].units)
