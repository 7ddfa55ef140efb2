"""Generated scenes in two styles, with the class of every pixel: a small domain shift for segmentation.

Discs, squares and triangles of any size and angle lie on each other. "flat" draws them in one bright colour each
on a dark ground; "textured" adds stripes to shapes and ground, a gradient of light, noise, and less contrast. The
shapes are drawn from the same distribution in both, so that only the rendering differs.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN
from torchvision.models.segmentation.fcn import FCNHead

import fxgraft
from benchmarks.study import BARE, Claim, Job, Patches, Study
from benchmarks.training import runs_by_seed
from fxgraft.patches import gam

CLASSES = ("ground", "disc", "square", "triangle")
STYLES = ("flat", "textured")
ADABN, BOTH = "AdaBN", "AdaBN, then gam"

QUICK: dict[str, Any] = {
    "task": "segmentation of generated scenes, mean IoU over four classes on the target style",
    "model": "torchvision's FCN on five small convolutions, a decision on every fourth pixel",
    "variants": [BARE, ADABN, BOTH],
    "size": 64,
    "scenes": {"train": 512, "test": 256},
    "shapes_per_scene": 4,
    "batch_size": 16,
    "source": {"steps": 1000, "lr": 1e-3},
    "gam": {
        "layers": ["backbone.layer1", "backbone.layer2", "backbone.layer4", "classifier"],
        "task": "dense",
        "invert": "target",
        "hidden": 64,
    },
    "adapt": {"lr": 2e-4, "betas": [0.5, 0.999]},
    "warm_up": 50,
    "steps": 200,
}
FULL: dict[str, Any] = {**QUICK, "source": {"steps": 4000, "lr": 1e-3}, "warm_up": 200, "steps": 2000}


def draw(count: int, style: str, size: int, shapes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images float (N, 3, size, size) in [-1, 1] and classes int64 (N, size, size)."""
    g = torch.Generator().manual_seed(seed)
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    labels = torch.zeros(count, size, size, dtype=torch.long)
    ground, pens = _GROUNDS[style](x, y, count, g), _PENS[style]
    images = ground
    for _ in range(shapes):
        kind = torch.randint(1, len(CLASSES), (count, 1, 1), generator=g)
        inside = _inside(kind, x, y, count, g)
        labels = torch.where(inside, kind, labels)
        images = torch.where(inside[:, None], pens(x, y, count, g), images)
    if style == "textured":
        images = images + 0.1 * torch.randn(images.shape, generator=g)
    return images.clamp(0, 1) * 2 - 1, labels


def _uniform(low: float, high: float, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=g)


def _inside(kind: Tensor, x: Tensor, y: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Which pixels a shape of each scene covers: (N, size, size)."""
    cx, cy = _uniform(-0.8, 0.8, (2, count, 1, 1), g)
    radius = _uniform(0.25, 0.5, (count, 1, 1), g)
    angle = _uniform(0, 2 * torch.pi, (count, 1, 1), g)
    u = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) / radius
    v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / radius
    disc = u.square() + v.square() < 1
    square = torch.maximum(u.abs(), v.abs()) < 0.85
    triangle = (v > -0.6) & (v + 3**0.5 * u.abs() < 1.2)
    return torch.where(kind == 1, disc, torch.where(kind == 2, square, triangle))


def _stripes(x: Tensor, y: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Stripes in [0, 1] of a random direction and width: (N, 1, size, size)."""
    angle = _uniform(0, torch.pi, (count, 1, 1), g)
    pitch = _uniform(12, 30, (count, 1, 1), g)
    return (0.5 + 0.5 * ((x * angle.cos() + y * angle.sin()) * pitch).sin())[:, None]


def _flat_ground(x: Tensor, y: Tensor, count: int, g: torch.Generator) -> Tensor:
    return _uniform(0.0, 0.25, (count, 3, 1, 1), g).expand(-1, -1, *x.shape)


def _flat_pen(x: Tensor, y: Tensor, count: int, g: torch.Generator) -> Tensor:
    return _uniform(0.55, 1.0, (count, 3, 1, 1), g)


def _textured_ground(x: Tensor, y: Tensor, count: int, g: torch.Generator) -> Tensor:
    corners = _uniform(0.05, 0.45, (count, 3, 2, 2), g)
    light = F.interpolate(corners, size=x.shape, mode="bilinear", align_corners=True)
    return light + 0.15 * _stripes(x, y, count, g)


def _textured_pen(x: Tensor, y: Tensor, count: int, g: torch.Generator) -> Tensor:
    return _uniform(0.45, 0.9, (count, 3, 1, 1), g) - 0.15 * _stripes(x, y, count, g)


_GROUNDS = {"flat": _flat_ground, "textured": _textured_ground}
_PENS = {"flat": _flat_pen, "textured": _textured_pen}


def build() -> nn.Module:
    """An FCN with a backbone of stride 4 and dilation."""

    def layer(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    stages = {
        "layer1": layer(3, 32, stride=2),
        "layer2": layer(32, 64, stride=2),
        "layer3": nn.Sequential(layer(64, 64, dilation=2), layer(64, 64, dilation=4)),
        "layer4": layer(64, 64, dilation=2),
    }
    backbone = IntermediateLayerGetter(nn.Sequential(OrderedDict(stages)), {"layer4": "out"})
    return FCN(backbone, FCNHead(64, len(CLASSES)))


def mean_iou(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Intersection over union of each class over all pixels, averaged over the classes."""
    model.eval()
    with torch.no_grad():
        guessed = [model(batch.to(device))["out"].argmax(1).cpu() for batch in images.split(64)]
    pairs = torch.bincount(
        (labels * len(CLASSES) + torch.cat(guessed)).flatten(), minlength=len(CLASSES) ** 2
    )
    table = pairs.view(len(CLASSES), len(CLASSES))
    both = table.diag()
    return (both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean().item()


def patches(protocol: dict[str, Any], variant: str) -> Patches:
    """Say what a variant is patched with."""
    return [("gam", protocol["gam"])] if variant == BOTH else []


def carry_out(job: Job) -> dict[str, Any]:
    """Train on the one style, adapt to the other and score there."""
    protocol, run, device = job.protocol, job.run, job.device
    size, batch = protocol["size"], protocol["batch_size"]
    # A seed per set: no scene is in two of them.
    sets = {
        (style, part): draw(count, style, size, protocol["shapes_per_scene"], seed=10 * place + offset)
        for place, style in enumerate(STYLES)
        for offset, (part, count) in enumerate(protocol["scenes"].items())
    }

    def batches(style: str) -> DataLoader[Any]:
        return DataLoader(list(sets[style, "train"][0]), batch, shuffle=True, drop_last=True)  # type: ignore[arg-type]

    torch.manual_seed(run["seed"])
    model = build().to(device).train()
    images, labels = (each.to(device) for each in sets["flat", "train"])
    optimizer = torch.optim.Adam(model.parameters(), protocol["source"]["lr"])
    steps = protocol["source"]["steps"]
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(model(images[chosen])["out"], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        job.progress(step + 1, steps)
    record: dict[str, Any] = {"source_score": round(mean_iou(model, *sets["flat", "test"], device), 5)}
    model.eval()
    torch.manual_seed(run["seed"])
    if run["variant"] in (ADABN, BOTH):
        fxgraft.adapt_batchnorm(model, (each.to(device) for each in batches("textured")))
    for method, options in patches(protocol, run["variant"]):
        fxgraft.patch(model, method, input_size=(3, size, size), **options)
        loaders = [batches(style) for style in STYLES]
        players = gam.discriminators(model)
        adam = {"lr": protocol["adapt"]["lr"], "betas": tuple(protocol["adapt"]["betas"])}
        # At first the discriminators alone: the network stands still.
        still = torch.optim.SGD(model.parameters(), 0.0)
        judges = torch.optim.Adam(players.parameters(), **adam)
        fxgraft.adapt(model, *loaders, steps=protocol["warm_up"], optimizers=(judges, still))
        history = fxgraft.adapt(
            model,
            *loaders,
            steps=protocol["steps"],
            optimizers=(judges, torch.optim.Adam(model.parameters(), **adam)),
            callback=lambda step, _: job.progress(step, protocol["steps"]),
        )
        record["last"] = {name: round(values[-1], 5) for name, values in history.losses.items()}
    return {"scores": {"mean IoU": round(mean_iou(model, *sets["textured", "test"], device), 5)}, **record}


STUDY = Study(
    name="scenes",
    about="segmentation of generated scenes in another style, a small FCN",
    needs=(),
    protocols={"quick": QUICK, "full": FULL},
    key=("seed", "variant"),
    runs=runs_by_seed,
    patches=patches,
    seeds={"quick": (0, 1, 2), "full": (0, 1, 2)},
    carry_out=carry_out,
    claims=(
        Claim(
            method="adapt_batchnorm",
            variant=ADABN,
            score="mean IoU",
            paper="AdaBN, where adaptation of dense predictors starts",
        ),
        Claim(
            method="gam",
            variant=BOTH,
            score="mean IoU",
            paper="segmentation across domains: gains over AdaBN",
            against=ADABN,
        ),
    ),
)
