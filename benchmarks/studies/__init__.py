"""The studies, by name: declarations and nothing else. ``python -m benchmarks study NAME`` runs one.

Each was fixed, and its number of seeds chosen, before its first run.
"""

from __future__ import annotations

from typing import Any

from benchmarks.studies.cutmix import CutMix
from benchmarks.studies.digits import write_digits
from benchmarks.studies.heads import head_alone
from benchmarks.studies.measures import member_scores
from benchmarks.studies.study import Claim, Study

NETWORKS = "benchmarks.studies.networks"
LITE0 = "ImageNet EfficientNet-Lite0, 96 px"

PACS_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS: dict[str, Any] = {
    "about": f"PACS, each domain held out, {LITE0}",
    "needs": tuple(f"pacs96_{name}.tar" for name in PACS_DOMAINS),
    "data": lambda data, _: data / "pacs96_*.tar",
    "folder": "pacs",
    "tasks": PACS_DOMAINS,
    "options": {
        "model": f"{NETWORKS}:lite0",
        "hold_out": "all",
        "per_class": 50,
        "size": 96,
        # Close to RSC's release, at a smaller size: SGD at 0.01, crops, flips, jitter and grey.
        "training": {
            "epochs": 6,
            "batch_size": 32,
            "opt": "sgd",
            "lr": 0.01,
            "weight_decay": 5e-4,
            "train_crop": 0.8,
            "color_jitter": 0.4,
            "grayscale": 0.1,
            "channels_last": True,
        },
    },
}
RSC = "rsc:preset=pacs,epochs=6"
IMAGE_STYLES = "crossnorm:layers=input,crop=both,p=0.5,active=1"
EARLIER_PACS = "six pairs of an earlier study, on two domains"

GROCERY: dict[str, Any] = {
    "needs": tuple(f"grocery128_{name}.tar" for name in ("train", "val", "test")),
    "data": lambda data, _: data / "grocery128_*.tar",
}
BLOCK_AND_LOSS: dict[str, Any] = {
    "variant": "diversification:preset=paper",
    "paper": "fine-grained, block and loss: 85.5 → 87.7 %",
}
EACH_ALONE = (
    Claim(variant="diversification:preset=block", paper="fine-grained, the block alone: 85.5 → 86.3 %"),
    # alpha=1 damps nothing: this trains the plain head with the other loss.
    Claim(
        variant="diversification:alpha=1.0,loss=gradient_boosting",
        paper="the loss alone is not in the paper",
    ),
)

CIFAR: dict[str, Any] = {
    "needs": ("cifar10_train.tar", "cifar10_test.tar"),
    "data": lambda data, _: data / "cifar10_*.tar",
}
CIFAR_TRAINING: dict[str, Any] = {
    "amp": True,  # 1.6 times as many steps a second on a core
    "opt": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "train_crop": 0.6,
    "color_jitter": 0.0,
    "grayscale": 0.0,
    "channels_last": True,
}
CUT = "mixmo:preset=cifar_cut,epochs=200"
CIFAR_C = "CIFAR-10-C, mean corruption error about 12 points lower with both"

DIGITS: dict[str, Any] = {"needs": ("digits.npz",), "data": write_digits, "tasks": ("mnist", "usps")}
DIGITS_IMAGES: dict[str, Any] = {"train_crop": 1.0, "hflip": 0.0, "color_jitter": 0.0, "grayscale": 0.0}
GAM = "gam:preset=digits,layers=[fc3,fc4]"
GAM_PAPER = "MNIST → USPS 95 %, USPS → MNIST 98 % after 10 000 steps, on training images"
GONE = "it ran in a training loop that the comparison replaced; its protocol stands beside the runs"

_ALL = (
    Study(
        name="digits_adabn",
        about="MNIST and USPS, each held out, LeNet with BatchNorm",
        claims=(
            Claim(
                variant="adapt_batchnorm",
                paper="adapts without labels; digits are not in the paper",
                headline=True,
            ),
        ),
        seeds=10,
        deviation=0.075,
        gain=0.05,
        pilot="two other seeds, both directions",
        **DIGITS,
        options={
            "model": f"{NETWORKS}:LeNet",
            "model_options": {"norms": True},
            "hold_out": "all",
            "per_class": 300,
            "test_per_class": 200,
            "size": 28,
            "training": {"epochs": 6, "batch_size": 64, "lr": 1e-3, **DIGITS_IMAGES},
        },
    ),
    Study(
        name="digits_gam",
        about="from MNIST to USPS and back, LeNet",
        claims=(Claim(variant=GAM, paper=GAM_PAPER, headline=True),),
        seeds=3,
        deviation=0.027,
        gain=0.05,
        pilot="six pairs of digits_gam_first: of one direction",
        **DIGITS,
        options={
            "model": f"{NETWORKS}:LeNet",
            "hold_out": "all",
            "size": 28,
            "adapt_steps": 10_000,
            "adapt_lr": 2e-4,
            "training": {"epochs": 3, "batch_size": 128, "lr": 1e-3, **DIGITS_IMAGES},
        },
    ),
    Study(
        name="digits_gam_first",
        about="MNIST and USPS, trained on the one and adapted to the other for 10 000 steps, LeNet; test images",
        claims=(Claim(variant="gam:preset=digits", paper=GAM_PAPER),),
        seeds=3,
        deviation=0.027,
        gain=0.05,
        pilot="none",
        tasks=("mnist", "usps"),
        closed=GONE,
    ),
    Study(
        name="scenes",
        about="segmentation of generated scenes in another style, a small FCN",
        claims=(
            Claim(variant="adapt_batchnorm", paper="where adaptation of dense predictors starts"),
            Claim(
                variant="adapt_batchnorm, then gam",
                against="adapt_batchnorm",
                paper="segmentation across domains: gains over AdaBN",
            ),
        ),
        seeds=3,
        deviation=0.064,
        gain=0.05,
        pilot="none",
        unit="mean IoU",
        closed=GONE,
    ),
    Study(
        name="grocery_head",
        about="Grocery Store, 81 look-alike classes, the classifier on frozen maps of EfficientNet-Lite0, 96 px",
        claims=(Claim(**BLOCK_AND_LOSS), *EACH_ALONE),
        seeds=20,
        deviation=0.014,
        gain=0.011,
        pilot="none: the largest deviation at which twenty pairs show half of the paper's gain",
        **GROCERY,
        options={
            "model": f"{NETWORKS}:FrozenLite0",
            "size": 96,
            "train": head_alone,
            "training": DIGITS_IMAGES,
        },
    ),
    Study(
        name="grocery",
        about=f"81 look-alike groceries, stride 16, {LITE0}",
        claims=(Claim(**BLOCK_AND_LOSS, headline=True), *EACH_ALONE),
        seeds=12,
        deviation=0.02,
        gain=0.022,
        pilot="eight pairs of an earlier study, on PACS",
        **GROCERY,
        options={
            "model": f"{NETWORKS}:lite0",
            "model_options": {"output_stride": 16},
            "size": 96,
            # The block damps half of every map and learns more slowly: at eight epochs its loss was still at 0.77.
            "training": {
                "epochs": 24,
                "batch_size": 32,
                "opt": "sgd",
                "lr": 0.01,
                "weight_decay": 5e-4,
                "train_crop": 0.8,
                "color_jitter": 0.2,
                "grayscale": 0.0,
                "channels_last": True,
            },
        },
    ),
    Study(
        name="pacs_rsc",
        claims=(
            Claim(
                variant=RSC,
                paper="PACS, ResNet-18, mean of four unseen domains: 79.9 → 85.2 %",
                headline=True,
            ),
        ),
        seeds=8,
        deviation=0.049,
        gain=0.0265,  # half of the paper's
        pilot=EARLIER_PACS,
        **PACS,
    ),
    Study(
        name="pacs_styles",
        claims=(
            Claim(
                variant=IMAGE_STYLES,
                paper="helps under distribution shift; PACS is not in the paper",
            ),
        ),
        seeds=5,
        deviation=0.035,
        gain=0.025,
        pilot=EARLIER_PACS,
        **PACS,
    ),
    Study(
        name="pacs_neighbours",
        claims=(
            Claim(
                variant="mixstyle:preset=pacs",
                paper="PACS, ResNet-18: 79.5 → 82.8 %, without domain labels",
                headline=True,
            ),
            Claim(
                variant="mixstyle:preset=pacs,match=histogram",
                paper="EFDMix, PACS, ResNet-18: ahead of MixStyle, with domain labels",
            ),
            Claim(variant="dsu:preset=pacs", paper="PACS, ResNet-18: 79.0 → 84.1 %", headline=True),
        ),
        seeds=8,
        deviation=0.049,
        gain=0.03,
        pilot=EARLIER_PACS,
        **PACS,
    ),
    Study(
        name="pacs_rsc_ablation",
        claims=(
            Claim(
                variant=RSC, against=f"{RSC},strategy=random", paper="the gradient chooses better than chance"
            ),
            Claim(
                variant=RSC, against=f"{RSC},strategy=top_activation", paper="and better than the activation"
            ),
        ),
        seeds=8,
        deviation=0.049,
        gain=0.03,
        pilot=EARLIER_PACS,
        **PACS,
    ),
    Study(
        name="cifar_corruptions",
        about="corrupted CIFAR-10, WRN-10-1",
        claims=(
            Claim(variant="crossnorm:preset=cifar10_wrn", paper=CIFAR_C, headline=True),
            Claim(variant="selfnorm:preset=cifar10_wrn", paper=CIFAR_C, headline=True),
            Claim(
                variant="crossnorm:preset=cifar10_wrn_cnsn + selfnorm:preset=cifar10_wrn_cnsn",
                paper=CIFAR_C,
                headline=True,
            ),
        ),
        seeds=6,
        deviation=0.022,
        gain=0.06,
        pilot="three pairs of an earlier study, from ImageNet weights",
        **CIFAR,
        options={
            "model": f"{NETWORKS}:WideResNet",
            "model_options": {"depth": 10, "width": 1},
            "size": 32,
            "corrupt": True,
            "per_class": 1000,
            "test_per_class": 100,
            "training": {"epochs": 30, "batch_size": 128, **CIFAR_TRAINING},
        },
    ),
    Study(
        name="mixmo_small",
        about="CIFAR-10, 2500 images, 200 epochs, WRN-10-2",
        claims=(
            Claim(variant=CUT, paper="CIFAR-100, WRN-28-10: 81.8 → 85.5 %", headline=True),
            Claim(variant="mixmo:preset=cifar_linear", paper="CIFAR-100, WRN-28-10: 81.8 → 83.0 %"),
            Claim(variant="mixmo:preset=cifar_mimo", paper="MIMO, CIFAR-100, WRN-28-10: 81.8 → 82.9 %"),
            Claim(variant=CutMix.method, paper="CutMix alone, CIFAR-100, WRN-28-10: 81.8 → 84.0 %"),
            Claim(variant=CUT, against=CutMix.method, paper="beyond CutMix, CIFAR-100: 84.0 → 85.5 %"),
        ),
        seeds=8,
        deviation=0.011,
        gain=0.0185,
        pilot="cifar_corruptions, whose pairs deviate by 0.7 to 1.0 points, and a tenth more",
        **CIFAR,
        options={
            "model": f"{NETWORKS}:WideResNet",
            "model_options": {"depth": 10, "width": 2, "stride": 2},
            "size": 32,
            "per_class": 278,  # of which a tenth is set apart
            "measure": member_scores,
            # The release's rate for one network without repetition.
            "training": {"epochs": 200, "batch_size": 64, **CIFAR_TRAINING, "lr": 0.05},
        },
    ),
    Study(
        name="mixmo_pretrained",
        about=f"CIFAR-10, 8 epochs, {LITE0}",
        claims=(
            Claim(
                variant="mixmo:mixing=cut",
                paper="CIFAR-100, WRN-28-10 from scratch: 81.8 → 85.5 %",
            ),
            Claim(variant="mixmo:mixing=linear", paper="CIFAR-100, WRN-28-10 from scratch: 81.8 → 83.0 %"),
            Claim(variant="mixmo:mixing=sum", paper="MIMO, CIFAR-100, WRN-28-10 from scratch: 81.8 → 82.9 %"),
        ),
        seeds=3,
        deviation=0.021,
        gain=0.0185,
        pilot="none",
        closed=GONE,
    ),
)
STUDIES = {study.name: study for study in _ALL}
