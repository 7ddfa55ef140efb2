"""Taps on every module of every third backbone: what they record, what they copy, and that nothing changes."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxgraft
from models.backbones import Backbone, available
from system.contract.cases import bare, batch, reference, seeded

FEW = (
    "timm/densenet121",
    "timm/mobilenetv3_small_050",
    "timm/resnet18",
    "timm/swin_tiny_patch4_window7_224",
)

# Modules whose forward is set on the instance, which a graft on the class would not reach: not tapped here.
OWN_FORWARD = {"timm/fasternet_t0": "spatial_mixing"}


@dataclass
class Seen:
    """One value as a forward hook saw it: itself, a copy made on the spot, and whether it was written over later."""

    value: Any
    copied: Any
    versions: list[int]

    @property
    def overwritten(self) -> bool:
        return [tensor._version for tensor in tensors(self.value)] != self.versions


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def watch(model: nn.Module, names: list[str]) -> dict[str, Seen]:
    seen: dict[str, Seen] = {}

    def hook(name: str, out: Any) -> None:
        cloned = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), out)
        seen[name] = Seen(out, cloned, [tensor._version for tensor in tensors(out)])

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: hook(name, out))
    return seen


def called_once(backbone: Backbone) -> list[str]:
    """The modules that run once in a pass and return tensors."""
    model = copy.deepcopy(bare(backbone)).eval()
    calls: Counter[str] = Counter()
    own = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    assert {name.rpartition(".")[2] for name in own} == set(filter(None, [OWN_FORWARD.get(backbone.name)]))
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, out, name=name: calls.update({name: 1 if tensors(out) else 2})
        )
    with torch.no_grad():
        model(backbone.inputs())
    return [name for name, count in calls.items() if name and count == 1 and name not in own]


def same(actual: Any, expected: Any) -> bool:
    mine, theirs = tensors(actual), tensors(expected)
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def shares(actual: Any, expected: Any) -> bool:
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return all(a.data_ptr() == b.data_ptr() for a, b in pairs)


@pytest.mark.parametrize(
    "backbone",
    [each for index, each in enumerate(available(FEW)) if index % 3 == 0 or each.id in (*FEW, *OWN_FORWARD)],
)
def test_taps(backbone: Backbone) -> None:
    plain, model = copy.deepcopy(bare(backbone)), copy.deepcopy(bare(backbone))
    names = called_once(backbone)
    assert len(names) > 4
    mine, seen = watch(model, names), watch(plain, names)
    fxgraft.patch(model, "taps", layers=names, input_size=backbone.input_size)
    x, y = batch(backbone)
    for training in (False, True):
        seeded(plain, x, y, training)
        actual = seeded(model, x, y, training)
        assert actual.differences(reference(backbone, training)) == []
        acts = fxgraft.activations(model)
        assert list(acts) == names
        assert [name for name in names if not same(acts[name], seen[name].copied)] == []
        written = [name for name in names if seen[name].overwritten]
        # The others are not copied: they are what the module returned.
        assert [name for name in names if not shares(acts[name], mine[name].value)] == written
        assert any(t.requires_grad for name in names for t in tensors(acts[name]))
    fxgraft.unpatch(model)
    assert type(model) is type(plain)
