"""GAM as its authors ran it."""

from __future__ import annotations

from fxgraft.extend import Preset, Training, presets_by_name

PRESETS = presets_by_name(
    Preset(
        name="digits",
        options={
            "matching": None,
            "gan": "jsd",
            "invert": "both",
            "drift": 1.0,
            "hidden": 500,
            "activation": "relu",
        },
        source="release, github.com/RsEnts/DAM_release, digits_classification",
        training=Training(
            network="LeNet, trained on the source digits with 10 000 steps of Adam 1e-3 and L2 2.5e-5",
            data="MNIST, USPS, SVHN; the scripts evaluate on the target's train split alone, so that is where their "
            "95 % (MNIST to USPS) and 98 % (USPS to MNIST) are from",
            optimiser="Adam 2e-4, β1 0.5, 10 000 steps, for the target network and the discriminators",
            batch=128,
            note="layers= names the last two activations, the logits last; weights 0.1 and 1. The release taps fc3 "
            "behind its ReLU: naming a linear layer taps in front of it, so name the activation's module, or its node "
            "as fxgraft.sites(model) lists it",
        ),
        needs=("layers",),
    ),
    Preset(
        name="segmentation",
        options={"task": "dense", "matching": "gaussian", "gan": "lsgan", "drift": 0.1},
        source="paper, ECCV 2018",
        training=Training(note="layers= names four taps, spread over the depth; its code is not released"),
        needs=("layers",),
    ),
)
