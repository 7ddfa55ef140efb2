"""Is each method in its place on a network, by what has to hold for all of them, without a table?

The network is computed: random weights, two images for shapes and four for values. Units that no prediction reads,
a default of RSC that mutes nothing, class maps of other logits: each shows there, whatever the structure says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxgraft
from benchmarks.coverage import SIZES, Record, random_network, small_network
from fxgraft.errors import FxgraftError
from fxgraft.graph.dataflow.steps import is_drop
from fxgraft.graph.structure.heads.outputs import take_logits
from fxgraft.graph.structure.positions import positions
from fxgraft.graph.structure.site import layout_at
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import default_input_size

IMAGES = 4
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_NORMS = nn.modules.batchnorm._NormBase


def check_places(name: str) -> Record:
    """Check one architecture of the zoo.

    Returns:
        "wrong": what does not hold, a sentence each; an empty list where all of it does. "size": (C, H, W) of the
        images, small where the network takes such. "checks": how many; records without it are of four, when DSU was
        not among them. Or "failed", an error.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        small = small_network(name)
        model, size = small or (random_network(name), SIZES.get(name))
        size = size or default_input_size(model)
        return {"wrong": wrong_places(model, size), "size": [*size], "checks": 1 + len(_CHECKS)}
    except Exception as error:  # as without methods: some want more than images
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def wrong_places(model: nn.Module, size: tuple[int, ...]) -> list[str]:
    """List what is wrong about where methods go on a network with weights, whose state this changes.

    Args:
        model: with weights; all of them are moved a little, since many branches start at zero.
        size: (C, H, W) of its images.
    """
    x = torch.randn(IMAGES, *size)
    _warm(model, x)
    return [*_units(model, size), *(wrong for check in _CHECKS for wrong in check(model, x))]


@torch.no_grad()
def _warm(model: nn.Module, x: Tensor) -> None:
    """Leave no weight at its start, no dropout that forwards do themselves, and let BatchNorm know its values."""
    for each in model.modules():
        for rate in ("drop_rate", *(("p", "drop_prob") if is_drop(each) else ())):
            if isinstance(getattr(each, rate, None), float):
                setattr(each, rate, 0.0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(0.02 * torch.randn_like(parameter))
    norms = [each for each in model.modules() if isinstance(each, _NORMS)]
    momenta = [each.momentum for each in norms]
    for each in norms:
        each.momentum = 1.0
    _logits(model, x, frozen=False)
    for each, momentum in zip(norms, momenta, strict=True):
        each.momentum = momentum


class _WithoutDropout(TorchFunctionMode):
    """Dropout that a forward calls as a function is left out: it follows the network's mode, not a layer's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def _logits(
    model: nn.Module, x: Tensor, frozen: bool = True, live: Collection[nn.Module] = (), **options: Any
) -> Tensor:
    """Train on a batch without what the network draws at random, and with BatchNorm as in evaluation if frozen.

    So that what one image does changes no other image's logits. A layer that carries a graft is ``live``: it acts in
    training alone.
    """
    model.train()
    for each in model.modules():
        if each not in live and (is_drop(each) or (frozen and isinstance(each, _NORMS))):
            each.eval()
    with _WithoutDropout():
        return take_logits(model(x, **options))


def _grafted(model: nn.Module) -> set[nn.Module]:
    return {each for each in model.modules() if hasattr(type(each), "_fxgraft_base")}


def _units(model: nn.Module, size: tuple[int, ...]) -> Iterator[str]:
    """Units of residual blocks see images, and as many channels at every size."""
    channels, *side = size
    seen: list[dict[str, int]] = []
    for factor in (1, 2):
        try:
            trace = ModelTrace(model, (channels, *(factor * n for n in side)))
            found: dict[str, int] = {}
            for site in positions(trace):
                if not isinstance(site.value, Tensor) or site.value.shape[0] != 2:
                    yield f"{site.name!r} has another batch than the images"
                    continue
                found[site.name] = layout_at(trace, site).canonical(site.value).shape[1]
            seen.append(found)
        except FxgraftError:  # it takes images of one size, or has no place for units
            break
    if len(seen) == 2:
        yield from (
            f"{name!r} has {count} channels, and {seen[1][name]} with larger images"
            for name, count in seen[0].items()
            if seen[1].get(name, count) != count
        )


def _gates(model: nn.Module, x: Tensor) -> Iterator[str]:
    """The logits read every gate of SelfNorm."""
    try:
        fxgraft.patch(model, "selfnorm", input_size=tuple(x.shape[1:]))
    except FxgraftError:
        return
    (graft,) = fxgraft.grafts(model)
    logits = _logits(model, x, frozen=False)
    (logits * torch.randn_like(logits)).sum().backward()
    for key, unit in graft.units.items():
        gradients = [each.grad for each in unit.parameters()]
        if gradients and not any(each is not None and bool(each.any()) for each in gradients):
            yield f"no logit reads SelfNorm's gate at {key!r}"
    model.zero_grad()
    fxgraft.unpatch(model, "selfnorm")


def _restyled(model: nn.Module, x: Tensor) -> Iterator[str]:
    """The logits read every map that DSU restyles."""
    try:
        fxgraft.patch(model, "dsu", p=1.0, input_size=tuple(x.shape[1:]))
    except FxgraftError:
        return
    (graft,) = fxgraft.grafts(model)
    seen: dict[str, Tensor] = {}
    for key, unit in graft.units.items():
        unit.register_forward_hook(lambda _, __, value, key=key: seen.setdefault(key, value).retain_grad())
    logits = _logits(model, x, frozen=False, live=_grafted(model))
    (logits * torch.randn_like(logits)).sum().backward()
    for key, unit in graft.units.items():
        gradient = seen[key].grad if key in seen else None
        if gradient is None or not bool(unit.layout.canonical(gradient).any()):
            yield f"no logit reads what DSU restyles at {key!r}"
    model.zero_grad()
    fxgraft.unpatch(model, "dsu")


def _muted(model: nn.Module, x: Tensor) -> Iterator[str]:
    """Each image's logits change when RSC mutes all positions."""
    shape = _logits(model, x).shape
    try:
        fxgraft.patch(
            model, "rsc", scope="spatial", spatial_drop=1.0, batch_share=1.0, input_size=tuple(x.shape[1:])
        )
    except FxgraftError:
        return
    labels = torch.arange(IMAGES) % shape[1] if len(shape) == 2 else torch.zeros(IMAGES, *shape[2:]).long()
    live = _grafted(model)
    muted = _logits(model, x, live=live, target=labels).detach()
    fxgraft.unpatch(model, "rsc")
    bare = _logits(model, x, live=live).detach()
    same = int((muted == bare).flatten(1).all(1).sum())
    if same:
        yield f"RSC mutes everything, and the logits of {same} of {IMAGES} images are the same"


def _class_maps(model: nn.Module, x: Tensor) -> Iterator[str]:
    """The maps of the diversification block average to the logits, where it does not say that they do not."""
    try:
        fxgraft.patch(model, "diversification", alpha=1.0, patch=1, input_size=tuple(x.shape[1:]))
    except FxgraftError:
        return
    (graft,) = fxgraft.grafts(model)
    live = _grafted(model)
    mapped = _logits(model, x, live=live).detach()
    exact = not graft.patch.inexact(graft)
    fxgraft.unpatch(model, "diversification")
    bare = _logits(model, x, live=live).detach()
    if exact and not torch.allclose(mapped, bare, rtol=1e-3, atol=1e-3 * float(bare.abs().max())):
        yield f"class maps average to other logits, {float((mapped - bare).abs().max()):.2g} apart"


_CHECKS = (_gates, _restyled, _muted, _class_maps)
