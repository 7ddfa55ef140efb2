"""RSC with its defaults on every backbone of the zoo: patched, trained a step, evaluated, taken off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import record
from zoo.backbones import BACKBONES, NUM_CLASSES, Backbone, available

# Their heads read class tokens alone, and their blocks return several values, so that no stage number finds a
# place whose positions reach the logits: the default raises, a layer named by hand works.
EXCEPTIONS = {"timm/coat_tiny": "serial_blocks4.0", "timm/tnt_s_patch16_224": "blocks.0.attn_out"}

# One backbone of each kind of structure runs in every test run; the sweep runs all of them.
REPRESENTATIVE = {
    "timm/resnet18",
    "timm/test_convnext",
    "timm/test_vit",
    "timm/swin_tiny_patch4_window7_224",
    "timm/test_efficientnet",
    "timm/regnety_002",
    "timm/densenet121",
    "timm/maxvit_pico_rw_256",
    "timm/crossvit_tiny_240",
    "timm/mobilenetv3_small_050",
    "torchvision/resnet18",
    "torchvision/VisionTransformer",
}


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One training step; the gradients that it left."""
    model.train()
    out = model(x, target=y) if fxgraft.grafts(model) else model(x)
    assert out.shape == (len(x), NUM_CLASSES)
    fxgraft.loss(model, out, y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_representatives_and_exceptions_exist() -> None:
    names = {backbone.name for backbone in BACKBONES}
    assert names >= REPRESENTATIVE
    assert names >= EXCEPTIONS.keys()
    assert not REPRESENTATIVE & EXCEPTIONS.keys()
    assert all(EXCEPTIONS.values())


@pytest.mark.parametrize("backbone", available(REPRESENTATIVE))
def test_rsc(backbone: Backbone) -> None:
    x, y = backbone.inputs(), torch.arange(4) % NUM_CLASSES
    bare = backbone.build(warm=True)
    model = copy.deepcopy(bare)
    cls, keys, state = type(model), list(model.state_dict()), copy.deepcopy(model.state_dict())
    expected = evaluated(bare, x)

    where: dict[str, Any] = {}
    if backbone.name in EXCEPTIONS:
        with pytest.raises(fxgraft.SiteError, match="the logits read its class token alone"):
            fxgraft.patch(model, "rsc", input_size=backbone.input_size)
        where = {"layers": EXCEPTIONS[backbone.name]}
    fxgraft.patch(model, "rsc", **where, input_size=backbone.input_size)
    assert isinstance(model, cls)
    assert list(model.state_dict()) == keys
    assert torch.equal(evaluated(model, x), expected)

    with record(model) as records:
        gradients = trained(model, x, y)
    assert len(records) == 1
    assert bool((records[0].mask == 0).any())
    wanted = trained(bare, x, y)
    assert gradients.keys() >= wanted.keys()
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]

    model.load_state_dict(state)  # the step moved BatchNorm's statistics
    fxgraft.unpatch(model)
    assert type(model) is cls
    assert list(model.state_dict()) == keys
    assert not [name for name, module in model.named_modules() if "_fxgraft" in module.__dict__]
    assert torch.equal(evaluated(model, x), expected)
