"""The head rewrite on every backbone of the zoo: at α = 1 it is the bare head, or it is named here."""

from __future__ import annotations

import copy

import pytest
import torch

import fxgraft
from fxgraft.patches.diversification import maps
from models.backbones import BACKBONES
from system.contract.cases import Cell, batch, cells, evaluated, fresh

# An activation stands between pooling and classifier: training and evaluation heads differ, and the summary says so.
DIFFERENT = {
    "timm/cpubone_nano",
    "timm/efficientvit_b0",
    "timm/fasternet_t0",
    "timm/ghostnet_050",
    "timm/hardcorenas_a",
    "timm/hgnetv2_b0",
    "timm/inception_next_atto",
    "timm/lcnetv2_small",
    "timm/lowformer_b0",
    "timm/mobilenetv3_small_050",
    "timm/repghostnet_050",
    "timm/test_mambaout",
    "torchvision/MaxVit",
    "torchvision/mobilenet_v3_small",
}

# One backbone of each kind of head runs in every test run; the sweep runs all of them.
FEW = (
    "timm/dla46x_c",
    "timm/efficientvit_m0",
    "timm/mobilenetv3_small_050",
    "timm/swiftformer_xs",
    "torchvision/squeezenet1_1",
)


def test_the_list_names_backbones_of_the_zoo() -> None:
    assert {backbone.name for backbone in BACKBONES} >= DIFFERENT


@pytest.mark.parametrize("cell", cells(lambda cell: cell.method == "diversification" and cell.works, FEW))
def test_head_rewrite(cell: Cell) -> None:
    """At α = 1 the training head is the bare one, or it is listed above and the summary says so."""
    x, _ = batch(cell.backbone)
    model = cell.patch(fresh(cell.backbone), cell.options(alpha=1.0)).train()
    bare = fxgraft.unpatch(copy.deepcopy(model))
    different = cell.backbone.name in DIFFERENT
    assert ("heads of training and evaluation differ" in str(fxgraft.summary(model))) == different
    with torch.no_grad():
        outs = []
        for each in (bare, model):
            torch.manual_seed(0)
            outs.append(each(x))
        expected, got = outs
        assert got.shape == expected.shape
        if different:
            return
        close = {"rtol": 0, "atol": 2e-5 * expected.abs().max().item()}
        torch.testing.assert_close(got, expected, **close)
        torch.testing.assert_close(
            dict(model.named_buffers()), dict(bare.named_buffers()), rtol=1e-4, atol=1e-5
        )
        found, logits = maps(model, x), evaluated(model, x)
    assert found.shape[:2] == logits.shape
    close = {"rtol": 0, "atol": 2e-5 * logits.abs().max().item()}
    torch.testing.assert_close(found.mean((2, 3)), logits, **close)
