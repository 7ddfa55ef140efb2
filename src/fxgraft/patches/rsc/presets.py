"""RSC as its authors, and DomainBed, ran it."""

from __future__ import annotations

from fxgraft.extend import Preset, Training, presets_by_name

RELEASE = "release, github.com/DeLightCMU/RSC"

PRESETS = presets_by_name(
    Preset(
        name="pacs",
        options={
            "scope": "both",
            "strategy": "top_gradient",
            "saliency": "grad_cam",
            "spatial_drop": 1 / 3,
            "channel_drop": 1 / 3.2,
            "batch_schedule": "authors",
        },
        source=f"{RELEASE}, Domain_Generalization",
        training=Training(
            network="ResNet-18 or ResNet-50, pretrained on ImageNet",
            data="PACS, 222 px",
            optimiser="SGD 0.01, momentum 0.9",
            schedule="×0.1 at 80 % of the epochs",
            weight_decay="5e-4",
            epochs=20,
            batch=64,
            augmentation="crops of 0.8 to 1, flip 0.5, jitter 0.4 (hue as well), grey 0.1",
            repetition="every batch is concatenated with its horizontal flip, which makes 128 rows",
        ),
        needs=("epochs",),
    ),
    Preset(
        name="imagenet",
        options={
            "scope": "spatial",
            "strategy": "random_top_half",
            "saliency": "grad_cam",
            "spatial_drop": 1 / 3,
            "batch_schedule": "imagenet",
        },
        source=f"{RELEASE}, ImageNet",
        training=Training(
            network="ResNet, pretrained on ImageNet",
            data="ImageNet, 224 px",
            optimiser="SGD 0.1, momentum 0.9",
            schedule="×0.1 every 20 epochs",
            epochs=90,
            batch=256,
            weight_decay="1e-4",
            augmentation="random resized crop, flip",
        ),
        needs=("epochs",),
    ),
    Preset(
        name="domainbed",
        options={"strategy": "top_gradient", "vector_drop": 1 / 3, "batch_share": 1 / 3},
        source="github.com/facebookresearch/DomainBed",
        training=Training(
            optimiser="Adam 5e-5",
            batch=32,
            weight_decay="0",
            note="layers= names the pooled vector (B, D); 32 images of every domain in a step, 5001 steps",
        ),
        needs=("layers",),
    ),
)
