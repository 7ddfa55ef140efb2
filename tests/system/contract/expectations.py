"""What is known of single methods beyond what their classes say, and where they refuse.

The one place of the contract that names methods. A method that is not listed, of a third party for instance, is
swept all the same, with its `example` options: whatever its class attributes promise is checked, and where it
refuses a backbone the error has to be a typed one that leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import fxgraft


@dataclass(frozen=True)
class Refusal:
    """A backbone that a method does not take with the options of the sweep.

    Attributes:
        match: what the error says.
        instead: options with which it takes it after all; None where there are none.
    """

    match: str
    instead: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Expectation:
    """What is known of a method.

    Attributes:
        options: with them it acts in every training pass, and on the small maps of the zoo.
        neutral: with them besides, training is the bare model's too, bit by bit; None where there are none.
        acts: whether its training passes differ from the bare model's; None where that is not known.
        starts_as_bare: evaluation is the bare model's, bit by bit, until parameters of the method are trained.
        folds: whether `fxgraft.merge` can fold what it has trained.
        replaces: it replaces layers, so that what folds differs from backbone to backbone.
        judged_apart: its own parameters learn from a loss of their own, not from `fxgraft.loss`.
        refusals: by backbone.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] | None = None
    acts: bool | None = None
    starts_as_bare: bool = False
    folds: bool | None = None
    replaces: bool = False
    judged_apart: bool = False
    refusals: Mapping[str, Refusal] = field(default_factory=dict)


# Backbones without a residual join, and a position that they have besides their usual one. Of timm's files these
# are densely connected, plain or cells, or (efficientnet) have their skips configured away.
NO_JOIN = {
    "timm/densenet121": "conv1_post",
    "timm/inception_v3": "norm",
    "timm/inception_v4": "norm",
    "timm/nasnetalarge": "norm",
    "timm/pnasnet5large": "norm",
    "timm/rdnet_tiny": "act",
    "timm/selecsls42": "act",
    "timm/test_efficientnet": "norm",
    "timm/vgg11": "act",
    "timm/ese_vovnet19b_slim_dw": "norm",
    "torchvision/DenseNet": "conv2_post",
    "torchvision/alexnet": "act",
    "torchvision/googlenet": "norm",
    "torchvision/inception_v3": "norm",
    "torchvision/shufflenet_v2_x0_5": "act",
    "torchvision/squeezenet1_1": "act",
    "torchvision/vgg11": "act",
    "torchvision/vgg11_bn": "norm",
}

# No average over positions in front of a linear classifier, or of several that share one.
_HEADS = {
    "timm/cait_xxs24_224": Refusal("a class token"),
    "timm/coat_tiny": Refusal(
        "isn.t a plain average over positions"
    ),  # a convolution joins three class tokens
    "timm/convit_tiny": Refusal("a class token"),
    "timm/crossvit_tiny_240": Refusal("a class token"),
    "timm/deit_tiny_distilled_patch16_224": Refusal("a class token"),
    # it weighs the logits of several stages
    "timm/efficientvim_m1": Refusal("No linear classifier was found"),
    "timm/naflexvit_base_patch16_gap": Refusal(r"global_pool_naflex\(\), which isn't a plain average"),
    "timm/pit_ti_224": Refusal("a class token"),
    "timm/test_vit": Refusal("a class token"),
    "timm/tnt_s_patch16_224": Refusal("a class token"),
    "timm/vit_tiny_r_s16_p8_224": Refusal("a class token"),
    # it adds a maximum over auxiliary logits
    "timm/volo_d1_224": Refusal("No linear classifier was found"),
    "timm/xcit_nano_12_p8_224": Refusal("a class token"),
    "torchvision/VisionTransformer": Refusal("a class token"),
    "torchvision/alexnet": Refusal("a whole map of shape"),
    "torchvision/vgg11": Refusal("a whole map of shape"),
    "torchvision/vgg11_bn": Refusal("a whole map of shape"),
}

# What cannot take several inputs.
_ENDS = {
    "timm/gemma4_vit_167m": Refusal("torch.fx cannot trace Gemma4VitClassifier"),
    "timm/naflexvit_base_patch16_gap": Refusal(r"first meets 'embeds' \(NaFlexEmbeds\)"),
    "timm/tnt_s_patch16_224": Refusal(
        r"'pixel_embed.proj' \(Conv2d\) sees pieces of the image as samples of their own"
    ),
    "timm/vit_tiny_r_s16_p8_224": Refusal(r"'patch_embed.backbone.conv' \(StdConv2dSame\) standardises"),
    "timm/volo_d1_224": Refusal(r"do not come from linear layers alone: max\(\)"),
    "torchvision/squeezenet1_1": Refusal(r"do not come from linear layers alone: 'classifier.2' \(ReLU\)"),
}

EXPECTED: dict[str, Expectation] = {
    "crossnorm": Expectation(options={"p": 1.0, "active": None}, neutral={"p": 0.0}, acts=True, folds=True),
    "diversification": Expectation(
        options={"patch": 1, "p_peak": 1.0},
        # α = 1 runs the classifier at every position, which rounds elsewhere: see test_heads.py
        acts=True,
        folds=True,
        refusals=_HEADS,
    ),
    "dsu": Expectation(options={"p": 1.0}, neutral={"p": 0.0}, acts=True, folds=True),
    "gam": Expectation(
        options={"layers": -1, "hidden": 8},
        acts=False,
        starts_as_bare=True,
        folds=True,
        judged_apart=True,
        # its head reads the class tokens of the last stage, and not its map
        refusals={"timm/pit_ti_224": Refusal(r"does not depend on 'transformers\.2\.reshape'")},
    ),
    "mixmo": Expectation(
        options={"p": 1.0},
        neutral={"members": 1},
        acts=True,
        starts_as_bare=True,
        folds=True,
        replaces=True,
        refusals=_ENDS,
    ),
    "mixstyle": Expectation(options={"p": 1.0}, neutral={"p": 0.0}, acts=True, folds=True),
    "rsc": Expectation(
        options={"batch_share": 1.0},
        neutral={"start": 1.0},
        acts=True,
        folds=True,
    ),
    "selfnorm": Expectation(options={}, acts=False, starts_as_bare=True, folds=False),
    "taps": Expectation(options={"layers": -1}, acts=False, starts_as_bare=True, folds=True),
}


# Which do not go on one model together, and what the error says.
APART: dict[frozenset[str], str] = {
    frozenset({"diversification", "mixmo"}): "'mixmo' acts on '.*', which 'diversification' leaves out",
    frozenset({"manifold_mixup", "mixmo"}): "both pair every row of the output with labels of other rows",
}


def expectation(method: str) -> Expectation:
    """What is known of a method; of one that is not listed, its example."""
    return EXPECTED.get(method) or Expectation(options=fxgraft.methods()[method].example)
