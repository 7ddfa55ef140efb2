"""What GAM refuses, and that a refusal changes nothing."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft import ConfigError, SiteError
from methods.gam.gam_tools import TAPS, contents, images, patched, unchanged
from models.small import Net, net


class SideBranch(Net):
    """Computes something that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        return super().forward(x)


class Wider(nn.Module):
    """Another network with a layer of the same name and another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 9, 3, 2, 1)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(x).mean((2, 3)))


def wider() -> nn.Module:
    return Wider().requires_grad_(False)


def linear(*sizes: int) -> Any:
    return lambda shape: nn.Linear(*sizes)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layers": ["layer9"]}, SiteError, "the target network has no such tap(.|\n)*layer9"),
    ({"layers": ["act2"], "source": wider()}, SiteError, "the source network has no such tap(.|\n)*act2"),
    (
        {"layers": ["layer1"], "source": wider()},
        ConfigError,
        r"'layer1' has shape \(8, 12, 12\) in the target network, and 'layer1' has \(9, 12, 12\) in the source",
    ),
    ({"layers": ["*"], "source": wider()}, ConfigError, "for 7 taps in the target(.|\n)*for 3 in the source"),
    ({"layers": ["fc"], "source": wider()}, ConfigError, "does not pair with the target's(.|\n)*drift=0"),
    ({"source": Net()}, ConfigError, r"requires gradients(.|\n)*requires_grad_\(False\)"),
    ({"source": "model"}, ConfigError, "source must be a network(.|\n)*leave source= out"),
    ({"weights": [1, 2]}, ConfigError, "2 weights were given for 3 taps: layer1, act2, fc"),
    ({"weights": [1, 2, -1]}, ConfigError, "weights must be 0 or more, got -1"),
    ({"weights": 1.0}, ConfigError, r"one number per tap.*\nPass for example weights="),
    ({"drift": -0.1}, ConfigError, "drift must be 0 or more"),
    ({"eps": float("nan")}, ConfigError, "eps must be 0 or more"),
    ({"momentum": 2}, ConfigError, "momentum must be a share"),
    ({"gan": "wgan"}, ConfigError, "gan must be one of 'jsd', 'lsgan'"),
    ({"hidden": 0}, ConfigError, "hidden must be a whole number"),
    ({"discriminator": 3}, ConfigError, "is called with a tap's shape.*\n.*or leave it out"),
    ({"discriminator": lambda shape: shape}, ConfigError, "'layer1' must be a torch.nn.Module"),
    ({"discriminator": linear(7, 2)}, ConfigError, "does not take a value of shape"),
    (
        {"layers": ["fc"], "discriminator": linear(5, 2), "gan": "lsgan"},
        ConfigError,
        r"returns \(2, 2\) for a value of shape \(2, 5\)",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[each[2][:30] for each in REFUSED])
def test_bad_input_is_refused_and_nothing_changed(options: Any, error: type[Exception], message: str):
    refused(net(), {"layers": TAPS, **options}, error, message)


def test_taps_that_cannot_be_matched():
    refused(SideBranch(), {"layers": ["side"]}, SiteError, "does not depend on 'side'")
    refused(
        nn.Sequential(nn.Flatten(0)), {"layers": ["0"]}, SiteError, "needs vectors, tokens or maps at '0'"
    )


def refused(model: nn.Module, options: dict[str, Any], error: type[Exception], message: str) -> None:
    before, kind = contents(model), type(model)
    with pytest.raises(error, match=message):
        patched(model, **options)
    assert type(model) is kind
    assert not any("_fxgraft" in m.__dict__ for m in model.modules())
    unchanged(model, before)


def test_other_networks_match_without_drift():
    source = wider()
    model = patched(net(), layers=["fc"], source=source, drift=0)
    step = fxgraft.gam.gam_losses(model, images(), images())
    assert "drift" not in step.parts
    step.mapping.backward()


def test_a_batch_of_one_has_no_batch_statistics():
    model = patched(layers=["fc"]).eval()
    for sizes in ((1, 4), (4, 1)):
        with pytest.raises(fxgraft.ConfigError, match=r"1 value per channel(.|\n)*statistics=\"running\""):
            fxgraft.gam.gam_losses(model, images(sizes[0]), images(sizes[1]))
    maps = patched(layers=["layer1"]).eval()
    assert torch.isfinite(fxgraft.gam.gam_losses(maps, images(1), images(1)).mapping)
    without = patched(layers=["fc"], matching=None).eval()
    assert torch.isfinite(fxgraft.gam.gam_losses(without, images(1), images(1)).mapping)


class Remembering(Net):
    """Keeps a value of its last pass, with its history."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.fc.weight * 1
        return super().forward(x)


def test_a_network_that_cannot_be_copied() -> None:
    model = Remembering()
    model(images())
    before = contents(model)
    with pytest.raises(ConfigError, match=r"Remembering cannot be copied(?s:.*)before the first"):
        fxgraft.patch(model, "gam", layers=TAPS)
    unchanged(model, before)
    with torch.no_grad():
        model(images())
    assert fxgraft.patch(model, "gam", layers=TAPS) is model


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "regnetx_002"])
def test_the_taps_that_the_error_proposes_can_be_merged(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    with pytest.raises(ConfigError, match="GAM needs layers") as caught:
        fxgraft.patch(model, "gam")
    found = re.search(r"layers=(\[.*?\])", str(caught.value))
    assert found is not None
    layers = ast.literal_eval(found[1])
    assert len(layers) == 2
    assert "cannot be merged" not in str(fxgraft.summary(fxgraft.patch(model, "gam", layers=layers)))
    x = torch.randn(4, *model.default_cfg["input_size"])
    fxgraft.gam.gam_losses(model.train(), x, x + 1)
    out = model.eval()(x)
    merged = fxgraft.merge(model)(x)
    torch.testing.assert_close(merged, out, rtol=0, atol=1e-4 * out.abs().max().item())
