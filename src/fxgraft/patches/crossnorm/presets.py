"""CrossNorm as its authors ran it: alone, and (``..._cnsn``) with SelfNorm's preset of the same name.

Settings and training are those of the scripts of the release, one for each preset, with its training programs
``cifar.py``, ``imagenet.py`` and ``segmentation/tool/train_cnsn.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fxgraft.extend import Preset, Structure, Training, presets_by_name

RELEASE = "release, github.com/amazon-science/crossnorm-selfnorm"

NETWORKS: dict[str, tuple[str, str, int, str, Structure]] = {
    # folder of the scripts, network, epochs, weight decay, structure
    "wrn": ("wideresnet", "WRN-40-2", 100, "5e-4", Structure(blocks="residual blocks", units=18, convolutions=2)),
    "resnext": (
        "resnext", "ResNeXt-29 (4×32)", 200, "5e-4",
        Structure(blocks="residual blocks", units=9, convolutions=3, groups=4),
    ),
    "densenet": (
        "densenet", "DenseNet-40 (k = 12, no bottleneck)", 200, "1e-4",
        Structure(blocks="dense layers", units=36, convolutions=1),
    ),
    "allconv": ("allconv", "AllConv", 100, "5e-4", Structure(blocks="conv sites", units=9)),
}  # fmt: skip
PLACES = {"wrn": "post", "resnext": "output", "densenet": "conv1_pre", "allconv": "conv"}
SCRIPTS = {"": "cn", "_cnsn": "cnsn", "_cnsn_consistency": "cnsn-consist", "_cnsn_augmix": "cnsn-augmix"}

# crop, p, active
CIFAR: dict[str, dict[str, tuple[str, float, int]]] = {
    "cifar10_wrn": {
        "": ("neither", 0.5, 2),
        "_cnsn": ("both", 0.25, 2),
        "_cnsn_consistency": ("both", 0.75, 2),
        "_cnsn_augmix": ("style", 0.75, 1),
    },
    "cifar100_wrn": {
        "": ("neither", 0.5, 2),
        "_cnsn": ("both", 0.25, 2),
        "_cnsn_consistency": ("both", 0.5, 2),
        "_cnsn_augmix": ("both", 0.25, 2),
    },
    "cifar10_resnext": {
        "": ("neither", 0.5, 1),
        "_cnsn": ("neither", 0.25, 1),
        "_cnsn_consistency": ("neither", 0.5, 1),
        "_cnsn_augmix": ("neither", 0.25, 1),
    },
    "cifar100_resnext": {
        "": ("neither", 0.25, 1),
        "_cnsn": ("neither", 0.5, 1),
        "_cnsn_consistency": ("neither", 0.25, 1),
        "_cnsn_augmix": ("neither", 0.5, 1),
    },
    "cifar10_densenet": {
        "": ("neither", 0.25, 1),
        "_cnsn": ("both", 0.5, 1),
        "_cnsn_consistency": ("content", 0.25, 1),
        "_cnsn_augmix": ("both", 0.5, 2),
    },
    "cifar100_densenet": {
        "": ("neither", 0.25, 1),
        "_cnsn": ("both", 0.25, 2),
        "_cnsn_consistency": ("neither", 0.25, 2),
        "_cnsn_augmix": ("both", 0.5, 1),
    },
    "cifar10_allconv": {
        "": ("neither", 0.5, 1),
        "_cnsn": ("style", 0.5, 2),
        "_cnsn_consistency": ("style", 0.75, 2),
        "_cnsn_augmix": ("style", 0.25, 1),
    },
    "cifar100_allconv": {
        "": ("neither", 0.5, 1),
        "_cnsn": ("style", 0.5, 1),
        "_cnsn_consistency": ("style", 0.25, 1),
        "_cnsn_augmix": ("style", 0.25, 1),
    },
}
# batch and learning rate, where they are not 128 and 0.1
BATCHES = {
    "cifar100_resnext_cnsn_consistency": (64, "0.05"),
    "cifar100_densenet_cnsn_consistency": (64, "0.1"),
}

VIEWS = (
    "the batch is the clean images and two AugMix views of them, one after the other; the loss is the cross-entropy of "
    "the clean ones + 12 · fxgraft.functional.jensen_shannon of the three"
)


def _options(where: dict[str, Any], crop: str, p: float, active: int, **more: Any) -> dict[str, Any]:
    return {**where, "crop": crop, "p": p, "active": active, "beta": 1.0, "threshold": 0.1, **more}


def _cifar(row: str, kind: str, crop: str, p: float, active: int) -> Preset:
    data, key = row.split("_")
    folder, network, epochs, decay, structure = NETWORKS[key]
    name = row + kind
    batch, rate = BATCHES.get(name, (128, "0.1"))
    augmix = kind == "_cnsn_augmix"
    notes = [f"with selfnorm's preset {name!r}"] if kind else []
    notes += (
        [f"{VIEWS}, and where it compares + 10 · that of the clean ones and two CrossNorm passes"]
        if augmix
        else []
    )
    more: dict[str, Any] = (
        {"consistency": True, "consistency_weight": 10.0} if len(kind) > len("_cnsn") else {}
    )
    more |= {"views": 3} if augmix else {}
    training = Training(
        network=f"{network}, from scratch",
        data=f"CIFAR-{data.removeprefix('cifar')}, 32 px, normalised by mean 0.5 and deviation 0.5",
        optimiser=f"SGD {rate}, momentum 0.9, Nesterov",
        schedule="cosine to 1e-6, step by step",
        epochs=epochs,
        batch=batch,
        weight_decay=f"{decay}, on every parameter",
        augmentation="flip, crop 32 with padding 4"
        + (", AugMix of width 3 and severity 3" if augmix else ""),
        note="; ".join(notes) or None,
    )
    return Preset(
        name=name,
        options=_options({"position": PLACES[key]}, crop, p, active, **more),
        source=f"{RELEASE}, {data}-scripts/{folder}/run-{SCRIPTS[kind]}.sh",
        training=training,
        structure=structure,
    )


def _imagenet(kind: str, crop: str, script: str, note: str | None, **more: Any) -> Preset:
    name = f"imagenet{kind}"
    training = Training(
        network="ResNet-50, from scratch" if kind else "ResNet-50, from pretrained weights",
        data="ImageNet, 224 px",
        optimiser="SGD 0.05 (0.1 · batch / 256), momentum 0.9",
        schedule="×0.1 at epochs 30 and 60",
        epochs=90,
        batch=128,
        weight_decay="1e-4, on every parameter",
        augmentation="random resized crop, flip",
        note=f"with selfnorm's preset {name!r}" if kind else None,
    )
    if note is not None:
        training = dataclasses.replace(
            training,
            network="ResNet-50-IBN-b, from scratch",
            optimiser="SGD 0.1, momentum 0.9",
            batch=256,
            augmentation="random resized crop, flip, AugMix of width 3 and severity 1",
            note=f"{training.note}; {note}",
        )
    options = _options({"layers": "input"}, crop, 0.5, 1, **more)
    return Preset(
        name=name, options=options, source=f"{RELEASE}, imagenet-scripts/{script}.sh", training=training
    )


GTAV = Preset(
    name="gtav_fcn_cnsn",
    options=_options({"position": "output"}, "style", 0.5, 1),
    source=f"{RELEASE}, segmentation/config/gtav/gtav_fcn50_cnsn.yaml",
    training=Training(
        network="dilated FCN-ResNet-50",
        data="GTAV, 713 px, evaluated on Cityscapes",
        optimiser="SGD 0.01 (the head 0.1), momentum 0.9",
        schedule="polynomial of power 0.9, step by step",
        epochs=80,
        batch=16,
        weight_decay="1e-4, on every parameter",
        augmentation="scale 0.5 to 2, rotation ±10°, blur, flip, crop 713",
        note="with selfnorm's preset 'gtav_fcn_cnsn'; auxiliary head, weight 0.4",
    ),
    structure=Structure(blocks="residual blocks", units=16, convolutions=3),
)

PRESETS = presets_by_name(
    _imagenet("", "both", "run-cn", None),
    _imagenet("_cnsn", "neither", "run-cnsn", None),
    _imagenet(
        "_cnsn_consistency", "both", "run-cnsn-consist", None, consistency=True, consistency_weight=10.0
    ),
    _imagenet("_cnsn_ibn_augmix", "neither", "run-cnsn-augmix", f"{VIEWS}; CrossNorm acts on all of them"),
    *(_cifar(row, kind, *setting) for row, kinds in CIFAR.items() for kind, setting in kinds.items()),
    GTAV,
)
