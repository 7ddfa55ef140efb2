"""DSU on models: its six places by structure, and what it draws."""

from __future__ import annotations

import pytest
import timm
import torch

import fxgraft
from fxgraft.patches.dsu import perturb_moments


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("convnext_atto", ["stem.0", "stem", *(f"stages.{i}" for i in range(4))]),
        (
            "vit_tiny_patch16_224",
            ["patch_embed.proj", "pos_drop", "blocks.2", "blocks.5", "blocks.8", "blocks.11"],
        ),
        ("efficientnet_lite0", ["conv_stem", *(f"blocks.{i}" for i in (0, 1, 2, 4, 6))]),
        ("vgg11", ["features.0", *(f"features.{i}" for i in (9, 14, 19, 20))]),
    ],
)
def test_the_six_places(network: str, expected: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(network)
    fxgraft.patch(model, "dsu")
    assert list(fxgraft.grafts(model)[0].units) == expected


def test_styles_spread_as_those_of_the_batch() -> None:
    x = torch.randn(64, 2, 8, 8, dtype=torch.float64) + torch.randn(64, 2, 1, 1, dtype=torch.float64) * 3
    noise = torch.randn(2, 64, 2, dtype=torch.float64)
    torch.testing.assert_close(perturb_moments(x, *torch.zeros_like(noise)), x)
    moved = perturb_moments(x, noise[0], torch.zeros_like(noise[0])).mean((2, 3)) - x.mean((2, 3))
    torch.testing.assert_close(moved, noise[0] * x.mean((2, 3)).std(0))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"factor": 0}, fxgraft.ConfigError, "factor must be a positive number"),
        ({"layers": "fc"}, fxgraft.SiteError, "'fc' has no positions"),
    ],
)
def test_errors(options, error, match) -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(error, match=match):
        fxgraft.patch(model, "dsu", **options)
