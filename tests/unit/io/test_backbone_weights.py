"""Checkpoints of bare models in patched ones, and what loads into what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import RecipeError
from models.toys import Net, assert_same, images, net, state_of_everything

SIZE = (3, 8, 8)
METHODS: dict[str, dict[str, Any]] = {
    "rsc": {"layer": "stage2"},
    "crossnorm": {},
    "selfnorm": {},
    "mixmo": {"members": 3},
    "taps": {"layers": ["stage1", "stage2"]},
    "diversification": {},
    "gam": {"layers": ["stage2", "fc"]},
}


def other() -> dict[str, Tensor]:
    """Weights of another network of the same kind."""
    torch.manual_seed(5)
    return Net().state_dict()


@pytest.mark.parametrize("given", ["weights.pt", None, [1]])
def test_what_is_no_state_dict_is_refused(given: Any) -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    with pytest.raises(
        RecipeError, match=r"takes a state dict, got a (?s:.*)torch.load\(path, weights_only=True"
    ):
        fxgraft.load_backbone(model, given)


def moved(model: nn.Module) -> nn.Module:
    """Change every tensor that a graft has added."""
    with torch.no_grad():
        for graft in fxgraft.grafts(model):
            for parameter in graft.parameters():
                parameter.add_(1)
    return model


def grafted(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "graft_" in key}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_stock_weights_are_taken_up_and_own_ones_stay(method: str, wrapped: bool) -> None:
    model = moved(fxgraft.patch(net(), method, input_size=SIZE, **METHODS[method]))
    before, weights = grafted(model), other()
    outside = nn.DataParallel(model) if wrapped else model
    assert fxgraft.load_backbone(outside, weights) is outside
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in weights.items())
    if method != "mixmo":
        assert grafted(model).keys() == before.keys()
        assert all(torch.equal(now[key], value) for key, value in before.items())


def test_members_start_anew_from_what_was_loaded() -> None:
    model = moved(fxgraft.patch(net(), "mixmo", members=3, input_size=SIZE))
    fxgraft.load_backbone(model, other())
    fresh = fxgraft.patch(net_with(other()), "mixmo", members=3, input_size=SIZE).state_dict()
    for key, value in grafted(model).items():
        if "offset" in key:  # drawn again, at the length that goes with the loaded weights
            torch.testing.assert_close(value.std(), fresh[key].std(), rtol=0.3, atol=0)
        else:
            assert torch.equal(value, fresh[key]), key
    assert torch.equal(model.eval()(images()), net_with(other()).eval()(images()))


def test_random_members_are_drawn_anew() -> None:
    model = moved(fxgraft.patch(net(), "mixmo", init="random", input_size=SIZE))
    weights = {key: 10 * value for key, value in other().items()}
    fxgraft.load_backbone(model, weights)
    drawn = model.state_dict()["stem.first.graft_mixmo.weight_1"]
    assert not torch.equal(drawn, weights["stem.first.weight"])
    torch.testing.assert_close(drawn.std(), weights["stem.first.weight"].std(), rtol=0.3, atol=0)


def net_with(weights: dict[str, Tensor]) -> Net:
    bare = net()
    bare.load_state_dict(weights)
    return bare


def test_plain_loading_leaves_the_members_behind() -> None:
    """Why there is a call for it."""
    model = fxgraft.patch(net(), "mixmo", input_size=SIZE)
    result = model.load_state_dict(other(), strict=False)
    assert result.unexpected_keys == []
    assert all("graft_mixmo" in key for key in result.missing_keys)
    assert not torch.equal(model.eval()(images()), net_with(other()).eval()(images()))


def test_a_patched_part_is_loaded_with_the_model_around_it() -> None:
    whole = nn.Sequential(fxgraft.patch(net(), "mixmo", input_size=SIZE))
    fxgraft.load_backbone(whole, {f"0.{key}": value for key, value in other().items()})
    assert torch.equal(whole.eval()(images()), net_with(other()).eval()(images()))


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in other().items() if key not in keys}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (without("fc.bias", "stem.first.bias"), r"2 missing: stem\.first\.bias, fc\.bias(?s:.*)Build"),
    "unexpected": (other() | {"fc.extra": torch.zeros(1)}, r"1 unexpected: fc\.extra"),
    "shape": (
        other() | {"fc.weight": torch.zeros(5, 16)},
        r"1 of another shape: fc\.weight \(5, 16\) for \(4, 16\)(?s:.*)num_classes",
    ),
    "prefix": ({f"module.{key}": value for key, value in other().items()}, r"saved with its wrapper"),
    "nested": ({"state_dict": other(), "epoch": 3}, r"one entry of what was saved"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("patched", [False, True])
def test_what_does_not_fit_is_listed_and_changes_nothing(kind: str, patched: bool) -> None:
    model = net()
    if patched:
        fxgraft.patch(model, "mixmo", input_size=SIZE)
    before = state_of_everything(model)
    weights, message = WRONG[kind]
    with pytest.raises(RecipeError, match=message):
        fxgraft.load_backbone(model, weights)
    assert_same(before, state_of_everything(model))


def test_a_patched_models_checkpoint_is_sent_to_the_right_call() -> None:
    model = fxgraft.patch(net(), "selfnorm", input_size=SIZE)
    with pytest.raises(RecipeError, match=r"that of a patched model(?s:.*)load_state_dict"):
        fxgraft.load_backbone(model, model.state_dict())


def test_a_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = fxgraft.patch(net(), "mixmo", input_size=SIZE), other()
    before = state_of_everything(model)

    def fail(*_args: Any) -> None:
        raise KeyboardInterrupt

    unit = list(fxgraft.grafts(model)[0].units.values())[-1]
    monkeypatch.setattr(unit, "restart", fail)
    with pytest.raises(KeyboardInterrupt):
        fxgraft.load_backbone(model, weights)
    monkeypatch.undo()
    assert_same(before, state_of_everything(model))


@pytest.mark.parametrize("method", METHODS)
def test_what_the_readme_says_of_strict_loading(method: str) -> None:
    patched = fxgraft.patch(net(), method, input_size=SIZE, **METHODS[method])
    adds = bool(grafted(patched))
    assert adds == (method in ("selfnorm", "mixmo", "gam"))
    if adds:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            net().load_state_dict(patched.state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            patched.load_state_dict(other())
    else:
        net().load_state_dict(patched.state_dict())
        patched.load_state_dict(other())
    alike = fxgraft.patch(net(), method, input_size=SIZE, **METHODS[method])
    alike.load_state_dict(patched.state_dict())
    if method != "selfnorm":
        net().load_state_dict(fxgraft.merge(patched).state_dict())
