"""MixMo's stems beside the plain convolution: standardised weights, and several of different sizes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.mixmo.masks import BY_CHANNEL, MIXINGS
from fxgraft.patches.mixmo.patch import Encoders
from methods.mixmo.mixing import last_pairing, patched, trained, unit
from models.small import CLASSES, batch, net


class Standardised(nn.Module):
    """Starts with scaled weight standardisation."""

    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem, self.fc = kind(3, 8, 3, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x).relu().mean((2, 3)))


class TwoSizes(nn.Module):
    """Takes in the image twice, in positions of two pixels and of three."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(3, 8, 3, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fine(x).relu().mean((2, 3)) + self.coarse(x).relu().mean((2, 3)))


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("kind", [ScaledStdConv2d, ScaledStdConv2dSame])
def test_standardised_weights_fold(kind: type[nn.Conv2d], init: Any) -> None:
    model, (x, _) = Standardised(kind), batch()
    bare = model.eval()(x)
    fxgraft.patch(model, "mixmo", init=init)
    assert torch.equal(model.eval()(x), bare) == (init == "pretrained")
    model = trained(model).eval()
    members = model(x, members=True)
    assert not torch.equal(members[0], members[1])
    assert "stem.graft_mixmo.gain_1" in dict(model.named_parameters())
    merged = fxgraft.merge(model)
    fresh = Standardised(kind)
    fresh.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(fresh.eval()(x), model(x))


def test_members_of_standardised_weights_lie_apart_and_their_mean_is_the_stock_weight() -> None:
    model = fxgraft.patch(Standardised(ScaledStdConv2d), "mixmo", spread=0.2)
    encoders = unit(model, Encoders)
    (first, _), (second, _) = encoders.spread_out(model.stem)
    weight, _ = encoders.folded(model.stem)
    torch.testing.assert_close((first + second) / 2, weight)
    share = (first - second).norm() / 2 / weight.norm()
    assert share.item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("mixing", [each for each in MIXINGS if each not in BY_CHANNEL])
def test_stems_of_two_sizes_show_a_member_in_the_same_place(mixing: Any) -> None:
    model = fxgraft.patch(TwoSizes(), "mixmo", mixing=mixing, p=1.0).train()
    x, y = batch()
    fxgraft.loss(model, model(x, target=y), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    pairing = last_pairing(model)
    fine, coarse = (
        pairing.masks_for(torch.empty(len(x), 8, 24 // side, 24 // side))
        .expand(2, len(x), 1, 24 // side, 24 // side)
        .repeat_interleave(side, -1)
        .repeat_interleave(side, -2)
        for side in (2, 3)
    )
    torch.testing.assert_close(coarse.sum(0), torch.ones_like(coarse[0]))
    # Of six pixels, which are three fine positions and two coarse ones, the outer are of neighbours.
    rows = torch.arange(24) % 6
    outer = (rows == 0) | (rows == 5)
    torch.testing.assert_close(fine[..., outer, :][..., outer], coarse[..., outer, :][..., outer])


def test_evaluation_of_two_sizes() -> None:
    model, (x, _) = TwoSizes(), batch()
    bare = model.eval()(x)
    fxgraft.patch(model, "mixmo")
    assert torch.equal(model.eval()(x), bare)
    model = trained(model).eval()
    torch.testing.assert_close(fxgraft.merge(model).eval()(x), model(x))


def test_a_weight_that_is_made_in_the_call_has_no_members() -> None:
    model = net()
    nn.utils.spectral_norm(model.fc)
    with pytest.raises(
        fxgraft.StructureError, match=r"classifier 'fc' .* makes its weight from other parameters"
    ):
        patched(model)
    model = patched().train()
    nn.utils.spectral_norm(model.fc)
    x, y = batch()
    with pytest.raises(
        fxgraft.StructureError, match=r"classifier 'fc' .* makes its weight from other parameters"
    ):
        model(x, target=y)


def test_a_weight_that_others_share_is_not_folded() -> None:
    model = net()
    model.other = nn.Linear(*model.fc.weight.shape[::-1])
    model.other.weight = model.fc.weight
    patched(model)
    with pytest.raises(fxgraft.MergeError, match="'fc' shares its weight with 'other'"):
        fxgraft.merge(model)


def test_new_members_of_a_new_layer_are_announced() -> None:
    model = patched().train()
    model.fc = nn.Linear(model.fc.in_features, CLASSES + 2)
    x, y = batch()
    with pytest.warns(fxgraft.FxgraftWarning, match="optimiser that was built before does not train that"):
        model(x, target=y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, target=y)


def test_what_is_saved_before_the_next_pass_fits(tmp_path: Path) -> None:
    model, new = patched(), net()
    for each in (model, new):
        each.fc = nn.Linear(each.fc.in_features, CLASSES + 2)
    with pytest.warns(fxgraft.FxgraftWarning, match="Lost are fc.graft_mixmo"):
        fxgraft.save(model.eval(), tmp_path)
    x, _ = batch()
    assert torch.equal(fxgraft.load(new, tmp_path).eval()(x), model.eval()(x))
