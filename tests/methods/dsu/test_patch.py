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
            ["patch_embed.proj", "pos_drop", "blocks.2", "blocks.5", "blocks.8"],
        ),
        ("poolformer_s12", ["stem.conv", *(f"stages.{i}" for i in range(4))]),  # its stem is one convolution
        ("efficientnet_lite0", ["conv_stem", *(f"blocks.{i}" for i in (0, 1, 2, 4, 6))]),
        ("vgg11", ["features.0", *(f"features.{i}" for i in (9, 14, 19, 20))]),
    ],
)
def test_the_places_of_the_paper(network: str, expected: list[str]) -> None:
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


@pytest.mark.parametrize("method", ["dsu", "mixstyle"])
@pytest.mark.parametrize(
    ("network", "layer", "match"),
    [
        ("pit_ti_distilled_224", "norm", "Nothing that happens at 'norm' can change a prediction"),
        (
            "resnet18",
            "global_pool.pool",
            r"no positions: its value is of shape \(2, 512, 1, 1\)(?s:.*)earlier",
        ),
        ("vit_tiny_patch16_224", "blocks.11", "Nothing that happens at 'blocks.11' can change a prediction"),
    ],
)
def test_places_where_nothing_would_change_are_refused(
    method: str, network: str, layer: str, match: str
) -> None:
    with torch.device("meta"):
        model = timm.create_model(network)
    with pytest.raises(fxgraft.SiteError, match=match):
        fxgraft.patch(model, method, layers=layer)


@pytest.mark.parametrize(("method", "count"), [("dsu", 5), ("mixstyle", 3)])
def test_stages_of_one_position_are_left_out(method: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    fxgraft.patch(model, method, input_size=(3, 32, 32), **({"stages": 4} if method == "mixstyle" else {}))
    assert len(fxgraft.grafts(model)[0].units) == count


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
