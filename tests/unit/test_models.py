"""Backbones by name: sizes, classes, and nothing fetched unless it was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxgraft.errors import ConfigError
from fxgraft.models import build_model


@pytest.mark.parametrize(
    ("name", "size", "attribute"),
    [("torchvision/vit_b_16", 64, "image_size"), ("timm/vit_tiny_patch16_224", 64, "patch_embed.img_size")],
)
def test_models_that_are_tied_to_a_size_are_built_for_it(name, size, attribute):
    with torch.device("meta"):
        model = build_model(name, 5, input_size=size)
    for part in attribute.split("."):
        model = getattr(model, part)
    assert model in (size, (size, size))


def test_no_backbone_of_a_segmentation_model_is_fetched(monkeypatch):
    def fetch(*_, **__):
        pytest.fail("fetched weights")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with torch.device("meta"):
        model = build_model("torchvision/fcn_resnet50", 4)
    assert model.classifier[-1].out_channels == 4


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (lambda num_classes: num_classes, 3),
            {},
            "returned a int, and not a torch.nn.Module.\nReturn the model",
        ),
        ((nn.Linear, 3), {}, r"could not be called with num_classes=3(.|\n)*Let it take these arguments"),
        (("torchvision/resnet18", 3), {"pretrained": True}, "keeps the classifier it was trained with"),
    ],
)
def test_what_is_refused(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(*arguments, **options)
