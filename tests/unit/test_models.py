"""Backbones by name: sizes, classes, and nothing fetched unless it was asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision import models

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
        (("torchvision/fcn_resnet50", 3), {"pretrained": True}, "keeps the classes it was trained with"),
    ],
)
def test_what_is_refused(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(*arguments, **options)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "googlenet", "vit_b_16", "squeezenet1_1"])
def test_weights_of_torchvision_get_a_new_classifier(name, monkeypatch):
    """All but the classifier is that of the weights, which are drawn here."""
    made = models.get_model
    trained = []

    def get_model(model, weights=None, **options):
        if weights is not None:
            assert "num_classes" not in options
            extra = {"init_weights": False} if model == "googlenet" else {}
            trained.append(made(model, weights=None, **options, **extra))
            trained[0].transform_input = True
            return copy.deepcopy(trained[0])
        return made(model, weights=None, **options)

    monkeypatch.setattr(models, "get_model", get_model)
    model = build_model(f"torchvision/{name}", 3, pretrained=True)
    known, now = trained[0].state_dict(), model.state_dict()
    other = {key.rpartition(".")[0] for key in known if known[key].shape != now[key].shape}
    assert other
    assert all(torch.equal(known[key], now[key]) for key in known if key.rpartition(".")[0] not in other)
    assert model.transform_input
    size = 224 if name == "vit_b_16" else 96
    assert model.eval()(torch.randn(2, 3, size, size)).shape == (2, 3)
