"""CrossNorm as its authors ran it: alone, and (``..._cnsn``) with SelfNorm's preset of the same name."""

from __future__ import annotations

from fxgraft.extend import Preset, Training, presets_by_name

SOURCE = "release, github.com/amazon-research/crossnorm-selfnorm"


def _preset(
    name: str,
    network: str,
    data: str,
    where: str,
    crop: str,
    p: float,
    active: int,
    *,
    consistency: float | None = None,
    epochs: int | None = None,
    decay: str | None = None,
    note: str | None = None,
) -> Preset:
    together = f"with selfnorm's preset {name!r}" if "_cnsn" in name else None
    training = Training(
        network=network,
        data=data,
        optimiser="SGD 0.1, momentum 0.9",
        epochs=epochs,
        batch=128,
        weight_decay=f"{decay or 'not stated'}, on every parameter",
        note="; ".join(each for each in (together, note) if each) or None,
    )
    options = {
        **({"layers": "input"} if where == "input" else {"position": where}),
        "crop": crop,
        "p": p,
        "active": active,
        "beta": 1.0,
        "threshold": 0.1,
        **({} if consistency is None else {"consistency": True, "consistency_weight": consistency}),
    }
    return Preset(name=name, options=options, source=SOURCE, training=training)


_IMAGENET = ("ResNet-50", "ImageNet", "input")
_WRN = ("WRN-40-2", "CIFAR-10", "post")
_WRN_100 = ("WRN-40-2", "CIFAR-100", "post")
_RESNEXT = ("ResNeXt-29", "CIFAR-10", "output")
_RESNEXT_100 = ("ResNeXt-29", "CIFAR-100", "output")
_DENSE = ("DenseNet", "CIFAR-10", "conv1_pre")
_ALLCONV = ("AllConv", "CIFAR-10", "conv")

PRESETS = presets_by_name(
    _preset("imagenet", *_IMAGENET, "both", 0.5, 1, note="from pretrained weights"),
    _preset("imagenet_cnsn", *_IMAGENET, "neither", 0.5, 1, epochs=90, decay="1e-4"),
    _preset("imagenet_cnsn_consistency", *_IMAGENET, "both", 0.5, 1, consistency=10.0, epochs=90, decay="1e-4"),
    _preset(
        "imagenet_cnsn_ibn_augmix", *_IMAGENET, "neither", 0.5, 1, epochs=90, decay="1e-4",
        note="with IBN in the network and AugMix on the images",
    ),
    _preset("cifar10_wrn", *_WRN, "neither", 0.5, 2, epochs=100, decay="5e-4"),
    _preset("cifar10_wrn_cnsn", *_WRN, "both", 0.25, 2),
    _preset("cifar10_wrn_cnsn_consistency", *_WRN, "both", 0.75, 2, consistency=10.0),
    _preset("cifar100_wrn", *_WRN_100, "neither", 0.5, 2, epochs=100, decay="5e-4"),
    _preset("cifar100_wrn_cnsn", *_WRN_100, "both", 0.25, 2),
    _preset("cifar100_wrn_cnsn_consistency", *_WRN_100, "both", 0.5, 2, consistency=10.0),
    _preset("cifar10_resnext", *_RESNEXT, "neither", 0.5, 1, epochs=200, decay="5e-4"),
    _preset("cifar10_resnext_cnsn", *_RESNEXT, "neither", 0.25, 1),
    _preset("cifar10_resnext_cnsn_consistency", *_RESNEXT, "neither", 0.5, 1, consistency=10.0),
    _preset("cifar100_resnext_cnsn", *_RESNEXT_100, "neither", 0.5, 1),
    _preset("cifar100_resnext_cnsn_consistency", *_RESNEXT_100, "neither", 0.25, 1, consistency=10.0),
    _preset("cifar10_densenet", *_DENSE, "neither", 0.25, 1, epochs=200, decay="1e-4"),
    _preset("cifar10_densenet_cnsn", *_DENSE, "both", 0.5, 1),
    _preset("cifar100_densenet_cnsn", "DenseNet", "CIFAR-100", "conv1_pre", "both", 0.25, 2),
    _preset("cifar10_allconv", *_ALLCONV, "neither", 0.5, 1, epochs=100, decay="5e-4"),
    _preset("cifar10_allconv_cnsn", *_ALLCONV, "style", 0.5, 2),
)  # fmt: skip
