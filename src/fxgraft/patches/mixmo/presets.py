"""MixMo and MIMO as the authors of MixMo ran them."""

from __future__ import annotations

from typing import Any

from fxgraft.extend import Preset, Training, presets_by_name

SOURCE = "release, github.com/alexrame/mixmo-pytorch, config"
# The release repeats in its sampler, so that every copy is augmented anew, and not in the network.
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
        f"each image 4 times, augmented anew each time: RepeatedBatchSampler(batch_size={batch}, repetitions=4), "
        f"that is {batch // 4} images"
    )


NOTE = (
    "warm-up from 0 over the first epoch; rows with CutMix: fxgraft.input_cutmix(x, y, alpha=1) on the images, with "
    "probability 0.5"
)
CIFAR = Training(
    network="WRN-28-10 without a pooling stem, from scratch",
    data="CIFAR-10 or CIFAR-100",
    optimiser="SGD 0.0125, momentum 0.9, Nesterov (the single network without repetition: 0.05)",
    schedule="×0.1 at epochs 101, 201, 226",
    epochs=300,
    batch=64,
    weight_decay="3e-4 times the sum of squares in the loss, that is 6e-4, on every parameter",
    repetition=_repetition(64),
    note=NOTE,
)
TINY_IMAGENET = Training(
    network="pre-activation ResNet-18 of width 1, 2 or 3, from scratch",
    data="Tiny ImageNet",
    optimiser="SGD 0.05, momentum 0.9, Nesterov (the single network without repetition: 0.2)",
    schedule="×0.1 at epochs 600, 900",
    epochs=1200,
    batch=100,
    weight_decay="0",
    repetition=_repetition(100),
    note=NOTE,
)

PRESETS = presets_by_name(
    *(
        Preset(name=f"{data}_{name}", options=options, source=SOURCE, training=training)
        for data, training in (("cifar", CIFAR), ("tiny_imagenet", TINY_IMAGENET))
        for name, options in MIXINGS.items()
    )
)
