"""The source network is the one that was meant, whenever its weights come."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxgraft
from fxgraft.patches.gam import source
from methods.gam.gam_tools import SIZE, contents, images, patched, unchanged
from models.small import net


def trained() -> dict[str, Any]:
    """Weights and statistics that a network has after another training."""
    other = net(seed=7)
    other.layer1[1].running_mean.fill_(0.5)
    return other.state_dict()


def load(model: nn.Module) -> None:
    model.load_state_dict(trained(), strict=False)


def assign(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in trained().items()}, strict=False, assign=True)


def load_backbone(model: nn.Module) -> None:
    fxgraft.load_backbone(model, trained())


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model.train()(images()), torch.arange(6) % 5).backward()
    optimizer.step()


@pytest.mark.parametrize("change", [load, assign, load_backbone, train], ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["at once", "in a copy", "pickled"])
def test_weights_that_come_after_patching_are_the_source(change: Callable[..., None], how: str) -> None:
    model = patched()
    change(model)
    model = {
        "at once": lambda m: m,
        "in a copy": copy.deepcopy,
        "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    }[how](model)
    expected = {k: v for k, v in contents(model).items() if "graft_" not in k}
    step = fxgraft.gam.gam_losses(model, images(), images(seed=2))
    assert step.parts["drift"] == 0
    unchanged(source(model), expected)
    train(model)  # from the first step on the source network stays
    fxgraft.gam.gam_losses(model, images(), images(seed=2))
    unchanged(source(model), expected)


def test_statistics_alone_are_not_another_source() -> None:
    """Those of the target domain may be estimated before the game, on loaded weights too."""
    model = patched()
    load(model)
    expected = contents(net(seed=7))
    expected["layer1.1.running_mean"].fill_(0.5)
    fxgraft.adapt_batchnorm(model, [images(seed=5)])
    model.train()(images())
    fxgraft.gam.gam_losses(model, images(), images())
    unchanged(source(model), expected)


def test_a_given_source_stays() -> None:
    model = patched(source=net(seed=3).requires_grad_(False))
    load(model)
    fxgraft.gam.gam_losses(model, images(), images())
    unchanged(source(model), contents(net(seed=3)))


def test_a_source_of_which_nothing_tells_is_warned_of_once() -> None:
    """Without moments in the network nothing tells a trained network from one that is being adapted."""
    model = patched(matching=None)
    load(model)
    with pytest.warns(
        fxgraft.FxgraftWarning, match="is copied again: it is the model as it is now(.|\n)*source="
    ):
        fxgraft.gam.gam_losses(model, images(), images())
    fxgraft.gam.gam_losses(model, images(), images())
    unchanged(source(model), {**trained()})


def test_an_adaptation_that_goes_on_keeps_the_source_and_says_so() -> None:
    earlier = patched(net(seed=1))
    fxgraft.gam.gam_losses(earlier, images(), images())
    train(earlier)
    model = patched(net(seed=1))
    model.load_state_dict(earlier.state_dict())
    with pytest.warns(fxgraft.FxgraftWarning, match="an adaptation that is under way(.|\n)*as it was when"):
        fxgraft.gam.gam_losses(model, images(), images())
    unchanged(source(model), contents(net(seed=1)))
    known = patched(net(seed=1), source=net(seed=1).requires_grad_(False))
    known.load_state_dict(earlier.state_dict())
    fxgraft.gam.gam_losses(known, images(), images())


@pytest.mark.parametrize("classes", [5, 9])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("layers", [["layer1"], ["layer1", "fc"]], ids=str)
def test_a_layer_that_is_replaced_afterwards(classes: int, begun: bool, layers: list[str]) -> None:
    model = patched(layers=layers)
    assert model.fc.out_features == 5
    if begun:
        fxgraft.gam.gam_losses(model, images(), images())
    model.fc = nn.Linear(model.fc.in_features, classes)
    with pytest.raises(fxgraft.ConfigError, match=r"replaced(.|\n)*Replace layers first, then patch"):
        fxgraft.gam.gam_losses(model, images(), images())
    fxgraft.unpatch(model)
    patched(model, layers=layers)
    assert fxgraft.gam.gam_losses(model, images(), images()).parts["drift"] == 0


def test_a_step_that_fails_has_not_begun() -> None:
    model = patched()
    with pytest.raises(RuntimeError):
        fxgraft.gam.gam_losses(model, images(), images()[:, :2])
    load(model)
    fxgraft.gam.gam_losses(model, images(), images())
    unchanged(source(model), {**trained()})


def test_dry_runs_and_other_grafts_leave_it_alone() -> None:
    model = patched()
    load(model)
    fxgraft.patch(model, "rsc", layer="layer1", input_size=SIZE, dry_run=True)
    fxgraft.patch(model, "crossnorm", position="norm", input_size=SIZE)
    assert fxgraft.gam.gam_losses(model.eval(), images(), images()).parts["drift"] == 0
