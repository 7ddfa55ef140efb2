"""What the matching of activations keeps beside a network: a frozen source network, and discriminators.

Held by a unit that is never placed, so that no part of it joins the network's module tree: no ``state_dict`` key,
no parameter that a wrapper or an optimiser of the network would find.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    Backbone,
    ConfigError,
    Graft,
    Layout,
    Make,
    Patch,
    Placement,
    Unit,
    UnknownGraftError,
    Words,
    add_graft,
    copy_with,
    tap_placements,
)
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.discriminator import ByTap, Discriminator, check_discriminator
from fxgraft.patches.gam.matching import SwitchedTap


@dataclass(frozen=True)
class Rules:
    """The options of the patch that a game is played by, under the same names."""

    matching: Literal["gaussian"] | None
    match_in: Literal["network", "discriminators"]
    statistics: Literal["batch", "running"]
    momentum: float
    eps: float
    gan: core.Gan
    discriminator: Callable[[tuple[int, ...]], nn.Module] | None
    hidden: int
    activation: Literal["relu", "leaky"]

    @classmethod
    def of(cls, patch: Any) -> Rules:
        """Take the options out of a patch."""
        return cls(**{f.name: getattr(patch, f.name) for f in fields(cls)})

    def __getstate__(self) -> dict[str, Any]:
        """Travel without functions: a copy of the model carries what was made of them."""
        return {**self.__dict__, "discriminator": None}


@dataclass(frozen=True, kw_only=True)
class SourceTaps(Patch):
    """The taps on the source network, which is never trained nor merged."""

    layers: Words

    def place(self, backbone: Backbone, make: Make) -> list[Placement]:
        """Put a tap on each layer."""
        return tap_placements(
            backbone, make, backbone.named_sites(self.layers), kind=SwitchedTap, learns=False
        )


class Game(Unit):
    """What lives beside the network: the source network, the discriminators and the running statistics.

    It is never placed in the network, so that nothing of it joins the module tree. The source network is a
    plain attribute, so that it is not among the parameters to train.
    """

    KEY: ClassVar[str] = "(game)"
    """What it is called among the units of its graft."""

    source: nn.Module | None

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.__dict__["source"] = None
        self.discriminators = ByTap()
        self.layouts: dict[str, Layout] = {}
        self.weights: dict[str, float] = {}
        self.input_size: tuple[int, ...] | None = None
        if self.matches and rules.statistics == "running":
            self.discriminators.register_buffer("steps", torch.zeros(()))

    @property
    def matches(self) -> bool:
        """Whether activations are matched for the discriminators alone."""
        return self.rules.matching is not None and self.rules.match_in == "discriminators"

    def add(self, key: str, value: Tensor, layout: Layout, backbone: Backbone) -> None:
        """Build the discriminator of a tap from its value (fake)."""
        rules, dim = self.rules, channel_dim(layout)
        channels, outputs = value.shape[dim], core.OUTPUTS[rules.gan]
        wide = torch.promote_types(value.dtype, torch.float32)
        if rules.discriminator is None:
            positions = value.ndim - 2 if dim == 1 else 0
            made = Discriminator(
                channels, outputs, positions, hidden=rules.hidden, activation=rules.activation
            )
        else:
            made = rules.discriminator(tuple(value.shape[1:]))
        if isinstance(made, nn.Module):
            made = made.to(value.device, wide)
        with backbone.fake_mode:
            check_discriminator(made, value.to(wide), outputs, dim, key)
        self.discriminators[key] = made
        if "steps" in self.discriminators._buffers:
            # Source and target, each with mean and variance.
            moments = torch.zeros((2, 2, channels), device=value.device, dtype=wide)
            self.discriminators.register_buffer(_moments(key), moments)

    def take_source(self, model: nn.Module, given: nn.Module | None, own: Graft, layers: Words) -> None:
        """Copy the network that is the source, with the grafts that act in it, and put taps on the copy; once.

        Args:
            model: the target network.
            given: the source network; None for the target network as it is.
            own: the graft that asks, which is no part of the copy.
            layers: the taps.
        """
        if self.source is not None:
            return
        try:
            source = (
                copy.deepcopy(given)
                if given is not None
                else copy_with(model, lambda graft: graft.name != own.name and not graft.patch.train_only)
            )
        except (RuntimeError, TypeError) as error:  # what torch and pickle raise
            raise ConfigError(
                f"The source network is a copy, and {(given or model)._get_name()} cannot be copied: {error}\n"
                "Some networks keep a tensor of their last forward pass.\n"
                "Patch before the first pass, or call the model once under torch.no_grad()."
            ) from error
        taps = SourceTaps(layers=layers)
        add_graft(source, Graft("gam_source", taps, input_size=self.input_size))
        self.__dict__["source"] = source.requires_grad_(False).eval()

    def follow(self, model: nn.Module) -> nn.Module:
        """Bring everything to the model's device and dtype; return the source network, in evaluation mode."""
        source = self.source
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        if source is None or like is None:
            raise ConfigError(f"{model._get_name()} has no weights, so there is nothing to adapt.")
        place = (like.device, like.dtype)
        if any((p.device, p.dtype) != place for p in source.parameters() if p.is_floating_point()):
            source.to(*place)
        self.discriminators.to(like.device, torch.promote_types(like.dtype, torch.float32))
        return source.eval() if source.training else source

    def matched(self, key: str, source: Tensor, target: Tensor) -> Tensor:
        """Bring what the discriminators see of the target to the source's channel moments, if they are who sees it."""
        rules, dim = self.rules, channel_dim(self.layouts[key])
        if not self.matches:
            return target
        if rules.statistics == "batch":
            moments = core.channel_moments(source, dim, eps=rules.eps)
            return core.gaussian_match(target, *moments, dim=dim, eps=rules.eps)
        running = self.discriminators.get_buffer(_moments(key))
        weight = (1 / (self.discriminators.get_buffer("steps") + 1)).clamp_min(rules.momentum)
        for domain, x in enumerate((source, target)):
            running[domain] = core.update_moments(running[domain], x, weight, dim)
        mean, std = running[:, 0].clone(), (running[:, 1] + rules.eps).sqrt()
        return core.gaussian_match(
            target, mean[0], std[0], target_mean=mean[1], target_std=std[1], dim=dim, eps=rules.eps
        )

    def decide(self, key: str, x: Tensor, frozen: bool = False) -> Tensor:
        """Ask the discriminator of a tap: decisions (N, K, ...); if frozen, on a copy of its weights."""
        module = self.discriminators[key]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if frozen:
            # A copy, so that the optimisers may step in any order between the two backward passes.
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            state = {name: each.detach().clone() for name, each in state.items()}
            found = torch.func.functional_call(module, state, (x,))
        else:
            found = module(x)
        last = channel_dim(self.layouts[key]) == -1 and found.ndim > 2
        return found.flatten(0, -2) if last else found


def game_of(graft: Graft) -> Game:
    """Return what a graft keeps beside its network."""
    game = graft.units.get(Game.KEY)
    if not isinstance(game, Game):
        raise UnknownGraftError(f"{graft.name!r} is not on a model.\nPass the model that was patched.")
    return game


def _moments(key: str) -> str:
    return "moments/" + key.replace(".", "/")


def channel_dim(layout: Layout) -> int:
    """Say which dimension holds the channels: 1, or -1 for the last."""
    return 1 if layout.name in ("NCHW", "NCL", "NC") else -1


def paired_weights(source: nn.Module, target: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Pair the target's weights that train with the source's, by name; other patches' are no part of it."""
    known = dict(source.named_parameters())
    grafted = {id(p) for each in target.modules() if isinstance(each, Unit) for p in each.parameters()}
    pairs = []
    for name, parameter in target.named_parameters():
        if id(parameter) in grafted or not parameter.requires_grad:
            continue
        if name not in known or known[name].shape != parameter.shape:
            what = f"{tuple(known[name].shape)} there" if name in known else "missing there"
            raise ConfigError(
                f"GAM: the source network does not pair with the target's: {name!r} is {tuple(parameter.shape)} "
                f"here and {what}.\nWeight drift compares the networks tensor by tensor.\n"
                "Pass drift=0, or build the networks alike."
            )
        pairs.append((known[name], parameter))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
