"""Layers of the user's that are called as grafts are, and forwards that are set on instances."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import fxgraft
from fxgraft.graph.tracing.editing import Output
from models.toys import LABELS, Net, Toy, assert_same, images, state_of_everything
from system.faults.lines import INSIDE, SIZE, bare


class Named(Net):
    """Has layers of its own that are called as grafts are."""

    def __init__(self) -> None:
        super().__init__()
        self.graft_own = nn.Conv2d(8, 8, 1)
        self.stage1[0].graft_layer = nn.Linear(2, 2)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stage2(self.down(self.stage1(self.graft_own(self.stem(x)))))


def test_layers_that_are_called_as_grafts_are_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Named().eval()
    bare, keys = model(images()), list(model.state_dict())
    fxgraft.patch(model, "selfnorm", input_size=SIZE)
    fxgraft.patch(model, "rsc", layer="stage1", input_size=SIZE)
    out = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), out)
        assert list(fxgraft.unpatch(twin).state_dict()) == keys
        assert torch.equal(twin(images()), bare)
    fxgraft.save(model, tmp_path)
    assert torch.equal(fxgraft.load(Named().eval(), tmp_path)(images()), out)
    fxgraft.unpatch(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images()), bare)


class Twice(Named):
    """Calls such a layer twice, so that its values are told by their nodes."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.graft_own(self.stem(x))
        return self.stage2(self.down(self.stage1(self.graft_own(x) + x)))


@pytest.mark.parametrize("site", ["graft_own", "graft_own_1", "stage1"])
def test_a_value_of_such_a_layer_is_a_site_like_any(site: str) -> None:
    torch.manual_seed(0)
    model = fxgraft.patch(Twice(), "rsc", layer=site, batch_share=1.0, input_size=(3, 6, 6))
    x = images(size=6)
    out = model(x, target=LABELS)
    fxgraft.loss(model, out, LABELS).backward()
    assert model.graft_own.weight.grad.isfinite().all()
    assert not torch.equal(out, fxgraft.unpatch(model)(x))


def test_such_a_layer_is_part_of_what_drifts() -> None:
    torch.manual_seed(0)
    model = fxgraft.patch(Named(), "gam", layers="stage2", hidden=4, input_size=SIZE)
    fxgraft.patch(model, "selfnorm", input_size=SIZE)
    drifts = []
    for change in (0.0, 1.0):
        with torch.no_grad():
            model.graft_own.weight += change
        torch.manual_seed(0)
        drifts.append(fxgraft.gam.gam_losses(model, images(), images()).parts["drift"].item())
    assert drifts[0] == 0
    assert drifts[1] > 0


def test_a_taken_name_is_refused() -> None:
    model = Named()
    before = state_of_everything(model)
    with pytest.raises(fxgraft.SiteError, match=r"'own' would put its unit where Named has 'graft_own'"):
        fxgraft.patch(model, Toy(at=(("", Output()),), learned=True), name="own")
    assert_same(before, state_of_everything(model))
    assert fxgraft.unpatch(fxgraft.patch(model, Toy(learned=True), name="own_2")) is model


@pytest.mark.parametrize("part", ["", "stage1.0"])
def test_a_forward_set_on_the_instance_afterwards(part: str) -> None:
    model = fxgraft.patch(bare(), INSIDE, name="first")
    module = model.get_submodule(part)
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before, out = state_of_everything(model), model(images())
    for act in (
        fxgraft.unpatch,
        fxgraft.sites,
        copy.deepcopy,
        fxgraft.merge,
        pickle.dumps,
        lambda m: fxgraft.patch(m, Toy(factor=5), name="third"),
    ):
        with pytest.raises(fxgraft.FxgraftError):
            act(model)
        assert_same(before, state_of_everything(model))
    for act in (fxgraft.unpatch, copy.deepcopy):
        with pytest.raises(
            fxgraft.WrappedModelError, match=r"a forward of its own after(?s:.*)del module\.forward"
        ):
            act(model)
    assert torch.equal(model(images()), out)
    module.forward = own  # as accelerate leaves it
    assert torch.equal(copy.deepcopy(model)(images()), out)
    assert torch.equal(fxgraft.unpatch(model)(images()), bare()(images()))
    assert "forward" not in module.__dict__
