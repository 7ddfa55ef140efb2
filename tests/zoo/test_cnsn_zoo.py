"""CrossNorm and SelfNorm together on every backbone of the zoo: patched, trained a step, evaluated, taken off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.crossnorm.patch import CrossNormUnit
from zoo.backbones import BACKBONES, NUM_CLASSES, Backbone, available

# Backbones without a residual join, and the position that their structure offers instead. Of timm's files
# these are densely connected or plain, or (efficientnet) have their skips configured away.
NO_JOIN = {
    "timm/densenet121": "conv1_post",
    "timm/inception_v3": "conv",
    "timm/inception_v4": "conv",
    "timm/rdnet_tiny": "conv",
    "timm/selecsls42": "conv",
    "timm/test_efficientnet": "conv",
    "timm/vgg11": "act",
    "timm/ese_vovnet19b_slim_dw": "conv",
    "torchvision/DenseNet": "conv2_post",
    "torchvision/alexnet": "act",
    "torchvision/googlenet": "conv",
    "torchvision/inception_v3": "conv",
    "torchvision/shufflenet_v2_x0_5": "conv",
    "torchvision/squeezenet1_1": "conv",
    "torchvision/vgg11": "act",
    "torchvision/vgg11_bn": "norm",
}

# One backbone of each kind of structure runs in every test run; the sweep runs all of them.
REPRESENTATIVE = {
    "timm/resnet18",
    "timm/resnetv2_18",
    "timm/test_convnext",
    "timm/test_vit",
    "timm/swin_tiny_patch4_window7_224",
    "timm/regnety_002",
    "timm/densenet121",
    "timm/vgg11",
    "timm/crossvit_tiny_240",
    "timm/dla46x_c",
    "timm/mobilenetv3_small_050",
    "torchvision/resnet18",
}


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One training step; the gradients that it left."""
    model.train()
    fxgraft.loss(model, model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_lists_name_backbones_of_the_zoo() -> None:
    names = {backbone.name for backbone in BACKBONES}
    assert names >= REPRESENTATIVE
    assert names >= NO_JOIN.keys()


@pytest.mark.parametrize("backbone", available(REPRESENTATIVE))
def test_cnsn(backbone: Backbone) -> None:
    size = {"input_size": backbone.input_size}
    x, y = backbone.inputs(), torch.arange(4) % NUM_CLASSES
    bare = backbone.build(warm=True)
    model = copy.deepcopy(bare)
    cls, keys, state = type(model), list(model.state_dict()), copy.deepcopy(model.state_dict())
    expected = evaluated(bare, x)
    position = NO_JOIN.get(backbone.name, "post")
    if position != "post":
        with pytest.raises(fxgraft.StructureError, match="no residual join"):
            fxgraft.patch(model, "crossnorm", **size)

    fxgraft.patch(model, "crossnorm", position=position, p=1.0, active=None, **size)
    assert list(model.state_dict()) == keys
    assert torch.equal(evaluated(model, x), expected)
    fxgraft.patch(model, "selfnorm", position=position, **size)
    assert isinstance(model, cls)
    assert [key for key in model.state_dict() if "graft_" not in key] == keys
    assert torch.equal(evaluated(model, x), expected)

    gradients = trained(model, x, y)
    wanted = trained(bare, x, y)
    assert gradients.keys() >= wanted.keys()
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    own = [name for name, _ in model.named_parameters() if "graft_" in name]
    assert own
    assert gradients.keys() >= set(own)
    reached = [name for name in own if name.endswith("norm.bias") and gradients[name].abs().max() > 0]
    # Where the head reads class tokens alone, nothing depends on the positions of the last block.
    assert len(reached) >= 0.5 * len(fxgraft.grafts(model)[1].units)

    crossnorm = fxgraft.grafts(model)[0]
    assert all(isinstance(unit, CrossNormUnit) for unit in crossnorm.units.values())
    torch.manual_seed(1)
    model.train()
    with torch.no_grad():
        changed, plain = model(x), fxgraft.unpatch(copy.deepcopy(model), "crossnorm")(x)
    assert not torch.equal(changed, plain)

    fxgraft.unpatch(model)
    model.load_state_dict(state)  # the step moved BatchNorm's statistics
    assert type(model) is cls
    assert list(model.state_dict()) == keys
    assert not [name for name, module in model.named_modules() if "_fxgraft" in module.__dict__]
    assert torch.equal(evaluated(model, x), expected)


EVERYWHERE = {"timm/resnet18", "timm/resnetv2_18", "timm/test_vit", "timm/mobilenetv3_small_050"}


@pytest.mark.parametrize(
    "backbone",
    [each for each in available(EVERYWHERE) if each.id not in NO_JOIN],
)
def test_the_other_positions(backbone: Backbone) -> None:
    x, y = backbone.inputs(), torch.arange(4) % NUM_CLASSES
    bare = backbone.build(warm=True)
    expected = evaluated(bare, x)
    for position in ("pre", "residual", "identity"):
        model = copy.deepcopy(bare)
        size = {"input_size": backbone.input_size, "position": position}
        fxgraft.patch(model, "crossnorm", p=1.0, active=None, **size)
        fxgraft.patch(model, "selfnorm", **size)
        assert torch.equal(evaluated(model, x), expected)
        gradients = trained(model, x, y)
        assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        own = {name for name, _ in model.named_parameters() if "graft_" in name}
        assert gradients.keys() >= own
        torch.manual_seed(1)
        model.train()
        with torch.no_grad():
            changed, plain = model(x), fxgraft.unpatch(copy.deepcopy(model), "crossnorm")(x)
        assert not torch.equal(changed, plain)
