"""GAM on backbones and dense predictors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision

import fxgraft
from fxgraft.patches.gam import step as gam
from methods.gam.gam_tools import contents, gradients, images, patched, unchanged
from models.small import exactly
from sweeping import some

BACKBONES: dict[str, tuple[Any, dict[str, Any], list[tuple[int, ...]]]] = {
    "vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3
        ),
        {"layers": ["blocks.0", "norm", "head"], "input_size": (3, 32, 32)},
        [(500, 24), (500, 24), (500, 4)],
    ),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", num_classes=4, img_size=56, depths=(1, 1, 1, 1), embed_dim=12
        ),
        {"layers": ["layers.0", "layers.2"], "input_size": (3, 56, 56)},
        [(500, 12), (500, 48)],
    ),
    "resnet": (
        lambda: timm.create_model("resnet10t", num_classes=4),
        {"layers": [0, 1, 2, -1], "input_size": (3, 64, 64)},
        [],
    ),
    "convnext": (
        lambda: timm.create_model("convnext_atto", num_classes=4),
        {"layers": ["stages.1", "head"], "input_size": (3, 32, 32)},
        [(500, 80, 1, 1), (500, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(BACKBONES, 2))
def test_backbones(name: str):
    build, options, first = BACKBONES[name]
    model = build()
    bare = copy.deepcopy(model).eval()
    patched(model, **options)
    shapes = [tuple(next(judge.parameters()).shape) for judge in gam.discriminators(model).values()]
    assert not first or shapes == first
    side = options["input_size"][1]
    step = fxgraft.gam.gam_losses(model.train(), images(2, 1, side), images(3, 2, side))
    step.mapping.backward()
    step.discriminator.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert len(gradients(model)) == len(list(model.parameters()))
    assert all(len(gradients(j)) == 6 for j in gam.discriminators(model).values())
    fxgraft.unpatch(model)
    model.load_state_dict(bare.state_dict())
    exactly(model.eval()(images(2, 1, side)), bare(images(2, 1, side)))


SEGMENTERS = {
    "fcn_resnet50": ["backbone.layer1", "backbone.layer2", "backbone.layer4", "classifier"],
    "deeplabv3_mobilenet_v3_large": ["backbone.3", "backbone.6", "backbone.16", "classifier"],
    "lraspp_mobilenet_v3_large": ["backbone.3", "backbone.6", "backbone.12", "classifier"],
}


@pytest.mark.parametrize("name", some(sorted(SEGMENTERS, reverse=True), 1))
def test_dense_prediction(name: str):
    build = getattr(torchvision.models.segmentation, name)
    torch.manual_seed(0)
    model = build(weights=None, weights_backbone=None, num_classes=3)
    bare = copy.deepcopy(model).eval()
    patched(model, layers=SEGMENTERS[name], gan="lsgan", input_size=(3, 64, 64), hidden=16)
    judges = gam.discriminators(model)
    assert len(judges) == 4
    assert all(next(judge.parameters()).ndim == 4 for judge in judges.values())
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (judges, model)]
    for _ in range(2):
        # Other sizes on either side, as street scenes of two cities have them.
        step = fxgraft.gam.gam_losses(model.train(), images(2, 1, 64), images(2, 2, 96))
        for loss, optimizer in zip((step.discriminator, step.mapping), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.isfinite(step.mapping)
        assert torch.isfinite(step.discriminator)
    assert len(step.accuracy) == 4
    source = gam.source(model)
    unchanged(source, contents(bare))
    exactly(source(images(2, 1, 64))["out"], bare(images(2, 1, 64))["out"])
