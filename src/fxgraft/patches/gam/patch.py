"""GAM: the patch, and one step of the game."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    DIMENSIONS,
    Backbone,
    ConfigError,
    Graft,
    LayeredPatch,
    Layout,
    Make,
    Placement,
    Site,
    SiteError,
    StructureError,
    Tap,
    TraceError,
    UnknownGraftError,
    Words,
    candidates,
    check_count,
    check_share,
    grafts_on,
    is_number,
    register,
    take,
    tensors,
    unwrapped,
)
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.discriminator import ByTap
from fxgraft.patches.gam.game import Game, Rules, paired_weights, switched_taps
from fxgraft.patches.gam.presets import PRESETS

GAME = "(game)"
"""Key of the unit that holds what lives beside the network."""


@register("gam")
@dataclass(frozen=True, kw_only=True)
class GAM(LayeredPatch):
    """GAM: match the activations of a target network on its domain to those of a source network on its own.

    H. Huang, Q. Huang, P. Krähenbühl: "Domain Transfer Through Deep Activation Matching", ECCV 2018, unsupervised
    domain adaptation. A frozen source network sees source images, the target network, which starts as its copy,
    target images of which no label is needed. At each tap A_i the target's activations are shifted and scaled to the
    source's channel moments (Gaussian matching, section 3), a discriminator D_i tells the two apart, and the target
    network learns to be mistaken for it (general matching), held back by the drift λ·Σ mean((w_s − w_t)²) of its
    weights.

    `gam_losses` computes both sides of the game in one step. Outside of it a patched model is the bare model, in
    training and in evaluation: taps record nothing, and source network and discriminators are no part of its module
    tree. A step costs a pass of the source network without gradients, the usual pass of the target, and two passes
    of each discriminator. Copies of the model carry their own source network and discriminators.

    Args:
        layers: the taps: names, globs or stage numbers, found in both networks. The authors match the last two
            layers of a classifier (the logits may be one), and four spread over the depth for dense prediction.
        layer: the same, for one.
        source: the source network, trained and frozen; a copy is kept. Default: a copy of the model as it is.
        matching: "gaussian", or None for general matching alone, as in the authors' release.
        statistics: "batch", or "running" averages over the steps, one per domain, for small batches.
        momentum: share of a step in the running averages, once 1/momentum steps were averaged evenly.
        eps: added to variances in Gaussian matching.
        gan: "jsd" (two-way cross-entropy, for classification) or "lsgan" (least squares, dense prediction).
        invert: whose labels the target network's loss inverts: those of the "target", or of "both" domains as
            the release, which halves the gradient where the batches are of one size.
        weights: factor of each tap's losses, in order; default 1 for the last and 0.1 for the others (release).
        drift: λ of the weight drift; 0.1 is the paper's, 1 the release's, 0 leaves it out.
        drift_convention: "mean" over each tensor (paper and release), or "sum" over all entries.
        discriminator: called with a tap's shape without the batch, returns a module from (B, *shape) to
            (B, K, ...) for "jsd" K = 2 and "lsgan" K = 1; K last where channels are. Default: hidden layers of
            ``hidden`` over the channels, one decision per position or token (class tokens included).
        hidden: width of the two hidden layers.
        activation: of the hidden layers, "relu" (the release's scripts) or "leaky" (slope 0.1).
        layout: of the taps with as many dimensions as it names: NCHW, NHWC, NLC, NCL or NC; found if left out.
        output: which entry of a structured output holds the logits (a key, an attribute or a position).

    Raises:
        ConfigError: an option out of range, a source network that requires gradients or does not pair with the
            target's, a discriminator that does not fit.
        SiteError: no such tap in one of the networks, one without channels, or without effect on the output.
    """

    title = "Deep activation matching"
    paper = "Huang, Huang, Krähenbühl: Domain transfer through deep activation matching. ECCV 2018"
    url = "https://www.philkr.net/papers/huang2018domain/"
    where = "taps on the last layers of a classifier, or spread over the depth of a dense predictor"
    cost = (
        "a step of `gam_losses`: a pass of the source network without gradients, and two passes of each "
        "discriminator; otherwise none"
    )
    train_only = True
    adds_parameters = True
    saves = False
    example = MappingProxyType({"layers": -1})
    needs_layers = True
    presets = PRESETS

    source: nn.Module | None = None
    matching: Literal["gaussian"] | None = "gaussian"
    statistics: Literal["batch", "running"] = "batch"
    momentum: float = 0.1
    eps: float = 1e-5
    gan: core.Gan = "jsd"
    invert: core.Invert = "target"
    weights: Sequence[float] | None = None
    drift: float = 0.1
    drift_convention: core.DriftConvention = "mean"
    discriminator: Callable[[tuple[int, ...]], nn.Module] | None = None
    hidden: int = 500
    activation: Literal["relu", "leaky"] = "relu"
    layout: Literal["NCHW", "NHWC", "NLC", "NCL", "NC"] | None = None
    output: str | int | None = None

    def __post_init__(self, layer: Words | None) -> None:
        super().__post_init__(layer)
        if isinstance(self.weights, list):
            object.__setattr__(self, "weights", tuple(self.weights))
        check_share(self, "momentum")
        weights = self.weights if self.weights is not None else ()
        if not isinstance(weights, tuple):
            raise ConfigError(f"GAM: weights are one number per tap, in order; got {weights!r}.")
        for name, value in (("eps", self.eps), ("drift", self.drift), *(("weights", w) for w in weights)):
            if not is_number(value) or not 0 <= value < float("inf"):
                raise ConfigError(f"GAM: {name} must be 0 or more, got {value!r}.")
        check_count(self, "hidden")
        if self.discriminator is not None and not callable(self.discriminator):
            raise ConfigError(
                f"GAM: discriminator is called with a tap's shape and returns a module; got {self.discriminator!r}."
            )
        if self.source is None:
            return
        if not isinstance(self.source, nn.Module):
            raise ConfigError(f"GAM: source must be a network (torch.nn.Module), got {self.source!r}.")
        learning = [name for name, p in self.source.named_parameters() if p.requires_grad]
        if learning:
            raise ConfigError(
                f"GAM: the source network requires gradients ({learning[0]!r} and {len(learning) - 1} more).\n"
                "It stays as it is while the target network is trained; this one looks like a network in training.\n"
                "Call source.requires_grad_(False), or leave source= out to take a copy of the model as it is."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Travel without networks and functions: a copy of the model carries what was made of them."""
        return {**self.__dict__, "source": None, "discriminator": None}

    def place(self, backbone: Backbone, make: Make) -> list[Placement]:
        """Put a tap on each layer, and check the taps against the source network's."""
        layers = self.layers or ()
        sites = _sites(backbone, layers, "target")
        game = make(GAME, Game, Rules.of(self))
        if self.weights is not None and len(self.weights) != len(sites):
            raise ConfigError(
                f"GAM: {len(self.weights)} weights were given for {len(sites)} taps: {', '.join(sites)}.\n"
                "Each tap has one, in the order of layers."
            )
        weights = self.weights or (*[0.1] * (len(sites) - 1), 1.0)
        values = {key: _value(backbone, site, "target") for key, site in sites.items()}
        if self.source is not None:
            source = Backbone.of(self.source, backbone.input_size)
            _check_alike(values, source, _sites(source, layers, "source"))
            if self.drift:
                paired_weights(self.source, backbone.model)
        game.weights = dict(zip(sites, weights, strict=True))
        game.input_size = backbone.input_size
        for key, site in sites.items():
            with suppress(TraceError, StructureError):  # what cannot be seen through is believed
                backbone.check_reaches_output(site, self.output)
            layout = _layout(self, backbone, site, values[key])
            game.layouts[key] = layout
            if key not in game.discriminators:
                game.add(key, values[key], layout, backbone)
        return switched_taps(backbone, make, sites)

    def installed(self, graft: Graft, backbone: Backbone) -> None:
        """Take the copy of the source network, once."""
        game_of(graft).take_source(backbone.model, self.source, self.layers or ())

    def describe(self, graft: Graft) -> str:
        """Name the taps, how they are matched and what they are told apart by."""
        game = game_of(graft)
        taps = ", ".join(f"{key} ({layout.name})" for key, layout in game.layouts.items())
        matched = f"gaussian ({self.statistics}), " if self.matching else ""
        return f"taps {taps}; {matched}{self.gan}, drift {self.drift:g}"


def _sites(backbone: Backbone, layers: Words, network: str) -> dict[str, Site]:
    try:
        return backbone.named_sites(layers)
    except SiteError as error:
        raise SiteError(
            f"GAM: the {network} network has no such tap.\n{error}\nBoth networks need all of them."
        ) from error


def _value(backbone: Backbone, site: Site, network: str) -> Tensor:
    """Return the fake tensor at a site, batch of 2."""
    value = backbone.value(site)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in (2, 3, 4):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SiteError(
            f"GAM needs vectors, tokens or maps at {site.name!r}, and the {network} network has {found} there.\n"
            "A discriminator works on the channels of a floating-point tensor with the batch first.\n"
            "fxgraft.sites(model) shows what every layer returns."
        )
    return value


def _check_alike(values: Mapping[str, Tensor], source: Backbone, sites: Mapping[str, Site]) -> None:
    """Raise unless the taps of the source network have the shapes of the target's."""
    if len(sites) != len(values):
        raise ConfigError(
            f"GAM: layers stands for {len(values)} taps in the target network ({', '.join(values)}) and for "
            f"{len(sites)} in the source network ({', '.join(sites)}).\nName the taps one by one."
        )
    for (key, value), (name, site) in zip(values.items(), sites.items(), strict=True):
        other = _value(source, site, "source")
        if other.shape[1:] != value.shape[1:]:
            raise ConfigError(
                f"GAM: the tap {key!r} has shape {tuple(value.shape[1:])} in the target network, and {name!r} "
                f"has {tuple(other.shape[1:])} in the source network.\n"
                "One discriminator sees both, channel for channel.\n"
                "Choose layers of one shape, or build the networks alike."
            )


def _layout(patch: GAM, backbone: Backbone, site: Site, value: Tensor) -> Layout:
    """Take the layout that the user names for the taps with as many dimensions; find that of others."""
    named = patch.layout is not None and DIMENSIONS[patch.layout] == value.ndim
    return Layout(patch.layout) if named else backbone.layout(site)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GAMStep:
    """Both sides of one step, each ready for ``backward()``, in any order and with optimiser steps between.

    Attributes:
        discriminator: loss of the discriminators; its gradient reaches them alone.
        mapping: loss of the target network, drift included; its gradient reaches that network alone.
        parts: "discriminator.<tap>", "mapping.<tap>" and "drift", with their weights: the summands of both.
        accuracy: share of right decisions by tap, without gradient; 0.5 is guessing.
    """

    discriminator: Tensor
    mapping: Tensor
    parts: dict[str, Tensor]
    accuracy: dict[str, Tensor]


def gam_losses(model: nn.Module, x_source: Any, x_target: Any, *, name: str | None = None) -> GAMStep:
    """Play one step of the game: pass both batches, and compute the losses of both sides.

    Args:
        model: patched with "gam", in the mode to train in; it may be inside DistributedDataParallel (where
            every process has discriminators of its own, see `discriminators`) or torch.compile.
        x_source: images for the source network, which runs in evaluation mode.
        x_target: images for the model; another batch size is fine. No labels are read.
        name: of the graft, where there are several.

    Returns:
        The losses; ``step.discriminator.backward()`` and ``step.mapping.backward()`` each belong to one optimiser.

    Raises:
        UnknownGraftError: the model has no such patch.
        ConfigError: batch statistics of one value per channel (vectors in a batch of one), or weights that no
            longer pair with the source network's.
        TapError: the model's pass went past a tap.
    """
    inner, graft = _graft(model, name)
    game, patch = game_of(graft), graft.patch
    source = game.follow(inner)
    frozen = grafts_on(source)[-1]
    with frozen.asking(listen=True), torch.no_grad():
        source(x_source)
        sources = list(take(frozen.units_of(Tap)).values())
    with graft.asking(listen=True):
        out = model(x_target)
        targets = take(graft.units_of(Tap))
    parts: dict[str, Tensor] = {}
    accuracy: dict[str, Tensor] = {}
    for (key, target), s in zip(targets.items(), sources, strict=True):
        t = game.matched(key, s, target)
        on_source, on_target = game.decide(key, s), game.decide(key, t.detach())
        judged = game.decide(key, t, frozen=True)
        weight = game.weights[key]
        told = core.discriminator_loss(on_source, on_target, patch.gan)
        fooled = core.mapping_loss(judged, on_source.detach(), gan=patch.gan, invert=patch.invert)
        parts[f"discriminator.{key}"] = weight * told
        parts[f"mapping.{key}"] = weight * fooled
        accuracy[key] = core.discriminator_accuracy(on_source, on_target, patch.gan)
    if patch.matching and patch.statistics == "running":
        game.discriminators.get_buffer("steps").add_(1)
    if patch.drift:
        parts["drift"] = patch.drift * core.weight_drift(
            *paired_weights(source, inner), patch.drift_convention
        )
    elif model is not inner:
        # A wrapper that averages gradients waits for those of every parameter, also behind the last tap.
        behind = [0 * each.nan_to_num().sum() for each in tensors(out) if each.requires_grad]
        parts["drift"] = torch.stack(behind).sum()
    sides = [[v for k, v in parts.items() if k.startswith("discriminator.") is own] for own in (True, False)]
    return GAMStep(torch.stack(sides[0]).sum(), torch.stack(sides[1]).sum(), parts, accuracy)


def discriminators(model: nn.Module, name: str | None = None) -> ByTap:
    """Return the discriminators of a patched model by the names of their taps, for an optimiser of their own.

    Its ``state_dict`` also holds the running statistics, where these are used. Under DistributedDataParallel
    every process has its own: give them the same seed, and average their gradients before the optimiser's step.

    Args:
        model: patched with "gam".
        name: of the graft, where there are several.

    Raises:
        UnknownGraftError: the model has no such patch.
    """
    return game_of(_graft(model, name)[1]).discriminators


def source(model: nn.Module, name: str | None = None) -> nn.Module:
    """Return the frozen source network of a patched model, with taps on it.

    Args:
        model: patched with "gam".
        name: of the graft, where there are several.

    Raises:
        UnknownGraftError: the model has no such patch.
    """
    inner, graft = _graft(model, name)
    return game_of(graft).follow(inner)


def game_of(graft: Graft) -> Game:
    """Return what a graft keeps beside its network."""
    game = graft.units.get(GAME)
    if not isinstance(game, Game):
        raise UnknownGraftError(f"{graft.name!r} is not on a model.\nPass the model that was patched.")
    return game


def _graft(model: nn.Module, name: str | None) -> tuple[nn.Module, Graft]:
    """Find the model inside what wraps it, and its graft."""
    inner = unwrapped(model)
    known = {graft.name: graft for graft in grafts_on(inner) if isinstance(graft.patch, GAM)}
    if not known:
        raise UnknownGraftError(
            f"{inner._get_name()} is not patched with GAM.\n"
            'Call fxgraft.patch(model, "gam", layers=[...]) first.'
        )
    if name is None and len(known) > 1:
        raise UnknownGraftError(
            f"{inner._get_name()} is patched with GAM {len(known)} times: {', '.join(map(repr, known))}.\n"
            "Say which is meant, as name=."
        )
    if name is not None and name not in known:
        raise UnknownGraftError(f"There is no GAM named {name!r} on the model.\n{candidates(name, known)}")
    return inner, known[name or next(iter(known))]
