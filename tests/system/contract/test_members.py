"""MixMo's members on the backbones of the zoo: all of them learn, and evaluation is their mean."""

from __future__ import annotations

import pytest
import torch

import fxgraft
from system.contract.cases import Cell, batch, cells, evaluated, fresh

# One backbone of each kind of ends.
FEW = (
    "timm/resnet18",
    "timm/fastvit_t8",  # parallel stems
    "timm/deit_tiny_distilled_patch16_224",  # two classifiers
    "timm/davit_tiny",  # padding before the stem
    "timm/dla46x_c",  # a convolution as classifier
)


@pytest.mark.parametrize("cell", cells(lambda cell: cell.method == "mixmo" and cell.works, FEW))
def test_members(cell: Cell) -> None:
    model = cell.patch(fresh(cell.backbone))
    x, y = batch(cell.backbone)
    out = model.train()(x, target=y)
    assert out.shape == (2, *evaluated(model, x).shape)
    fxgraft.loss(model, out, y).backward()
    own = {name: p for name, p in model.named_parameters() if "graft_" in name}
    assert own
    assert [name for name, p in own.items() if not p.grad.any()] == []
    with torch.no_grad():
        for p in own.values():
            p -= 0.05 * p.grad / (p.grad.norm() + 1e-12)
    members = evaluated(model, x, members=True)
    assert not torch.equal(members[0], members[1])
    torch.testing.assert_close(members.mean(0), evaluated(model, x), rtol=1e-4, atol=1e-4)
