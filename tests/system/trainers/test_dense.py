"""Dense prediction and detection: torchvision's models, and timm's feature extractors inside a user's own model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection, segmentation

import fxgraft
from fxgraft.patches.rsc import record
from sweeping import some

CLASSES = 5
SIZE = (3, 64, 64)
BARE: dict[str, Any] = {"weights": None, "weights_backbone": None}


class Own(nn.Module):
    """A user's model: one prediction per scale, added up at the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2, 3, 4))
        channels = self.backbone.feature_info.channels()
        self.heads = nn.ModuleList(nn.Conv2d(each, CLASSES, 1) for each in channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = zip(self.heads, self.backbone(x), strict=True)
        return sum(F.interpolate(head(each), x.shape[-2:], mode="bilinear") for head, each in maps)


DENSE: dict[str, Callable[[], nn.Module]] = {
    "fcn_resnet50": partial(segmentation.fcn_resnet50, num_classes=CLASSES, aux_loss=True, **BARE),
    "deeplabv3": partial(segmentation.deeplabv3_mobilenet_v3_large, num_classes=CLASSES, **BARE),
    "lraspp": partial(segmentation.lraspp_mobilenet_v3_large, num_classes=CLASSES, **BARE),
    "features_only": Own,
}
METHODS: dict[str, dict[str, Any]] = {
    "rsc": {"batch_share": 1.0},
    "crossnorm": {"p": 1.0, "consistency": True},
    "selfnorm": {},
    "taps": {"layers": -1},
}
# Where RSC mutes by default: the last map before what predicts classes.
LAST = {
    "fcn_resnet50": "backbone.layer4",
    "deeplabv3": "backbone.16",
    "lraspp": "backbone.16",
    "features_only": "backbone.layer4",
}
HEAVY = ("fcn_resnet50", "deeplabv3")
CELLS = [
    pytest.param(name, method, marks=[pytest.mark.sweep] if name in HEAVY else [])
    for name in DENSE
    for method in METHODS
]


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (2, *SIZE[1:]), generator=g)
    y[:, :4] = -100  # pixels to leave out
    return torch.rand(2, *SIZE, generator=g), y


def learns(model: nn.Module) -> None:
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_dense_predictors(name: str, method: str) -> None:
    """Labels are maps; an auxiliary head stays the user's; evaluation is the bare model's."""
    torch.manual_seed(0)
    model = fxgraft.patch(DENSE[name](), method, input_size=SIZE, **METHODS[method])
    x, y = batch()
    with fxgraft.targets(y):
        out = model(x)
    logits = out["out"] if isinstance(out, dict) else out
    loss = F.cross_entropy(logits, y) + fxgraft.extra_loss(model, out, y)
    if isinstance(out, dict) and "aux" in out:
        loss = loss + 0.5 * F.cross_entropy(out["aux"], y)
    loss.backward()
    learns(model)
    if method == "rsc":
        (graft,) = fxgraft.grafts(model)
        assert graft.patch.describe(graft).startswith(f"{LAST[name]} (NCHW")
    if fxgraft.methods()[method].train_only:
        with torch.no_grad():
            out, expected = (each.eval()(x) for each in (model, fxgraft.merge(model)))
        assert type(out) is type(expected)
        pairs = (
            zip(out.values(), expected.values(), strict=True) if isinstance(out, dict) else [(out, expected)]
        )
        assert all(torch.equal(*pair) for pair in pairs)


def test_pixels_that_are_left_out_do_not_decide_what_is_muted() -> None:
    torch.manual_seed(0)
    model = fxgraft.patch(DENSE["lraspp"](), "rsc", input_size=SIZE, batch_share=1.0, scope="channel")
    x, y = batch()
    with record(model) as records:
        model(x, target=y)
    assert len(records) == 1
    assert records[0].mask.shape[0] == len(x)


@pytest.mark.sweep
def test_adaptation_of_a_dense_predictor() -> None:
    torch.manual_seed(0)
    layers = ["backbone.4", "backbone.16"]
    model = fxgraft.patch(DENSE["lraspp"](), "gam", layers=layers, task="dense", hidden=20, input_size=SIZE)
    x, _ = batch()
    game = fxgraft.gam.gam_losses(model, x, x.flip(0))
    (game.mapping + game.discriminator).backward()
    assert game.mapping.isfinite()


# Detectors, with two layers of the body of each.
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("body.6", "body.13"),
    "fasterrcnn_resnet50_fpn": ("body.layer2", "body.layer4"),
}
EACH_DETECTOR = pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.sweep] if "resnet" in each else []) for each in DETECTORS],
)


def detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    small = {"num_classes": CLASSES, "min_size": 64, "max_size": 64, "trainable_backbone_layers": None}
    return getattr(detection, name)(**BARE, **small).train()


IMAGES = [torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
BOXES = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1 + i])} for i in range(2)]


@EACH_DETECTOR
@pytest.mark.parametrize("method", some(["selfnorm", "crossnorm", "taps"], 1))
def test_the_backbone_of_a_detector(name: str, method: str) -> None:
    model = detector(name)
    layers = {"taps": {"layers": [*DETECTORS[name], "fpn.layer_blocks.0.0"]}}
    fxgraft.patch(model.backbone, method, input_size=SIZE, **layers.get(method, {}))
    parts = model(IMAGES, BOXES)
    labels = torch.cat([each["labels"] for each in BOXES])
    (sum(parts.values()) + fxgraft.extra_loss(model, parts, labels)).backward()
    learns(model)
    if method == "taps":
        assert len(fxgraft.activations(model)) == 3
    with torch.no_grad():
        assert len(model.eval()(IMAGES)) == len(IMAGES)


@EACH_DETECTOR
def test_what_a_detector_refuses(name: str) -> None:
    model = detector(name)
    with pytest.raises(
        fxgraft.StructureError, match=r"chooses by the numbers(?s:.*)patch\(model\.backbone, \.\.\.\)"
    ):
        fxgraft.patch(model, "selfnorm")
    for layer in (None, DETECTORS[name][1]):  # whose logits are none: boxes are chosen behind it
        with pytest.raises(
            fxgraft.StructureError, match=r"returns several values(?s:.*)output=(?s:.*)ends before them"
        ):
            fxgraft.patch(model.backbone, "rsc", layers=layer, input_size=SIZE)
    with pytest.raises(fxgraft.StructureError, match=r"not clear what in it(?s:.*)patch that whole model"):
        fxgraft.patch(model.backbone, "crossnorm", consistency=True, p=1.0, input_size=SIZE)


def test_a_feature_extractor_alone_has_no_logits() -> None:
    model = Own()
    with pytest.raises(fxgraft.StructureError, match=r"It has: 0, 1, 2, 3(?s:.*)patch the whole model"):
        fxgraft.patch(model.backbone, "rsc", input_size=SIZE)
