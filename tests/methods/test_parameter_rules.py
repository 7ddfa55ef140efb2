"""Rules for parameters, by name, dimension or order, hold for what grafts add as for the layer that it serves."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import timm.models
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import dispatch_clip_grad
from torch import nn

import fxgraft
from fxgraft.graph.grafting.lookup import counterparts
from fxgraft.integrations.timm.grafting import Grafting, model_parameters

NETWORKS = {"test_resnet": (3, 64, 64), "test_vit": (3, 160, 160), "test_efficientnet": (3, 64, 64)}


def patched(name: str = "test_resnet", method: str = "mixmo", **options: Any) -> Any:
    size = NETWORKS[name]
    return fxgraft.patch(timm.create_model(name, num_classes=5), method, input_size=size, **options)


def settings(model: nn.Module, groups: Any) -> dict[str, tuple[Any, ...]]:
    """Return (weight decay, scale of the learning rate) by name."""
    found = {id(p): (each["weight_decay"], each.get("lr_scale")) for each in groups for p in each["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("rule", [param_groups_layer_decay, param_groups_weight_decay])
@pytest.mark.parametrize("name", NETWORKS)
def test_members_are_in_the_group_of_their_layer(name: str, rule: Any) -> None:
    model = patched(name)
    pairs = counterparts(model)
    assert set(pairs) == {key for key, _ in model.named_parameters() if "graft_" in key}
    found = settings(model, rule(model, weight_decay=0.1))
    assert all(found[own] == found[stock] for own, stock in pairs.items())


def test_no_weight_decay_names_the_members_as_well() -> None:
    model: Any = patched("test_vit")
    bare = timm.create_model("test_vit").no_weight_decay()
    assert model.no_weight_decay() == bare  # neither stem nor head are among them
    kind = type(timm.create_model("test_vit"))

    class Picky(kind):  # type: ignore[misc, valid-type]
        def no_weight_decay(self) -> set[str]:
            return {"pos_embed", "patch_embed.proj.*"}

    other: Any = timm.create_model("test_vit", num_classes=5)
    other.__class__ = Picky
    fxgraft.patch(other, "mixmo")
    expected = {"pos_embed", "patch_embed.proj.*"}
    expected |= {f"patch_embed.proj.graft_mixmo.{each}_1" for each in ("weight", "bias")}
    assert other.no_weight_decay() == expected
    found = settings(
        other, param_groups_weight_decay(other, 0.1, no_weight_decay_list=other.no_weight_decay())
    )
    assert all(found[own] == found[stock] for own, stock in counterparts(other).items())


def clipped(model: Any, parameters: Any) -> dict[str, bool]:
    """Clip gradients to next to nothing; return which heads were clipped."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    dispatch_clip_grad(parameters, 1e-6, mode="agc")
    return {name: bool(p.grad.max() < 0.5) for name, p in model.named_parameters()}


@pytest.mark.parametrize("members", [2, 3])
def test_adaptive_clipping_leaves_all_heads_out(members: int) -> None:
    model = patched(members=members)
    found = clipped(model, model_parameters(model, exclude_head=True))
    heads = {name for name in found if name.startswith("fc.")}
    assert len(heads) == 2 * members
    assert {name for name, was in found.items() if not was} == heads
    assert list(model_parameters(model)) == list(model.parameters())
    bare = timm.create_model("test_resnet")
    kept, wanted = (f(bare, exclude_head=True) for f in (model_parameters, timm.models.model_parameters))
    assert [id(p) for p in kept] == [id(p) for p in wanted]
    outside = nn.DataParallel(patched())
    assert len(list(model_parameters(outside, exclude_head=True))) == len(list(outside.parameters())) - 4


def test_scripts_of_timm_get_the_heads_left_out() -> None:
    plain = timm.models.model_parameters
    with Grafting(["mixmo"]):
        model = timm.create_model("test_resnet", num_classes=5)
        found = clipped(model, timm.models.model_parameters(model, exclude_head=True))
        assert {name for name, was in found.items() if not was} == {n for n in found if n.startswith("fc.")}
        task = pytest.importorskip("timm.task")
        given = task.ClassificationTask(model, nn.CrossEntropyLoss()).get_clip_parameters(exclude_head=True)
        assert not {id(p) for p in given} & {id(p) for p in model.fc.parameters()}
    assert timm.models.model_parameters is plain


def test_what_stands_in_front_of_the_model_is_not_taken_for_its_head() -> None:
    model = patched(method="selfnorm", layers="input")
    assert any("graft_" in name for name, _ in model.named_children())
    assert [id(p) for p in list(model.parameters())[-2:]] == [id(p) for p in model.fc.parameters()]
    bare = list(timm.create_model("test_resnet").state_dict())
    assert [key for key in model.state_dict() if "graft_" not in key] == bare
    children = [name for name, _ in model.named_children()]
    fxgraft.patch(model, "rsc")
    assert [name for name, _ in model.named_children()] == children
    assert [name for name, _ in fxgraft.unpatch(model).named_children()] == [
        n for n in children if "graft_" not in n
    ]


def test_the_classifier_has_all_heads() -> None:
    model = patched()
    assert model.get_classifier() is model.fc
    assert {name for name, _ in model.get_classifier().named_parameters()} == {
        "weight", "bias", "graft_mixmo.weight_1", "graft_mixmo.bias_1",
    }  # fmt: skip
    model.fc.requires_grad_(False)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("fc."))
