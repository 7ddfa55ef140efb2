"""One step of the game: the losses of both sides, and access to the discriminators and the source network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    Graft,
    Tap,
    UnknownGraftError,
    candidates,
    grafts_in,
    grafts_on,
    take,
    tensors,
    unwrapped,
)
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.discriminator import ByTap
from fxgraft.patches.gam.game import game_of, paired_weights
from fxgraft.patches.gam.matching import MatchedTap, Matching
from fxgraft.patches.gam.patch import GAM


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


@torch.no_grad()
def _activations(source: nn.Module, graft: Graft, x: Any) -> list[Tensor]:
    """Pass a batch through the source network; return what its taps saw."""
    with graft.override(listen=True):
        source(x)
        return list(take(graft.units_of(Tap)).values())


def gam_losses(model: nn.Module, x_source: Any, x_target: Any, *, name: str | None = None) -> GAMStep:
    """Play one step of the game: pass both batches, and compute the losses of both sides.

    Args:
        model: patched with "gam", in the mode to train in; it may be inside DistributedDataParallel (where
            every process has discriminators of its own, see `discriminators`) or torch.compile.
        x_source: images for the source network, which runs in evaluation mode.
        x_target: images for the model; another batch size is fine. No labels are read.
        name: name of the graft, where there are several.

    Returns:
        The losses; ``step.discriminator.backward()`` and ``step.mapping.backward()`` each belong to one optimiser.

    Raises:
        UnknownGraftError: the model has no such patch.
        ConfigError: batch statistics of one value per channel (vectors in a batch of one), or weights that no
            longer pair with the source network's, as where a layer was replaced.
        BypassError: the model's pass went past a tap.
    """
    inner, graft = _graft(model, name)
    game, patch = game_of(graft), graft.patch
    source = _current_source(inner, graft)
    frozen = grafts_on(source)[-1]
    sources = _activations(source, frozen, x_source)
    # Matching taps need the source network's activations at the same places.
    matching = Matching(dict(zip(game.layouts, sources, strict=True)))
    with graft.override(listen=True, matching=matching):
        out = model(x_target)
        targets = take(graft.units_of(Tap))
    for tap in graft.units_of(MatchedTap):
        tap.move(matching)
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
    if game.matches and patch.statistics == "running":
        game.discriminators.get_buffer("steps").add_(1)
    if patch.drift:
        parts["drift"] = patch.drift * core.weight_drift(
            *paired_weights(source, inner, game.born), patch.drift_convention
        )
    elif model is not inner:
        # A wrapper that averages gradients waits for those of every parameter, also behind the last tap.
        behind = [0 * tensor.nan_to_num().sum() for tensor in tensors(out) if tensor.requires_grad]
        parts["drift"] = torch.stack(behind).sum()
    for name, value in {**parts, **{f"accuracy.{key}": share for key, share in accuracy.items()}}.items():
        graft.measure(name, value)
    game.begun = True
    sides = [[v for k, v in parts.items() if k.startswith("discriminator.") is own] for own in (True, False)]
    return GAMStep(torch.stack(sides[0]).sum(), torch.stack(sides[1]).sum(), parts, accuracy)


def discriminators(model: nn.Module, name: str | None = None) -> ByTap:
    """Return the discriminators of a patched model by the names of their taps, for an optimiser of their own.

    Its ``state_dict`` also holds the running statistics, where these are used. Under DistributedDataParallel
    every process has its own: give them the same seed, and average their gradients before the optimiser's step.
    The moments that the network matches by are buffers of it, and come from the first process, as BatchNorm's do.

    Args:
        model: patched with "gam".
        name: name of the graft, where there are several.

    Raises:
        UnknownGraftError: the model has no such patch.
    """
    return game_of(_graft(model, name)[1]).discriminators


def source(model: nn.Module, name: str | None = None) -> nn.Module:
    """Return the frozen source network of a patched model, with taps on it.

    Without ``source=`` it is a copy of the model, and until the first step a copy of the weights as they are.

    Args:
        model: patched with "gam".
        name: name of the graft, where there are several.

    Raises:
        UnknownGraftError: the model has no such patch.
        ConfigError: a layer was replaced since the model was patched.

    Warns:
        FxgraftWarning: the weights were changed, and nothing tells whether they are the source's.
    """
    inner, graft = _graft(model, name)
    return _current_source(inner, graft)


def begin(model: nn.Module, name: str | None = None) -> None:
    """Fix the source network as it is now, as the first successful step does."""
    game_of(_graft(model, name)[1]).begun = True


def renew_sources(model: nn.Module) -> None:
    """Bring the source networks of a model and of its parts up to date, before its statistics become the target's."""
    for graft in grafts_in(model):
        part = graft.model()
        if isinstance(graft.patch, GAM) and part is not None:
            _current_source(part, graft)


def _current_source(model: nn.Module, graft: Graft) -> nn.Module:
    game = game_of(graft)
    source_network = game.follow(model)
    game.renew_source(model, graft)
    return source_network


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
