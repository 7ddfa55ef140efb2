"""MixMo and MIMO as the authors of MixMo ran them."""

from __future__ import annotations

from typing import Any

from fxgraft.extend import Preset, Training, presets_by_name

SOURCE = "release, github.com/alexrame/mixmo-pytorch, config"
# The release repeats and pairs in its loader, where each member's image is augmented by itself, and not in the network.
START: dict[str, Any] = {"members": 2, "init": "random", "repetitions": 1}
DRAWN: dict[str, Any] = {**START, "alpha": 2.0, "r": 3.0}
MIXINGS: dict[str, dict[str, Any]] = {
    "linear": {**DRAWN, "mixing": "linear"},
    "cut": {**DRAWN, "mixing": "cut", "p": 0.5, "decay": 1 / 12, "shuffle_roles": True},
    # Equal parts and equal weights: what the release writes as alpha 0 and root 1.
    "mimo": {**START, "mixing": "sum"},
}


def _repetition(batch: int) -> str:
    return (
        "each image 4 times, loaded and augmented for every member by itself: "
        f"fxgraft.mixmo.paired_loader(data, {batch}, repetitions=4), that is {batch // 4} images; "
        "pairing by the patch itself is the cheaper way"
    )


NOTE = (
    "epochs count from 0 (the release's configuration counts from 1, so torch's MultiStepLR has these milestones); "
    "warm-up from 0 over the first epoch; rows with CutMix: cutmix=0.5 in the loader, a coin for each image and a "
    "partner from all of the data"
)
CIFAR = Training(
    network="WRN-28-10 without a pooling stem, from scratch",
    data="CIFAR-10 or CIFAR-100, 32 px",
    optimiser="SGD 0.0125, momentum 0.9, Nesterov (the single network without repetition: 0.05)",
    schedule="×0.1 at epochs 100, 200, 225",
    epochs=300,
    batch=64,
    weight_decay="3e-4 times the sum of squares in the loss, that is 6e-4, on every parameter",
    augmentation="crop 32 with padding 4, flip",
    repetition=_repetition(64),
    note=NOTE,
)
TINY_IMAGENET = Training(
    network="pre-activation ResNet-18 of width 1, 2 or 3, from scratch",
    data="Tiny ImageNet, 64 px",
    optimiser="SGD 0.05, momentum 0.9, Nesterov (the single network without repetition: 0.2)",
    schedule="×0.1 at epochs 599, 899",
    epochs=1200,
    batch=100,
    weight_decay="1e-4, on every parameter; nothing in the loss",
    augmentation="flip, crop 64 with padding 4",
    repetition=_repetition(100),
    note=NOTE,
)

PRESETS = presets_by_name(
    *(
        Preset(
            name=f"{data}_{name}",
            # Its probability falls by epochs, to exactly 0 in the last.
            options={**MIXINGS[name], **({"epochs": training.epochs} if name == "cut" else {})},
            source=f"{SOURCE}/{folder}",
            training=training,
        )
        for data, folder, training, names in (
            ("cifar", "cifar10 and cifar100", CIFAR, ("linear", "cut", "mimo")),
            ("tiny_imagenet", "tiny", TINY_IMAGENET, ("linear", "cut")),
        )
        for name in names
    )
)
