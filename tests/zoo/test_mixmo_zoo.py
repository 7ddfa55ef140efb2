"""MixMo on every backbone of the zoo: patched, trained a step, evaluated, merged into a fresh model, taken off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from zoo.backbones import BACKBONES, NUM_CLASSES, Backbone, available

# What cannot take several inputs, and what its error says.
REFUSED = {
    "timm/crossvit_tiny_240": "branches of different sizes: 'patch_embed.0.proj'",
    "timm/gemma4_vit_167m": "torch.fx cannot trace Gemma4VitClassifier",
    "timm/naflexvit_base_patch16_gap": r"first meets 'embeds' \(NaFlexEmbeds\)",
    "timm/test_nfnet": r"'stem.conv1' \(ScaledStdConv2d\) standardises",
    "timm/tnt_s_patch16_224": r"'pixel_embed.proj' \(Conv2d\) sees pieces of the image as samples of their own",
    "timm/vit_tiny_r_s16_p8_224": r"'patch_embed.backbone.conv' \(StdConv2dSame\) standardises",
    "timm/volo_d1_224": r"do not come from linear layers alone: max\(\)",
    "torchvision/squeezenet1_1": r"do not come from linear layers alone: 'classifier.2' \(ReLU\)",
}

# One backbone of each kind of ends runs in every test run; the sweep runs all of them.
REPRESENTATIVE = {
    "timm/resnet18",
    "timm/fastvit_t8",  # parallel stems
    "timm/test_vit",
    "timm/deit_tiny_distilled_patch16_224",  # two classifiers
    "timm/davit_tiny",  # padding before the stem
    "timm/dla46x_c",  # a convolution as classifier
    "timm/test_nfnet",
    "timm/volo_d1_224",
    "torchvision/mobilenet_v3_small",
}


def evaluated(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(x, **options)


def test_the_lists_name_backbones_of_the_zoo() -> None:
    names = {backbone.name for backbone in BACKBONES}
    assert names >= REPRESENTATIVE
    assert names >= REFUSED.keys()


@pytest.mark.parametrize("backbone", available(REPRESENTATIVE))
def test_mixmo(backbone: Backbone) -> None:
    x, y = backbone.inputs(), torch.arange(4) % NUM_CLASSES
    bare = backbone.build(warm=True)
    model = copy.deepcopy(bare)
    if backbone.name in REFUSED:
        with pytest.raises((fxgraft.StructureError, fxgraft.TraceError), match=REFUSED[backbone.name]):
            fxgraft.patch(model, "mixmo", input_size=backbone.input_size)
        assert type(model) is type(bare)
        return
    keys, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    expected = evaluated(bare, x)
    fxgraft.patch(model, "mixmo", p=1.0, input_size=backbone.input_size)
    assert [key for key in model.state_dict() if "graft_" not in key] == keys
    assert torch.equal(evaluated(model, x), expected)

    model.train()
    out = model(x, target=y)
    assert out.shape == (2, 4, NUM_CLASSES)
    fxgraft.loss(model, out, y).backward()
    bare.train()
    torch.nn.functional.cross_entropy(bare(x), y).backward()
    trained = {name for name, p in bare.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    own = {name for name, _ in model.named_parameters() if "graft_" in name}
    assert own
    assert gradients.keys() >= trained | own
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert not [name for name in own if not gradients[name].any()]

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / (parameter.grad.norm() + 1e-12)
    predicted = evaluated(model, x)
    merged = fxgraft.merge(model)
    assert type(merged) is type(bare)
    fresh = backbone.build()
    fresh.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(evaluated(fresh, x), predicted, rtol=1e-5, atol=1e-5)
    members = evaluated(model, x, members=True)
    assert not torch.equal(members[0], members[1])
    torch.testing.assert_close(members.mean(0), predicted, rtol=1e-4, atol=1e-4)

    fxgraft.unpatch(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(state)
    assert not [name for name, module in model.named_modules() if "_fxgraft" in module.__dict__]
    assert torch.equal(evaluated(model, x), expected)
