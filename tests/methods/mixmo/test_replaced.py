"""Layers that are replaced on a patched model: members follow the same weights, else it is said what is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import FxgraftWarning

SIZE = (3, 64, 64)


def network(seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model("test_resnet", num_classes=5, **options)


def trained(**options: Any) -> nn.Module:
    """A patched network whose members have moved apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = fxgraft.patch(network(), "mixmo", input_size=SIZE, **options)
        with torch.no_grad():
            for parameter in fxgraft.grafts(model)[0].parameters():
                parameter.add_(torch.randn_like(parameter) / 10)
    return model


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(2))


def members(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "graft_" in key}


def stem(model: nn.Module) -> str:
    return "conv1" if isinstance(model.conv1, nn.Conv2d) else "conv1.0"


def replaced(model: nn.Module, path: str, same: bool) -> None:
    """Put another layer of the same shape in a layer's place, with the same weights or with others."""
    old: Any = model.get_submodule(path)
    if isinstance(old, nn.Conv2d):
        new: Any = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            old.stride,
            old.padding,
            bias=old.bias is not None,
        )
    else:
        new = nn.Linear(old.in_features, old.out_features)
    if same:
        new.load_state_dict({key: value for key, value in old.state_dict().items() if "graft_" not in key})
    model.set_submodule(path, new.train(model.training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", ["stem", "fc"])
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_members_follow_a_layer_with_the_same_weights(init: str, path: str, training: bool) -> None:
    model = trained(init=init).train(training)
    before, twin = members(model), copy.deepcopy(model)
    replaced(model, stem(model) if path == "stem" else path, same=True)
    x, y = images(), torch.arange(4)
    torch.manual_seed(3)
    out = model(x, target=y)
    torch.manual_seed(3)
    assert torch.equal(out, twin(x, target=y))
    assert all(torch.equal(value, before[key]) for key, value in members(model).items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", ["stem", "fc"])
def test_members_of_other_weights_start_again_and_that_is_said(path: str, training: bool) -> None:
    model = trained().train(training)
    before = members(model)
    path = stem(model) if path == "stem" else path
    torch.manual_seed(4)
    replaced(model, path, same=False)
    state = torch.get_rng_state()
    with pytest.warns(FxgraftWarning, match=rf"Lost are {path}\.graft_mixmo\.weight_1, .*offset_0"):
        model.eval()(images())
    assert torch.equal(torch.get_rng_state(), state)
    layer: Any = model.get_submodule(path)
    after = members(model)
    assert torch.equal(after[f"{path}.graft_mixmo.weight_1"], layer.weight)
    assert not torch.equal(after[f"{path}.graft_mixmo.offset_0"], before[f"{path}.graft_mixmo.offset_0"])
    others = [key for key in after if not key.startswith(path)]
    assert others
    assert all(torch.equal(after[key], before[key]) for key in others)
    model.eval()(images())  # and once is enough


@pytest.mark.parametrize("classes", [5, 9])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_evaluation_after_a_new_classifier_moves_no_random_state(name: str, classes: int) -> None:
    size = (3, 160, 160) if name == "test_vit" else SIZE
    model = fxgraft.patch(timm.create_model(name, num_classes=5), "mixmo", input_size=size).eval()
    model.reset_classifier(classes)
    bare = timm.create_model(name, num_classes=classes).eval()
    stock = {key: value for key, value in model.state_dict().items() if "graft_" not in key}
    bare.load_state_dict(stock)
    state = torch.get_rng_state()
    with pytest.warns(FxgraftWarning, match="was made again. Lost are "), torch.inference_mode():
        out = model(torch.ones(2, *size))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, bare(torch.ones(2, *size)))
    loss = fxgraft.loss(model.train(), model(torch.ones(2, *size), target=torch.arange(2)), torch.arange(2))
    loss.backward()  # what was made in inference mode trains all the same
    assert all(p.grad is not None for p in fxgraft.grafts(model)[0].parameters())


def test_what_is_made_again_is_drawn_again_each_time() -> None:
    model, offsets = trained(), []
    for _ in range(2):
        replaced(model, "fc", same=False)
        with pytest.warns(FxgraftWarning, match="Lost are fc"):
            model.eval()(images())
        offsets.append(members(model)["fc.graft_mixmo.offset_0"])
    assert not torch.equal(*offsets)


ACTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.deepcopy,
    "merge": fxgraft.merge,
    "patch": lambda model: fxgraft.patch(model, "rsc", layer="layer4"),
    "unpatch": lambda model: fxgraft.unpatch(model, "taps"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_replaced_layer_is_noticed_before_a_pass(act: str) -> None:
    model = fxgraft.patch(trained(), "taps", layers="layer4")
    replaced(model, "fc", same=False)
    with pytest.warns(FxgraftWarning, match="Lost are fc"):
        out = ACTS[act](model)
    assert torch.equal(out.fc.weight, model.fc.weight)
    assert torch.equal(members(model)["fc.graft_mixmo.weight_1"], model.fc.weight)


def test_a_plan_that_fails_leaves_the_members() -> None:
    model = trained()
    before = members(model)
    replaced(model, "fc", same=False)
    stem_path = stem(model)
    kept: Any = model.get_submodule(stem_path)
    model.set_submodule(stem_path, nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, kept.out_channels, 3, 2, 1)))
    with pytest.raises(fxgraft.StructureError, match="has no stem"):
        model(images(), target=torch.arange(4))
    model.set_submodule(stem_path, kept)
    assert all(
        torch.equal(value, before[key]) for key, value in members(model).items() if key.startswith(stem_path)
    )


def test_gates_of_a_block_with_another_width_are_made_again() -> None:
    model = fxgraft.patch(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), "selfnorm", input_size=(3, 16, 16)
    )
    model[0], model[1] = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
    with pytest.warns(
        FxgraftWarning, match=r"'selfnorm' copied or served was replaced.*Lost are .*g\.mean_weight"
    ):
        assert model.eval()(torch.ones(2, 3, 16, 16)).shape == (2, 4, 12, 12)
