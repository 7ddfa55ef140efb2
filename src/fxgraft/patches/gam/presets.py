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
            network="LeNet, trained on the source digits with 10 000 steps of Adam 1e-3",
            data="MNIST, USPS, SVHN; evaluated on the target's training split as well as on its test split",
            optimiser="Adam 2e-4, β1 0.5, 10 000 steps, for the target network and the discriminators",
            batch=128,
            note="layers= names the last two layers, the logits last; weights 0.1 and 1",
        ),
        needs=("layers",),
    ),
    Preset(
        name="segmentation",
        options={"task": "dense", "matching": "gaussian", "gan": "lsgan", "drift": 0.1},
        source="paper, ECCV 2018",
        training=Training(note="layers= names four taps, spread over the depth"),
        needs=("layers",),
    ),
)
