"""Each method the plain way: forward hooks on a stock network, and whole passes where it has to look ahead.

What a user writes who knows the network but not torch.fx, on networks whose maps are (B, C, H, W). A function here
takes a model, hangs hooks on it, and returns the loss of a batch. None of them can be taken off, copied or saved as
such; they are here to be timed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.bench.bare_and_patched import Loss

LAST_MAPS = ("layer4", "stages", "bn2")
"""What gives the last map of a ResNet, a ConvNeXt, an EfficientNet of timm."""
BLOCKS = ("BasicBlock", "Bottleneck", "ConvNeXtBlock", "DepthwiseSeparableConv", "InvertedResidual")


def last_map(model: nn.Module) -> nn.Module:
    """Return the module whose output is pooled."""
    found = next((name for name in LAST_MAPS if hasattr(model, name)), None)
    if found is None:
        raise LookupError(f"nothing is written by hand for {type(model).__name__}")
    return getattr(model, found)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the residual blocks."""
    found = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    if not found:
        raise LookupError(f"nothing is written by hand for {type(model).__name__}")
    return found


def keep_last_map(model: nn.Module) -> dict[str, Tensor]:
    """Return where the last map of a pass, "z", is kept."""
    kept: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: Any, z: Tensor) -> None:
        kept["z"] = z

    last_map(model).register_forward_hook(hook)
    return kept


def rsc(model: Any) -> Loss:
    """RSC on the last map: a pass for the gradient, one for the confidence that is left, one to train on."""
    seen: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        seen["z"] = z
        return z * seen["mask"] if "mask" in seen else None

    last_map(model).register_forward_hook(hook)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        seen.clear()
        logits = model(x)
        z = seen["z"]
        (gradient,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), z)
        with torch.no_grad():
            cam = (gradient.mean((2, 3), keepdim=True) * z).mean(1).flatten(1)
            least = cam.topk(max(1, cam.shape[1] // 3)).values[:, -1:]
            mask = (cam < least).view(len(z), 1, *z.shape[2:]).to(z.dtype)
            seen["mask"] = mask
            lost = (logits.softmax(1) - model(x).softmax(1)).gather(1, y[:, None])[:, 0]
            muted = torch.ones_like(mask)
            chosen = lost.topk(max(1, len(x) // 3)).indices
            muted[chosen] = mask[chosen]
        seen["mask"] = muted
        return F.cross_entropy(model(x), y)

    return loss


def crossnorm(model: nn.Module) -> Loss:
    """CrossNorm behind every block, one of them on in half of the passes."""
    on: list[int | None] = [None]

    def swap(index: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, z: Tensor) -> Tensor | None:
            if on[0] != index:
                return None
            mean, std = z.mean((2, 3), keepdim=True), (z.var((2, 3), keepdim=True) + 1e-5).sqrt()
            order = torch.randperm(len(z), device=z.device)
            return (z - mean) / std * std[order] + mean[order]

        return hook

    places = blocks(model)
    for index, block in enumerate(places):
        block.register_forward_hook(swap(index))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        on[0] = random.randrange(len(places)) if random.random() < 0.5 else None
        return F.cross_entropy(model(x), y)

    return loss


class Gate(nn.Module):
    """SelfNorm with one gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 2))
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, z: Tensor) -> Tensor:
        """Scale each channel by a function of its mean and deviation."""
        mean, std = z.mean((2, 3)), (z.var((2, 3)) + 1e-5).sqrt()
        gate = self.norm(mean * self.weight[:, 0] + std * self.weight[:, 1]).sigmoid()
        return z * gate[..., None, None]


def selfnorm(model: nn.Module) -> Loss:
    """SelfNorm behind every block."""
    shapes: dict[nn.Module, int] = {}
    places = blocks(model)
    handles = [
        each.register_forward_hook(lambda module, args, z: shapes.update({module: z.shape[1]}))
        for each in places
    ]
    with torch.no_grad():
        model(next(model.parameters()).new_zeros(2, 3, 64, 64))
    for handle in handles:
        handle.remove()
    model.gates = nn.ModuleList(Gate(shapes[each]) for each in places)
    for each, gate in zip(places, model.gates, strict=True):
        each.register_forward_hook(lambda module, args, z, gate=gate: gate(z))
    return lambda x, y: F.cross_entropy(model(x), y)


def diversification(model: Any) -> Loss:
    """The block on class maps of its own: peaks and patches, damped and averaged."""
    if not hasattr(model, "global_pool"):
        raise LookupError("there is a layer between pooling and classifier")
    seen = keep_last_map(model)
    head: Any = model.get_classifier()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        model(x)
        z = F.conv2d(seen["z"], head.weight[..., None, None], head.bias)
        with torch.no_grad():
            batch, classes, height, width = z.shape
            peak = z == z.amax((2, 3), keepdim=True)
            peaks = peak & (torch.rand(batch, classes, 1, 1, device=z.device) < 0.5)
            grid = torch.rand(batch, classes, -(-height // 3), -(-width // 3), device=z.device) < 0.5
            wide = grid.repeat_interleave(3, 2).repeat_interleave(3, 3)[..., :height, :width]
            damped = torch.where(peaks | (wide & ~peak), 0.1, 1.0)
        return F.cross_entropy((z * damped).mean((2, 3)), y)

    return loss


def mixmo(model: Any) -> Loss:
    """Cut-MixMo of two members: a second stem and a second classifier."""
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    head = model.get_classifier()
    other_stem, other_head = copy.deepcopy(stem), copy.deepcopy(head)
    seen: dict[str, Tensor] = {}

    def mixed(module: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        if "partner" not in seen:
            return None
        height, width = z.shape[2:]
        mask = torch.ones(1, 1, height, width, device=z.device)
        share = random.random() ** 0.5
        top, left = (random.randrange(1 + int(n * (1 - share))) for n in (height, width))
        mask[..., top : top + int(height * share), left : left + int(width * share)] = 0
        return 2 * (mask * z + (1 - mask) * other_stem(seen.pop("partner")))

    stem.register_forward_hook(mixed)
    head.register_forward_pre_hook(lambda module, args: seen.update(features=args[0]))
    model.others = nn.ModuleList([other_stem, other_head])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        order = torch.randperm(len(x), device=x.device)
        seen["partner"] = x[order]
        first = F.cross_entropy(model(x), y)
        return first + F.cross_entropy(other_head(seen["features"]), y[order])

    return loss


def taps(model: nn.Module) -> Loss:
    """The last map, kept."""
    keep_last_map(model)
    return lambda x, y: F.cross_entropy(model(x), y)


BY_HAND: dict[str, Callable[[Any], Loss]] = {
    each.__name__: each for each in (crossnorm, diversification, mixmo, rsc, selfnorm, taps)
}
