"""Presets: published settings by name, what may be changed about them, and what a recipe keeps."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import timm
from rich.console import Console

import fxgraft
import recipes
from fxgraft import GAM, RSC, ConfigError, CrossNorm, Diversification, MixMo, SelfNorm, extend
from fxgraft.cli.method_card import card
from models.published import DenseNet, ResNet, ResNeXt

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


def test_mixmo_starts_from_scratch_and_leaves_repeating_to_the_sampler() -> None:
    made = {name: MixMo.preset(name) for name in MixMo.presets}
    assert {(each.init, each.members, each.repetitions) for each in made.values()} == {("random", 2, 1)}
    assert (made["cifar_cut"].p, made["cifar_cut"].decay, made["cifar_cut"].r) == (0.5, 1 / 12, 3.0)
    assert {name for name, each in made.items() if each.mixing == "sum"} == {"cifar_mimo"}
    assert (made["cifar_cut"].epochs, made["tiny_imagenet_cut"].epochs) == (300, 1200)
    assert made["tiny_imagenet_linear"] == made["cifar_linear"]
    for name, rows in (("cifar_cut", 64), ("tiny_imagenet_cut", 100)):
        training = MixMo.presets[name].training
        assert training.batch == rows
        assert f"fxgraft.mixmo.paired_loader(data, {rows}, repetitions=4)" in str(training)
        assert "cutmix=0.5 in the loader" in str(training)
    assert "1e-4" in str(MixMo.presets["tiny_imagenet_cut"].training.weight_decay)
    assert str(MixMo.presets["cifar_cut"].training.schedule).endswith("100, 200, 225")
    assert str(MixMo.presets["tiny_imagenet_cut"].training.schedule).endswith("599, 899")


def test_diversification_says_which_row_of_the_paper_is_which() -> None:
    block, paper = (Diversification.presets[name] for name in ("block", "paper"))
    assert ("86.3" in block.source, "87.7" in paper.source) == (True, True)
    assert (Diversification.preset("block").loss, Diversification.preset("paper").loss) == (
        None,
        "gradient_boosting",
    )
    assert Diversification.preset("block") == Diversification()


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
    options = recipes.read(fxgraft.save(model, tmp_path))[0]["grafts"][0]["options"]
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


@pytest.mark.parametrize(
    ("method", "name", "make", "match"),
    [
        (
            "crossnorm",
            "cifar10_densenet",
            lambda: DenseNet(4, layers=2, bottleneck=True),
            r"'cifar10_densenet' of 'crossnorm' was published for DenseNet-40 \(k = 12, no bottleneck\): 36 dense "
            "layers of 1 convolution. This network has 6 dense layers of 2 convolutions",
        ),
        (
            "crossnorm",
            "cifar100_resnext_cnsn",
            lambda: ResNeXt(4, cardinality=2),
            "9 residual blocks of 3 convolutions in 4 groups. This network has .* in 2 groups",
        ),
        (
            "selfnorm",
            "imagenet_cnsn_ibn_augmix",
            lambda: ResNet(4),
            "convolutions and InstanceNorm. This network has 16 residual blocks of 3 convolutions\\.",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:SelfNorm. init=.authors. opens each gate:fxgraft.FxgraftWarning")
def test_a_network_of_another_structure_is_named(method: str, name: str, make: Any, match: str) -> None:
    with pytest.warns(fxgraft.FxgraftWarning, match=match):
        fxgraft.patch(make(), method, preset=name, input_size=(3, 48, 48))
    with pytest.warns(fxgraft.FxgraftWarning, match=match):
        fxgraft.patch(make(), fxgraft.methods()[method].preset(name), input_size=(3, 48, 48), dry_run=True)


def test_a_network_without_the_places_is_refused_by_name() -> None:
    model = ResNeXt(4)
    keys = list(model.state_dict())
    with pytest.raises(
        fxgraft.StructureError,
        match=r"no dense layer in ResNeXt(?s:.*)'cifar10_densenet' of 'selfnorm' was published for",
    ):
        fxgraft.patch(model, "selfnorm", preset="cifar10_densenet", input_size=(3, 16, 16))
    assert list(model.state_dict()) == keys


def test_what_the_scripts_state_is_in_the_notes() -> None:
    for method in (CrossNorm, SelfNorm):
        for name, preset in method.presets.items():
            assert preset.source.startswith("release, github.com/amazon-science/crossnorm-selfnorm, "), name
            training = CrossNorm.presets[name].training if "_cnsn" in name else preset.training
            stated = (training.network, training.data, training.optimiser, training.schedule, training.epochs)
            assert None not in (*stated, training.batch, training.weight_decay, training.augmentation), name
            assert ("Nesterov" in str(training.optimiser)) == name.startswith("cifar"), name
            assert "not stated" not in str(training), name
    rates = {
        "imagenet_cnsn": ("SGD 0.05", 128),
        "imagenet_cnsn_ibn_augmix": ("SGD 0.1", 256),
        "cifar100_resnext_cnsn_consistency": ("SGD 0.05", 64),
        "cifar100_densenet_cnsn_consistency": ("SGD 0.1", 64),
        "gtav_fcn_cnsn": ("SGD 0.01", 16),
    }
    for name, (rate, batch) in rates.items():
        training = CrossNorm.presets[name].training
        assert (str(training.optimiser).startswith(rate), training.batch) == (True, batch), name
    rows = {f"cifar{n}_{net}{kind}" for n in (10, 100) for net in ("wrn", "resnext", "densenet", "allconv")
            for kind in ("", "_cnsn", "_cnsn_consistency", "_cnsn_augmix")}  # fmt: skip
    images = {f"imagenet{kind}" for kind in ("", "_cnsn", "_cnsn_consistency", "_cnsn_ibn_augmix")}
    assert {*CrossNorm.presets} == {*SelfNorm.presets} == rows | images | {"gtav_fcn_cnsn"}


def test_what_was_stated_of_the_other_methods() -> None:
    imagenet, pacs, domainbed = (RSC.presets[name].training for name in ("imagenet", "pacs", "domainbed"))
    assert "pretrained" in str(imagenet.network)
    assert (imagenet.schedule, imagenet.epochs, imagenet.batch) == ("×0.1 every 20 epochs", 90, 256)
    assert (pacs.batch, pacs.epochs, "128 rows" in str(pacs.repetition)) == (64, 20, True)
    assert (domainbed.optimiser, domainbed.weight_decay, domainbed.batch) == ("Adam 5e-5", "0", 32)
    digits = str(GAM.presets["digits"].training)
    assert all(word in digits for word in ("behind its ReLU", "train split alone", "95 %", "98 %", "2.5e-5"))
