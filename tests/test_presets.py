"""Presets: published settings by name, what may be changed about them, and what a recipe keeps."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import timm
from rich.console import Console

import fxgraft
from fxgraft import RSC, ConfigError, CrossNorm, SelfNorm, extend
from fxgraft.cli.cards import card

ALL = [
    (method, name)
    for method, cls in fxgraft.methods().items()
    if cls.__module__.startswith("fxgraft.")
    for name in cls.presets
]
NEEDS: dict[str, Any] = {"epochs": 20, "layers": -1}


@pytest.mark.parametrize(("method", "name"), ALL)
def test_every_preset_is_a_patch(method: str, name: str) -> None:
    cls = fxgraft.methods()[method]
    preset = cls.presets[name]
    assert preset.name == name
    assert preset.source
    made = cls.preset(name, **{each: NEEDS[each] for each in preset.needs})
    assert {key: getattr(made, key) for key in preset.options} == dict(preset.options)
    for each in preset.needs:
        others = {key: NEEDS[key] for key in preset.needs if key != each}
        with pytest.raises(
            ConfigError, match=f"preset {name!r} of {method!r} needs {each}.*\\nPass {each}=..."
        ):
            cls.preset(name, **others)


def test_rows_of_one_experiment_have_one_name() -> None:
    both = {name for name in CrossNorm.presets if "_cnsn" in name}
    assert both == {name for name in SelfNorm.presets if "_cnsn" in name}
    image = CrossNorm.preset("imagenet_cnsn_consistency")
    assert (image.layers, image.crop, image.consistency, image.consistency_weight) == (
        "input",
        "both",
        True,
        10.0,
    )
    assert SelfNorm.preset("imagenet_cnsn_ibn_augmix").position == "residual"
    assert SelfNorm.preset("cifar10_wrn").init == "authors"


def test_what_is_given_wins() -> None:
    made = CrossNorm.preset("imagenet", p=0.25, layer="layer1")
    assert (made.p, made.layers, made.crop) == (0.25, "layer1", "both")
    model = timm.create_model("test_resnet")
    fxgraft.patch(model, "rsc", preset="pacs", epochs=30, channel_drop=0.5)
    assert fxgraft.grafts(model)[0].patch == RSC(batch_schedule="authors", epochs=30, channel_drop=0.5)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("crossnorm", {"preset": "image_net"}, "no preset 'image_net'.\nClose matches: 'imagenet'"),
        ("crossnorm", {"preset": "imagenet", "gates": 1}, "'crossnorm' has no option 'gates'"),
        ("crossnorm", {"preset": "imagenet", "p": 2}, "p must be a share"),
        ("taps", {"preset": "any", "layers": -1}, "'taps' has no preset 'any'.\nThere are none"),
        ("rsc", {"preset": "pacs"}, "needs epochs"),
        ("rsc", {"preset": "domainbed", "layer": None}, "needs layers"),
    ],
)
def test_errors(method: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        fxgraft.patch(timm.create_model("test_resnet"), method, **options)
    with pytest.raises(ConfigError, match="cannot be added here"):
        fxgraft.patch(timm.create_model("test_resnet"), RSC(), preset="pacs")


def test_a_recipe_keeps_the_options(tmp_path: Path) -> None:
    model = fxgraft.patch(timm.create_model("test_resnet"), "rsc", preset="imagenet", epochs=90)
    recipe = json.loads((fxgraft.save(model, tmp_path) / "recipe.json").read_text())
    options = recipe["grafts"][0]["options"]
    assert "preset" not in options
    assert options == {
        "scope": "spatial", "strategy": "random_top_half", "batch_schedule": "imagenet", "epochs": 90,
    }  # fmt: skip
    assert fxgraft.grafts(fxgraft.load(timm.create_model("test_resnet"), tmp_path))[0].patch == RSC(**options)


def test_info_shows_them() -> None:
    console = Console(width=400, record=True)
    console.print(card("rsc"))
    text = console.export_text()
    for word in (
        "pacs",
        "release, github.com/DeLightCMU/RSC",
        "batch_schedule='authors'",
        "×0.1 at 80 %",
        "epochs=…",
    ):
        assert word in text


def test_a_method_from_outside_has_its_own() -> None:
    made = extend.Preset(name="a", options={"p": 0.1}, source="here", training=extend.Training(epochs=3))
    assert extend.presets_by_name(made)["a"] is made
    assert str(made.training) == "epochs: 3"
    assert "preset" in inspect.signature(fxgraft.patch).parameters
    assert all(f.name != "preset" for cls in fxgraft.methods().values() for f in dataclasses.fields(cls))
