"""Mistakes of users are found as early as they can be, and the message says what to do instead."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import fxgraft
from fxgraft.cli.method_card import card
from fxgraft.patches.registry import not_beside
from models.toys import LABELS, images, net

SIZE = (3, 8, 8)


def test_maps_too_small_for_diversification_are_found_when_patched() -> None:
    model = net()
    with pytest.raises(
        fxgraft.ConfigError, match=r"Patches of 5×5 cells are larger than the class maps of 4×4"
    ):
        fxgraft.patch(model, "diversification", patch=5, input_size=SIZE)
    assert fxgraft.grafts(model) == []


@pytest.mark.parametrize("order", [("mixmo", "crossnorm"), ("crossnorm", "mixmo")])
def test_mixmo_and_consistency_are_found_when_patched(order: tuple[str, str]) -> None:
    options: dict[str, Any] = {"crossnorm": {"consistency": True}, "mixmo": {}}
    model = fxgraft.patch(net(), order[0], input_size=SIZE, **options[order[0]])
    with pytest.raises(
        fxgraft.ConfigError,
        match=r"'crossnorm' runs the batch again(?s:.*)consistency=False(?s:.*)'mixmo' mixes",
    ):
        fxgraft.patch(model, order[1], input_size=SIZE, **options[order[1]])
    assert [graft.name for graft in fxgraft.grafts(model)] == [order[0]]
    never = {**options[order[1]], "p": 0.0}  # a comparison that is never made disturbs nobody
    if order[1] == "crossnorm":
        fxgraft.patch(model, "crossnorm", input_size=SIZE, **never)


@pytest.mark.parametrize("mark", [255, -1])
@pytest.mark.parametrize("method", ["rsc", "mixmo"])
def test_labels_of_no_class_hint_at_ignore_index(method: str, mark: int) -> None:
    model = fxgraft.patch(net(), method, input_size=SIZE)
    labels = LABELS.clone()
    labels[2] = mark
    with pytest.raises(
        fxgraft.TargetError, match=rf"(?s)Indices must lie in.*{mark} often marks.*ignore_index={mark}"
    ):
        model(images(), target=labels)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_pixels_of_no_class_say_how_to_leave_them_out() -> None:
    model, labels = Dense(), torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, 0] = 255
    fxgraft.patch(model, "rsc", layer="body", input_size=SIZE)
    with pytest.raises(fxgraft.TargetError, match="pass ignore_index=255 to the method and to the criterion"):
        model(images(2), target=labels)
    fxgraft.unpatch(model)
    fxgraft.patch(model, "rsc", layer="body", input_size=SIZE, ignore_index=255)
    model(images(2), target=labels)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, r"\['global_pool', 'fc'\]"), ({"task": "dense"}, r"\['conv1', 'maxpool', 'layer3', 'fc'\]")],
)
def test_gam_without_layers_says_which_there_may_be(options: dict[str, Any], expected: str) -> None:
    model = timm.create_model("resnet18", num_classes=4)
    with pytest.raises(
        fxgraft.ConfigError, match=rf"(?s)GAM needs layers.*On this ResNet, for example layers={expected}"
    ):
        fxgraft.patch(model, "gam", **options)


def test_the_layers_that_gam_proposes_work() -> None:
    for method in ("classification", "dense"):
        model = net()
        with pytest.raises(fxgraft.ConfigError) as error:
            fxgraft.patch(model, "gam", task=method, input_size=SIZE)
        proposed = str(error.value).partition("layers=")[2].partition("]")[0].strip("[").replace("'", "")
        fxgraft.patch(model, "gam", task=method, layers=proposed.split(", "), input_size=SIZE)
        fxgraft.gam.gam_losses(model, images(), images(seed=1)).mapping.backward()


@pytest.mark.parametrize("method", ["rsc", "selfnorm"])
def test_labels_by_position_are_told_their_name(method: str) -> None:
    model = fxgraft.patch(net(), method, input_size=SIZE)
    with pytest.raises(
        fxgraft.ConfigError, match="Net takes 1 positional argument, and 3 were given"
    ) as error:
        model(images(), LABELS, LABELS)
    assert isinstance(error.value, TypeError)
    plain = fxgraft.patch(timm.create_model("test_resnet"), method, input_size=(3, 32, 32))
    with pytest.raises(
        fxgraft.ConfigError,
        match=r"ResNet takes 1 positional argument, and 2 were given(?s:.*)model\(x, target=y\)",
    ):
        plain(torch.randn(4, 3, 32, 32), LABELS)


def test_training_without_gradients_is_said_once() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    with torch.no_grad():
        out = model(images(), target=LABELS)
        with pytest.warns(
            fxgraft.FxgraftWarning, match=r"in training mode with gradients switched off(?s:.*)nothing is"
        ):
            fxgraft.loss(model, out, LABELS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fxgraft.loss(model, out, LABELS)
            other = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE).eval()
            fxgraft.loss(other, other(images()), LABELS)


def test_a_method_that_pairs_labels_says_why() -> None:
    with pytest.raises(fxgraft.FxgraftError, match=r"says pairs_labels = True, and not why"):

        @fxgraft.register("silent_pairs")
        class Silent(fxgraft.MixMo):
            pairs_labels = True  # type: ignore[assignment]

    assert "silent_pairs" not in fxgraft.methods()


def test_the_methods_that_cannot_stand_beside_another_are_listed() -> None:
    known = fxgraft.methods()
    beside_mixmo = " ".join(not_beside(known["mixmo"]))
    assert "mixmo, which mixes images again in every pass and pairs labels as well" in beside_mixmo
    assert "crossnorm, where it runs the batch again" in beside_mixmo
    assert any("mixmo, which mixes images" in each for each in not_beside(known["crossnorm"]))
    assert not_beside(known["rsc"]) == []
    assert "not beside" in method_text("mixmo")
    assert "not beside" not in method_text("rsc")


def method_text(name: str) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(card(name))
    return console.export_text()
