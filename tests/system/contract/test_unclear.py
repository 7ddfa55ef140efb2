"""What other tools, or calls of another kind, meet on a patched model: an error that says what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations
from torchvision.models.feature_extraction import create_feature_extractor

import fxgraft
from fxgraft.errors import BypassError, ConfigError, SiteError, StructureError, WrappedModelError
from fxgraft.models import build_model
from models.toys import images, net


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 2


@pytest.mark.parametrize("method", ["rsc", "selfnorm"])
@pytest.mark.parametrize(
    "wrap", [lambda m: m, Wrapped, lambda m: m.stage1[0]], ids=["alone", "inside", "part"]
)
def test_tracers_of_others_are_told_to_merge_first(method: str, wrap: Any) -> None:
    model = wrap(fxgraft.patch(net(), method, input_size=(3, 8, 8)))
    if not hasattr(type(model), "_fxgraft_base") and not isinstance(model, Wrapped):
        pytest.skip("this part is not grafted")
    for trace in (fx.symbolic_trace, lambda m: create_feature_extractor(m, ["fc"])):
        with pytest.raises(BypassError, match=r"torch\.fx is tracing a patched .*\n.*\nTrace fxgraft\.merge"):
            trace(model)


class Crops(nn.Module):
    """Takes a batch, or a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, list):
            x = torch.cat(x)
        x = self.stem(x)
        x = torch.relu(x + self.conv(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["selfnorm", "rsc", "crossnorm"])
def test_a_list_where_the_forward_was_traced_with_a_tensor_is_refused(method: str) -> None:
    model = fxgraft.patch(Crops(), method, input_size=(3, 16, 16)).train()
    y = torch.arange(8) % 4
    model(images(8), target=y)
    with pytest.raises(BypassError, match=r"another structure.*\n.*\n.*join the list before \(torch\.cat\)"):
        model([images(), images()], target=y)


def test_a_list_for_a_patch_that_acts_on_the_input_is_refused() -> None:
    model = fxgraft.patch(Crops(), "mixmo", input_size=(3, 16, 16)).train()
    with pytest.raises(ConfigError, match="given a list of images, and a patch acts on its input"):
        model([images(), images()], target=torch.arange(8) % 4)


@pytest.mark.parametrize("act", [copy.deepcopy, fxgraft.merge], ids=["copy", "merge"])
def test_a_grafted_layer_that_was_parametrized_says_so_when_copied(act: Any) -> None:
    model = fxgraft.patch(net(), "taps", layers=["stem.second"], input_size=(3, 8, 8))
    parametrizations.weight_norm(model.stem.second)
    with pytest.raises(
        WrappedModelError, match=r"'stem\.second' was wrapped or converted after it was patched"
    ):
        act(model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization_does_not_pass_over_a_grafted_layer_in_silence() -> None:
    model = fxgraft.patch(net().eval(), "taps", layers=["fc"], input_size=(3, 8, 8))
    with pytest.raises(
        WrappedModelError, match="Quantization would pass over 'fc', a Linear that is grafted"
    ):
        quantize_dynamic(model, {nn.Linear})
    assert not any(hasattr(each, "qconfig") for each in model.modules())


def test_models_of_a_hub_say_that_they_come_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("timm.create_model", offline)
    for name, options in (("hf-hub:timm/resnet18", {}), ("resnet18", {"pretrained": True})):
        with pytest.raises(ConfigError, match=r"could not fetch .*ConnectionError.*\n.*network"):
            build_model(name, **options)


class Several(Crops):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(self.stem(x)).amax((2, 3))
        return {"a": self.fc(x), "b": self.fc(x) * 2}


def test_rsc_asks_for_the_entry_that_holds_the_logits() -> None:
    with pytest.raises(
        StructureError, match=r"It has: 'a', 'b'\.\nSay which one holds the logits, as output="
    ):
        fxgraft.patch(Several(), "rsc", input_size=(3, 8, 8))


class Volume(Crops):
    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.volume(self.stem(x).unsqueeze(1)).mean((1, 3, 4)))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            None,
            r"layout of 'volume', of shape .*, cannot be told(?s:.*)pass layout= to a method that takes it: .*NCDHW",
        ),
        ("NCHW", r"'volume' was said to be NCHW, but its shape is .*\n.*pass one of .*NCDHW"),
    ],
)
def test_a_volume_made_of_channels_asks_for_its_layout(layout: str | None, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        fxgraft.patch(Volume(), "rsc", layer="volume", layout=layout, input_size=(3, 8, 8))
    fxgraft.patch(model := Volume(), "rsc", layer="volume", layout="NCDHW", input_size=(3, 8, 8))
    assert "NCDHW" in str(fxgraft.summary(model))
