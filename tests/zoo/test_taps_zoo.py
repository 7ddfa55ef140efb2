"""Taps on every module of every backbone of the zoo: what they record, what they copy, and that nothing changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxgraft
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.observe import tensors
from zoo.backbones import BACKBONES, Backbone, available

# One backbone of each kind of structure runs in every test run; the sweep runs all of them.
REPRESENTATIVE = {
    "timm/resnet18",
    "timm/test_convnext",
    "timm/test_vit",
    "timm/swin_tiny_patch4_window7_224",
    "timm/densenet121",
    "timm/vgg11",
    "timm/crossvit_tiny_240",
    "timm/mobilenetv3_small_050",
    "torchvision/resnet18",
}

# Modules whose forward is set on the instance, which a graft on the class would not reach: not tapped here.
OWN_FORWARD = {"timm/fasternet_t0": "spatial_mixing"}


@dataclass
class Seen:
    """One value as a forward hook saw it: a copy made on the spot, and whether it was written over later."""

    value: Any
    watched: list[tuple[Tensor, int]]

    @property
    def overwritten(self) -> bool:
        return any(tensor._version != version for tensor, version in self.watched)


def watch(model: nn.Module, names: list[str]) -> dict[str, Seen]:
    seen: dict[str, Seen] = {}

    def hook(name: str, out: Any) -> None:
        value = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), out)
        seen[name] = Seen(value, [(tensor, tensor._version) for tensor in tensors(out)])

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: hook(name, out))
    return seen


def passed(
    model: nn.Module, x: Tensor, training: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients and buffers of one seeded pass."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    out = model(x)
    state = torch.get_rng_state()
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients, {**dict(model.named_buffers()), "random state": state}


def same(actual: Any, expected: Any) -> bool:
    mine, theirs = tensors(actual), tensors(expected)
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def called_once(model: nn.Module, backbone: Backbone) -> list[str]:
    """The modules that run once in a pass and return tensors, in running order."""
    calls = Anatomy(model, backbone.input_size).observation.calls
    ordered = sorted(calls, key=lambda path: calls[path][0].order)
    found = [path for path in ordered if path and len(calls[path]) == 1 and tensors(calls[path][0].output)]
    own = [path for path in found if "forward" in model.get_submodule(path).__dict__]
    assert {path.rpartition(".")[2] for path in own} == set(filter(None, [OWN_FORWARD.get(backbone.name)]))
    return [path for path in found if path not in own]


def test_the_lists_name_backbones_of_the_zoo() -> None:
    assert {backbone.name for backbone in BACKBONES} >= REPRESENTATIVE | OWN_FORWARD.keys()


@pytest.mark.parametrize("backbone", available(REPRESENTATIVE))
def test_taps(backbone: Backbone) -> None:
    bare = backbone.build(warm=True)
    model = copy.deepcopy(bare)
    names = called_once(bare, backbone)
    assert len(names) > 4
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fxgraft.patch(model, "taps", layers=names, input_size=backbone.input_size)
    assert list(model.state_dict()) == list(state)
    assert same(list(model.state_dict().values()), list(state.values()))
    units = fxgraft.grafts(model)[0].units
    seen = watch(bare, names)
    x = backbone.inputs()
    for training in (False, True):
        expected = passed(bare, x, training)
        actual = passed(model, x, training)
        for mine, theirs in zip(actual, expected, strict=True):
            assert same(mine, theirs)
            assert isinstance(mine, Tensor) or mine.keys() == theirs.keys()
        acts = fxgraft.activations(model)
        assert list(acts) == names
        assert [name for name in names if not same(acts[name], seen[name].value)] == []
        written = [name for name in names if seen[name].overwritten]
        assert [name for name in names if units[name].copies[training]] == written
        reached = [name for name in names if any(t.requires_grad for t in tensors(acts[name]))]
        assert reached
    fxgraft.unpatch(model)
    assert type(model) is type(bare)
    assert not [name for name, module in model.named_modules() if "_fxgraft" in module.__dict__]
