"""What the matching of activations keeps beside a network: a frozen source network, and discriminators.

Held by a unit that is never placed, so that no part of it joins the network's module tree: no ``state_dict`` key,
no parameter that a wrapper or an optimiser of the network would find.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxgraft.errors import ConfigError
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.ledger import Ledger
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.grafting.taps import Tap, named_sites, tap_placements
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.layout import Layout
from fxgraft.graph.structure.sites import Site, Words
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.discriminator import ByTap, Discriminator, check_discriminator

if TYPE_CHECKING:
    from fxgraft.patches.gam.patch import GAM

Make = Callable[[str, Callable[[], Unit]], Unit]


class SwitchedTap(Tap):
    """A tap that records only while it is listened to."""

    on = False

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        return super().forward(x) if self.on else x


def switched_taps(anatomy: Anatomy, make: Make, sites: Mapping[str, Site]) -> list[Placement]:
    """Put a `SwitchedTap` at every site; arguments as `tap_placements`."""
    return tap_placements(anatomy, lambda key, _: make(key, lambda: SwitchedTap(key)), sites)


@contextmanager
def listening(graft: Graft) -> Iterator[list[SwitchedTap]]:
    """Let the taps of a graft record for the time of the block."""
    taps = [unit for unit in graft.units.values() if isinstance(unit, SwitchedTap)]
    for tap in taps:
        tap.on = True
    try:
        yield taps
    finally:
        for tap in taps:
            tap.on = False


class _SourceTaps:
    """The taps on the source network, as a patch."""

    call_options: tuple[str, ...] = ()

    def __init__(self, layers: Words) -> None:
        self.layers = layers

    def place(self, anatomy: Anatomy, make: Make) -> list[Placement]:
        """Put a tap on each layer."""
        return switched_taps(anatomy, make, named_sites(anatomy, self.layers))


class Game(Unit):
    """What lives beside the network: the source network, the discriminators and the running statistics.

    It is never placed in the network, so that nothing of it joins the module tree. The source network is a
    plain attribute, so that it is not among the parameters to train.
    """

    source: nn.Module | None

    def __init__(self, patch: GAM) -> None:
        super().__init__()
        self.patch = patch
        self.__dict__["source"] = None
        self.discriminators = ByTap()
        self.layouts: dict[str, Layout] = {}
        self.weights: dict[str, float] = {}
        self.input_size: tuple[int, ...] | None = None
        if patch.matching and patch.statistics == "running":
            self.discriminators.register_buffer("steps", torch.zeros(()))

    def add(self, key: str, value: Tensor, layout: Layout, anatomy: Anatomy) -> None:
        """Build the discriminator of a tap from its value (fake)."""
        patch, dim = self.patch, channel_dim(layout)
        channels, outputs = value.shape[dim], core.OUTPUTS[patch.gan]
        wide = torch.promote_types(value.dtype, torch.float32)
        if patch.discriminator is None:
            positions = value.ndim - 2 if dim == 1 else 0
            made = Discriminator(
                channels, outputs, positions, hidden=patch.hidden, activation=patch.activation
            )
        else:
            made = patch.discriminator(tuple(value.shape[1:]))
        if isinstance(made, nn.Module):
            made = made.to(value.device, wide)
        with anatomy.observation.mode:
            check_discriminator(made, value.to(wide), outputs, dim, key)
        self.discriminators[key] = made
        if "steps" in self.discriminators._buffers:
            # Source and target, each with mean and variance.
            moments = torch.zeros((2, 2, channels), device=value.device, dtype=wide)
            self.discriminators.register_buffer(_moments(key), moments)

    def installed(self, anatomy: Any) -> None:
        """Take the copy of the source network, once."""
        if self.source is None:
            self.__dict__["source"] = self._frozen(anatomy.model)

    def _frozen(self, model: nn.Module) -> nn.Module:
        """Copy the network that is the source, with the grafts that act in it, and put taps on the copy."""
        if self.patch.source is not None:
            source = copy.deepcopy(self.patch.source)
        else:
            ledger: Ledger = state_of(model).ledger  # type: ignore[union-attr]
            with ledger.lifted():
                source = copy.deepcopy(model)
            ours = ledger.portable()
            ours.grafts = [g for g in ours.grafts if not g.patch.train_only]
            if ours.grafts:
                copy.deepcopy(ours).install(source)
        state = state_of(source)
        ledger = state.ledger if state is not None else Ledger()
        taps = Graft("gam_source", _SourceTaps(self.patch.layers), input_size=self.input_size)
        ledger.install(source, [*ledger.grafts, taps])
        return source.requires_grad_(False).eval()

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
        """Bring the target's channel moments to the source's."""
        patch, dim = self.patch, channel_dim(self.layouts[key])
        if patch.matching is None:
            return target
        if patch.statistics == "batch":
            moments = core.channel_moments(source, dim, eps=patch.eps)
            return core.gaussian_match(target, *moments, dim=dim, eps=patch.eps)
        running = self.discriminators.get_buffer(_moments(key))
        weight = (1 / (self.discriminators.get_buffer("steps") + 1)).clamp_min(patch.momentum)
        for domain, x in enumerate((source, target)):
            running[domain] = core.update_moments(running[domain], x, weight, dim)
        mean, std = running[:, 0].clone(), (running[:, 1] + patch.eps).sqrt()
        return core.gaussian_match(
            target, mean[0], std[0], target_mean=mean[1], target_std=std[1], dim=dim, eps=patch.eps
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


def _moments(key: str) -> str:
    return "moments/" + key.replace(".", "/")


def channel_dim(layout: Layout) -> int:
    """Say which dimension holds the channels: 1, or -1 for the last."""
    return 1 if layout.name in ("NCHW", "NCL", "NC") else -1


def paired_weights(source: nn.Module, target: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Pair the target's weights that train with the source's, by name; other patches' are no part of it."""
    known = dict(source.named_parameters())
    pairs = []
    for name, parameter in target.named_parameters():
        if any(part.startswith("graft_") for part in name.split(".")) or not parameter.requires_grad:
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
