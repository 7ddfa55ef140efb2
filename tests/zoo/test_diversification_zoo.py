"""The head rewrite on every backbone of the zoo: at α = 1 it is the bare head, or it is named here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fxgraft
from fxgraft.errors import StructureError
from fxgraft.patches.diversification.patch import maps, record
from zoo.backbones import BACKBONES, NUM_CLASSES, Backbone, available

# No average over positions in front of one linear classifier: the message they give.
EXCEPTIONS = {
    "timm/cait_xxs24_224": "a class token",
    "timm/coat_tiny": "no plain average over positions",  # a convolution joins three class tokens
    "timm/convit_tiny": "a class token",
    "timm/crossvit_tiny_240": "2 classifiers: 'head.0', 'head.1'",
    "timm/deit_tiny_distilled_patch16_224": "2 classifiers: 'head', 'head_dist'",
    "timm/efficientformer_l1": "2 classifiers: 'head', 'head_dist'",
    "timm/efficientformerv2_s0": "2 classifiers: 'head', 'head_dist'",
    "timm/efficientvim_m1": "No linear classifier was found",  # it weighs the logits of several stages
    "timm/levit_128s": "2 classifiers: 'head.linear', 'head_dist.linear'",
    "timm/naflexvit_base_patch16_gap": r"global_pool_naflex\(\), which is no plain average",
    "timm/pit_ti_224": "a class token",
    "timm/repvit_m0_9": "2 classifiers: 'head.head.l', 'head.head_dist.l'",
    "timm/swiftformer_xs": "2 classifiers: 'head', 'head_dist'",
    "timm/test_vit": "a class token",
    "timm/tnt_s_patch16_224": "a class token",
    "timm/vit_tiny_r_s16_p8_224": "a class token",
    "timm/volo_d1_224": "No linear classifier was found",  # it adds a maximum over auxiliary logits
    "timm/xcit_nano_12_p8_224": "a class token",
    "torchvision/VisionTransformer": "a class token",
    "torchvision/alexnet": "a whole map of shape",
    "torchvision/vgg11": "a whole map of shape",
    "torchvision/vgg11_bn": "a whole map of shape",
}

# Of those with two classifiers, the ones that average over positions: either can be named. Not so in repvit,
# which adds the two up inside the module that holds them.
NAMED = {
    "timm/efficientformer_l1": "head",
    "timm/efficientformerv2_s0": "head_dist",
    "timm/levit_128s": "head.linear",
    "timm/swiftformer_xs": "head",
}

# A norm over channels or an activation stands between pooling and classifier: training and evaluation heads
# differ, and the summary says so.
DIFFERENT = {
    "timm/beit_base_patch16_224",
    "timm/cpubone_nano",
    "timm/csatv2",
    "timm/davit_tiny",
    "timm/deepseek_vit_412m",
    "timm/edgenext_xx_small",
    "timm/efficientvit_b0",
    "timm/eva02_tiny_patch14_224",
    "timm/fasternet_t0",
    "timm/gemma4_vit_167m",
    "timm/ghostnet_050",
    "timm/hardcorenas_a",
    "timm/hgnetv2_b0",
    "timm/hiera_tiny_224",
    "timm/inception_next_atto",
    "timm/lcnetv2_small",
    "timm/lowformer_b0",
    "timm/mobilenetv3_small_050",
    "timm/poolformerv2_s12",
    "timm/qwen3_vit_88m",
    "timm/rdnet_tiny",
    "timm/repghostnet_050",
    "timm/sam2_hiera_tiny",
    "timm/test_convnext",
    "timm/test_mambaout",
    "timm/tiny_vit_5m_224",
    "timm/vit_relpos_small_patch16_224",
    "timm/vitamin_small_224",
    "torchvision/MaxVit",
    "torchvision/convnext_tiny",
    "torchvision/mobilenet_v3_small",
}

# One backbone of each kind of head runs in every test run; the sweep runs all of them.
REPRESENTATIVE = {
    "timm/densenet121",
    "timm/dla46x_c",
    "timm/efficientvit_m0",
    "timm/mixer_s32_224",
    "timm/mobilenetv3_small_050",
    "timm/regnety_002",
    "timm/resnet18",
    "timm/swiftformer_xs",
    "timm/swin_tiny_patch4_window7_224",
    "timm/test_convnext",
    "timm/test_vit",
    "torchvision/squeezenet1_1",
    "torchvision/vgg11",
}


def test_the_lists_name_backbones_of_the_zoo() -> None:
    names = {backbone.name for backbone in BACKBONES}
    assert names >= EXCEPTIONS.keys() | DIFFERENT | REPRESENTATIVE
    assert NAMED.keys() <= EXCEPTIONS.keys()
    assert not EXCEPTIONS.keys() & DIFFERENT


@pytest.mark.parametrize("backbone", available(REPRESENTATIVE))
def test_head_rewrite(backbone: Backbone) -> None:
    options: dict[str, Any] = {"patch": 1, "input_size": backbone.input_size}
    if backbone.name in EXCEPTIONS:
        model = backbone.build()
        with pytest.raises(StructureError, match=EXCEPTIONS[backbone.name]):
            fxgraft.patch(model, "diversification", **options)
        if backbone.name not in NAMED:
            return
        options["head"] = NAMED[backbone.name]
    x, y = backbone.inputs(), torch.arange(4) % NUM_CLASSES
    bare = backbone.build(warm=True)
    model = copy.deepcopy(bare)
    cls, keys, state = type(model), list(model.state_dict()), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = bare.eval()(x)
        torch.manual_seed(0)
        trained = bare.train()(x)

        fxgraft.patch(model, "diversification", alpha=1.0, **options)
        assert torch.equal(model.eval()(x), expected)
        torch.manual_seed(0)
        got = model.train()(x)
    assert ("heads of training and evaluation differ" in str(fxgraft.summary(model))) == (
        backbone.name in DIFFERENT
    )
    tolerance = 2e-5 * trained.abs().max().item()
    if backbone.name not in DIFFERENT:
        torch.testing.assert_close(got, trained, rtol=0, atol=tolerance)
        torch.testing.assert_close(
            dict(model.named_buffers()), dict(bare.named_buffers()), rtol=1e-4, atol=1e-5
        )
        if backbone.name not in NAMED:
            model.load_state_dict(state)
            with torch.no_grad():
                found = maps(model, x)
            assert found.shape[:2] == (4, NUM_CLASSES)
            close = {"rtol": 0, "atol": 2e-5 * expected.abs().max().item()}
            torch.testing.assert_close(found.mean((2, 3)), expected, **close)
    assert got.shape == trained.shape

    fxgraft.unpatch(model)
    model.load_state_dict(state)  # the pass moved BatchNorm's statistics
    fxgraft.patch(model, "diversification", p_peak=1.0, **options)
    with record(model) as records:
        out = model.train()(x)
    assert (records[0].mask.sum((2, 3)) >= 1).all()
    fxgraft.loss(model, out, y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    bare.load_state_dict(state)
    fxgraft.loss(bare, bare.train()(x), y).backward()
    assert gradients.keys() == {name for name, p in bare.named_parameters() if p.grad is not None}

    model.load_state_dict(state)
    fxgraft.unpatch(model)
    assert type(model) is cls
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)
