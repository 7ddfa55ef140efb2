"""Every preset of CrossNorm and SelfNorm against networks with the units written into the forward, place by place.

The networks are of the structure that the releases train; weights and draws are those of the patched network. The
largest difference of logits, losses and running statistics, in float64, is below 1e-12 of their scale in both modes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft import CrossNorm, SelfNorm
from fxgraft.patches.selfnorm import SelfNormUnit
from methods.styles import Gate, Typed, agree
from models.published import AllConv, DenseNet, ResNet, ResNeXt, WideResNet

CLASSES, ROWS, EXACT = 4, 8, 1e-12
NETWORKS: dict[str, Any] = {
    "wrn": (lambda: WideResNet(CLASSES), 12),
    "resnext": (lambda: ResNeXt(CLASSES), 12),
    "densenet": (lambda: DenseNet(CLASSES), 12),
    "allconv": (lambda: AllConv(CLASSES), 32),
    "ibn": (lambda: ResNet(CLASSES, ibn=True), 48),
    "imagenet": (lambda: ResNet(CLASSES), 48),
    "gtav": (lambda: ResNet(CLASSES, maps=True), 40),
}
PRESETS = sorted({*CrossNorm.presets, *SelfNorm.presets})
# One of each network and place; the others run with the sweeps.
ALWAYS = {
    "cifar10_resnext",
    "cifar10_resnext_cnsn_consistency",
    "cifar10_densenet",
    "cifar10_allconv_cnsn",
    "imagenet_cnsn_ibn_augmix",
}


def network(preset: str) -> tuple[nn.Module, tuple[int, int, int]]:
    make, pixels = next(NETWORKS[key] for key in NETWORKS if key in preset)
    torch.manual_seed(0)
    bare = make().double().train()
    for module in bare.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that it matters on which side of a norm a unit is
            nn.init.uniform_(module.weight, 0.2, 0.4)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return bare, (3, pixels, pixels)


def by_hand(preset: str, bare: nn.Module, model: nn.Module) -> Typed:
    """The bare network with the preset's units in its forward, their weights those of the patched one."""
    styled = gated = None
    gates: list[Gate] = []
    crossnorm = CrossNorm.presets.get(preset)
    if crossnorm is not None:
        styled = crossnorm.options.get("position", "input")
    if preset in SelfNorm.presets:
        gated = SelfNorm.presets[preset].options["position"]
        for unit in fxgraft.grafts(model)[-1].units_of(SelfNormUnit):
            gate = Gate(unit.g.mean_weight.shape[0]).double()
            gate.fc.weight.data = torch.stack((unit.g.mean_weight, unit.g.std_weight), 1).detach()[:, None]
            gate.bn.load_state_dict(unit.g.norm.state_dict())
            gates.append(gate)
    options = {} if crossnorm is None else crossnorm.options
    return Typed(bare, styled, gated, gates, options.get("active", 1), options.get("crop", "neither"))


def statistics(module: nn.Module) -> Tensor:
    """All running statistics, sorted by size, since units have them elsewhere by hand."""
    found = [b.flatten() for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))]
    return torch.cat(found).sort()[0]


def difference(preset: str) -> float:
    """The largest difference of logits, losses and running statistics, as a share of their scale, in both modes."""
    bare, size = network(preset)
    model = copy.deepcopy(bare)
    for method in (CrossNorm, SelfNorm):
        if preset in method.presets:
            fxgraft.patch(model, method.method, preset=preset, input_size=size)
    reference = by_hand(preset, bare, model)
    options = CrossNorm.presets[preset].options if preset in CrossNorm.presets else {}
    chance, weight = options.get("p", 0.0), options.get("consistency_weight", 0.0)
    views = 3 if "augmix" in preset else 1
    g = torch.Generator().manual_seed(1)
    worst, acted = [], set()
    for seed in range(4):
        x = torch.randn(views * ROWS, *size, generator=g, dtype=torch.float64)
        y = torch.randint(CLASSES, (ROWS,) if "gtav" not in preset else (ROWS, *size[1:]), generator=g)
        torch.manual_seed(seed)
        logits = model.train()(x)
        clean = logits[:ROWS]
        loss = fxgraft.loss(model, clean, y)
        torch.manual_seed(seed)
        wanted = reference.train()(x, 0.0 if weight else chance)
        acted.add(bool(reference.on))
        loss_wanted = F.cross_entropy(wanted[:ROWS], y)
        if weight and bool(torch.rand(()) < chance):
            others = [reference(x[:ROWS], 1.0) for _ in range(2)]
            acted.add(bool(reference.on))
            loss_wanted = loss_wanted + weight * agree(wanted[:ROWS], *others)
        if views > 1:
            loss = loss + 12 * fxgraft.functional.jensen_shannon(*logits.chunk(views))
            loss_wanted = loss_wanted + 12 * agree(*wanted.chunk(views))
        pairs = [(logits, wanted), (loss, loss_wanted), (statistics(model), statistics(reference))]
        pairs.append((model.eval()(x), reference.eval()(x)))
        worst += [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs]
    assert not options or acted == {True, False}
    return max(worst)


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[] if p in ALWAYS else [pytest.mark.sweep]) for p in PRESETS]
)
@pytest.mark.filterwarnings("ignore:SelfNorm. init=.authors. opens each gate:fxgraft.FxgraftWarning")
def test_a_preset_is_what_was_published(preset: str) -> None:
    assert difference(preset) < EXACT
