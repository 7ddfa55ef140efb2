"""The game of GAM: the state that it keeps outside of the network, a frozen source network and discriminators.

A unit that is never placed holds it. So nothing of it joins the network's module tree: it adds no ``state_dict`` key,
and no parameter that a wrapper or an optimiser of the network would find.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    Backbone,
    ConfigError,
    FxgraftWarning,
    Graft,
    Layout,
    Make,
    Patch,
    Placement,
    SiteSpec,
    Unit,
    UnknownGraftError,
    add_graft,
    copy_with,
    tap_placements,
)
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.discriminator import ByTap, Discriminator, check_discriminator
from fxgraft.patches.gam.matching import MatchedTap, SwitchedTap

Born = Mapping[str, tuple[weakref.ref[nn.Module], weakref.ref[nn.Parameter], int]]
"""The weights that a source network was copied from, by name: the layer, the parameter, and its version then."""


@dataclass(frozen=True)
class Rules:
    """The options of the patch that the game needs, under the same names."""

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
        """Read the options of a patch."""
        return cls(**{f.name: getattr(patch, f.name) for f in fields(cls)})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out functions: a copy of the model carries the modules that they made."""
        return {**self.__dict__, "discriminator": None}


@dataclass(frozen=True, kw_only=True)
class SourceTaps(Patch):
    """The taps on the source network, which is never trained nor merged."""

    layers: SiteSpec

    def place(self, backbone: Backbone, make: Make) -> list[Placement]:
        """Put a tap on each layer."""
        return tap_placements(
            backbone, make, backbone.named_sites(self.layers), kind=SwitchedTap, learns=False
        )


class Game(Unit):
    """The unit that holds the source network, the discriminators and the running statistics.

    It is never placed in the network, so that nothing of it joins the module tree. The source network is a
    plain attribute, so that it is not among the parameters to train.
    """

    KEY: ClassVar[str] = "(game)"
    """What it is called among the units of its graft."""

    source: nn.Module | None
    born: Born | None = None

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.__dict__["source"] = None  # past nn.Module, which would register it as a child
        self.begun = self.moved = self.warned = False
        self.discriminators = ByTap()
        self.layouts: dict[str, Layout] = {}
        self.weights: dict[str, float] = {}
        self.channels: dict[str, int] = {}
        self.input_size: tuple[int, ...] | None = None
        if self.matches and rules.statistics == "running":
            self.discriminators.register_buffer("steps", torch.zeros(()))

    @property
    def matches(self) -> bool:
        """Whether only the discriminators see matched activations."""
        return self.rules.matching is not None and self.rules.match_in == "discriminators"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the weights that the source network was copied from, and keep whether they have changed."""
        return {**super().__getstate__(), "moved": self.moved or _changed(self.born)}

    def add(self, key: str, value: Tensor, layout: Layout, backbone: Backbone) -> None:
        """Build the discriminator of a tap from its value (fake), once.

        Raises:
            ConfigError: there is one already, for another number of channels.
        """
        rules, dim = self.rules, channel_dim(layout)
        channels, outputs = value.shape[dim], core.OUTPUTS[rules.gan]
        if key in self.discriminators:
            if self.channels[key] != channels:
                raise ConfigError(
                    f"GAM: {key!r} has {channels} channels now, and had {self.channels[key]} when the model was "
                    "patched.\nThe layer was replaced; source network and discriminators are made for the old one.\n"
                    "Replace layers first, then patch: fxgraft.unpatch(model), and patch the model as it is now."
                )
            return
        self.channels[key] = channels
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

    def take_source(self, model: nn.Module, given: nn.Module | None, own: Graft, layers: SiteSpec) -> None:
        """Copy the source network, with the grafts that act in it, and put taps on the copy; only the first time.

        Args:
            model: the target network.
            given: the source network; None for the target network as it is.
            own: the calling graft, which the copy won't have.
            layers: the taps.
        """
        if given is None and self.born is None and not self.begun:
            self.bind(born=_weights(model))
        if self.source is not None:
            return
        try:
            source = (
                copy.deepcopy(given)
                if given is not None
                else copy_with(model, lambda graft: graft.name != own.name and not graft.patch.train_only)
            )
        except (RuntimeError, TypeError) as error:  # the errors of torch and pickle
            raise ConfigError(
                f"The source network is a copy, and {(given or model)._get_name()} cannot be copied: {error}\n"
                "Some networks keep a tensor of their last forward pass.\n"
                "Patch before the first pass, or call the model once under torch.no_grad()."
            ) from error
        taps = SourceTaps(layers=layers)
        add_graft(source, Graft("gam_source", taps, input_size=self.input_size))
        self.__dict__["source"] = source.requires_grad_(False).eval()
        self.begun = given is not None

    def renew_source(self, model: nn.Module, own: Graft) -> None:
        """Copy the source network again if the model's weights have changed and no step was made yet.

        The source network is a copy of the trained model, whose weights may be loaded, or trained, after it was
        patched. Once the adaptation is under way, the model's weights are no longer the source's.

        Raises:
            ConfigError: a layer was replaced since.

        Warns:
            FxgraftWarning: nothing tells whether the weights are a source's.
        """
        if self.begun:
            return
        check_replaced(model, self.born or {})
        if not (self.moved or _changed(self.born) or self._differs(model)):
            return
        taps = own.units_of(MatchedTap)
        under_way = any(tap.trained for tap in taps)
        if not under_way:
            self._copy_again(model)
        if not self.warned and (under_way or not taps):
            self.warned = True
            warnings.warn(_unclear(model, own.name, under_way), FxgraftWarning, stacklevel=5)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Pair the source network's tensors with the model's of the same name."""
        source = self.follow(model)
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        held = {**dict(source.named_parameters()), **dict(source.named_buffers())}
        return [(tensor, own[name].detach()) for name, tensor in held.items() if name in own]

    def _differs(self, model: nn.Module) -> bool:
        """Say whether weights have changed that a wrapper has sharded, so that their versions tell nothing."""
        sharded = [(mine, theirs) for mine, theirs in self._pairs(model) if _is_sharded(theirs)]
        # All of them first: every process takes part in gathering every weight.
        same = [torch.equal(mine, _whole(theirs)) for mine, theirs in sharded]
        return not all(same)

    @torch.no_grad()
    def _copy_again(self, model: nn.Module) -> None:
        for mine, theirs in self._pairs(model):
            mine.copy_(_whole(theirs))
        self.bind(born=_weights(model))
        self.moved = False

    def follow(self, model: nn.Module) -> nn.Module:
        """Bring everything to the model's device and dtype; return the source network, in evaluation mode."""
        source = self.source
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        if source is None or like is None:
            raise ConfigError(
                f"{model._get_name()} has no weights, so there is nothing to adapt.\nPatch a network that was trained."
            )
        device_and_dtype = (like.device, like.dtype)
        if any((p.device, p.dtype) != device_and_dtype for p in source.parameters() if p.is_floating_point()):
            source.to(*device_and_dtype)
        self.discriminators.to(like.device, torch.promote_types(like.dtype, torch.float32))
        return source.eval() if source.training else source

    def matched(self, key: str, source: Tensor, target: Tensor) -> Tensor:
        """Match the target's activations to the source's moments, where only the discriminators see them matched."""
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
        """Return the decisions (N, K, ...) of a tap's discriminator; if frozen, with a copy of its weights."""
        module = self.discriminators[key]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if frozen:
            # A copy, so that the optimisers may step in any order between the two backward passes.
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            state = {name: tensor.detach().clone() for name, tensor in state.items()}
            decisions = torch.func.functional_call(module, state, (x,))
        else:
            decisions = module(x)
        last = channel_dim(self.layouts[key]) == -1 and decisions.ndim > 2
        return decisions.flatten(0, -2) if last else decisions


def game_of(graft: Graft) -> Game:
    """Return the game of a graft."""
    game = graft.units.get(Game.KEY)
    if not isinstance(game, Game):
        raise UnknownGraftError(f"{graft.name!r} is not on a model.\nPass the model that was patched.")
    return game


def _weights(model: nn.Module) -> Born:
    """Note the weights of a network as they are now; those of grafts aren't part of it."""
    return {
        f"{path}.{name}" if path else name: (weakref.ref(module), weakref.ref(p), _version(p))
        for path, module in model.named_modules()
        if not isinstance(module, Unit)
        for name, p in module._parameters.items()
        if p is not None
    }


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_sharded(weight: Any) -> bool:
    return hasattr(weight, "full_tensor")


def _whole(weight: Tensor) -> Tensor:
    """Return a weight, gathered where a wrapper has sharded it."""
    return weight.full_tensor() if _is_sharded(weight) else weight  # type: ignore[operator]


def _changed(born: Born | None) -> bool:
    """Say whether weights were written to or replaced since they were noted."""
    for path, (owner, known, version) in (born or {}).items():
        module = owner()
        now = None if module is None else module._parameters.get(path.rpartition(".")[2])
        if not _is_sharded(now) and (now is None or now is not known() or _version(now) != version):
            return True
    return False


def check_replaced(model: nn.Module, born: Born) -> None:
    """Raise unless the model still has the layers that its source network was copied from."""
    for name, p in model.named_parameters():
        if name in born and born[name][1]() is not p:
            path = name.rpartition(".")[0]
            if born[name][0]() is not model.get_submodule(path):
                raise ConfigError(
                    f"GAM: {path!r} was replaced after the model was patched.\n"
                    "The source network is a copy from before, with the old layer, and does not pair with the model.\n"
                    "Replace layers first, then patch: fxgraft.unpatch(model), and patch the model as it is now; or "
                    "pass source=."
                )


def _unclear(model: nn.Module, graft: str, under_way: bool) -> str:
    """Make the warning for loaded weights of which it is unknown whether they are the source's or adapted ones."""
    if under_way:
        return (
            f"The weights of this {model._get_name()} are of an adaptation that is under way, and the source network "
            f"of {graft!r} is not among them: it is the model as it was when it was patched.\n"
            "Unless that was the trained source network, activations are matched to the wrong one.\n"
            'Say which it is: fxgraft.patch(model, "gam", source=...).'
        )
    return (
        f"The weights of this {model._get_name()} have changed since it was patched with {graft!r}, and the source "
        "network is copied again: it is the model as it is now.\n"
        "Weights of an adaptation that is under way would be taken for the source's.\n"
        'Say which it is: fxgraft.patch(model, "gam", source=...).'
    )


def _moments(key: str) -> str:
    return "moments/" + key.replace(".", "/")


def channel_dim(layout: Layout) -> int:
    """Say which dimension holds the channels: 1, or -1 for the last."""
    return -1 if layout.channels_last else 1


def paired_weights(
    source: nn.Module, target: nn.Module, born: Born | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Pair the target's weights that train with the source's, by name; other patches' aren't part of it.

    Args:
        source: the source network.
        target: the target network.
        born: the weights that the source network was copied from, if it was.

    Raises:
        ConfigError: they do not pair, or a layer of the target was replaced since.
    """
    check_replaced(target, born or {})
    known = dict(source.named_parameters())
    grafted = {id(p) for module in target.modules() if isinstance(module, Unit) for p in module.parameters()}
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
