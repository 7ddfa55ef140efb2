"""GAM: the patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from fxgraft.extend import (
    DIMENSIONS,
    Absorber,
    Backbone,
    ConfigError,
    Graft,
    LayeredPatch,
    Layout,
    LayoutName,
    Make,
    MergeError,
    Picture,
    Placement,
    Site,
    SiteError,
    SiteSpec,
    StructureError,
    TraceError,
    View,
    check_count,
    check_share,
    is_number,
    register,
    tap_placements,
)
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.game import Game, Rules, channel_dim, game_of, paired_weights
from fxgraft.patches.gam.matching import MatchedTap, SwitchedTap
from fxgraft.patches.gam.picture import tap_panels
from fxgraft.patches.gam.presets import PRESETS

TASKS: dict[str, dict[str, Any]] = {
    "classification": {"gan": "jsd", "drift": 1.0},
    "dense": {"gan": "lsgan", "drift": 0.1},
}
"""Defaults of the options that the two published uses of the method differ in: the release's, and the paper's."""


@register("gam")
@dataclass(frozen=True, kw_only=True)
class GAM(LayeredPatch):
    """GAM: match the activations of a target network on its domain to those of a source network on its own.

    H. Huang, Q. Huang, P. Krähenbühl: "Domain Transfer Through Deep Activation Matching", ECCV 2018, unsupervised
    domain adaptation. A frozen source network sees source images, the target network, which starts as its copy,
    target images of which no label is needed. At each tap A_i the target network shifts and scales its channels to
    the source's moments (Gaussian matching, section 3), a discriminator D_i tells the two apart, and the target
    network learns to be mistaken for it (general matching), held back by the drift λ·Σ mean((w_s − w_t)²) of its
    weights.

    `gam_losses` computes both sides of the game in one step, and moves the running moments that the network matches
    by everywhere else. Until the first step a patched model computes what the bare model does; source network and
    discriminators are never part of its module tree. `fxgraft.merge` folds shift and scale into the stock weights of
    the layer that gives the tapped value (BatchNorm, linear, convolution) or of the linear layer that alone reads it;
    at other taps (behind an activation or a sum) they stay an operation of their own, and merging is refused by name.
    `fxgraft.unpatch` leaves them out. A step costs a pass of the source network without gradients, the usual pass of
    the target, and two passes of each discriminator. Copies of the model carry their own source network and
    discriminators.

    Args:
        layers: the taps: names, globs or stage numbers, found in both networks. The authors match the last two
            layers of a classifier (the logits may be one), and four spread over the depth for dense prediction. A
            linear layer is tapped before its activation; the release taps behind it, which is a name of its own.
        layer: the same, for one.
        source: the source network, trained and frozen; a copy is kept. Default: a copy of the model as it is before
            the first step, so weights may be loaded after patching; layers may not be replaced.
        task: the task whose defaults to use: "classification" (the release's: gan "jsd", drift 1, weights 0.1 and for
            the last tap 1) or "dense" prediction (the paper's: "lsgan", drift 0.1, weights 1).
        matching: "gaussian", or None for general matching alone, as in the authors' release.
        match_in: the "network", or what the "discriminators" see, which leaves the network as it is.
        statistics: what matching works with in a step: the "batch", or "running" averages, one per domain, for small
            batches.
        momentum: share of a step in the running averages, once 1/momentum steps were averaged evenly.
        eps: added to variances in Gaussian matching.
        gan: "jsd" (two-way cross-entropy) or "lsgan" (least squares); by default the task's.
        invert: the domains whose labels the target network's loss inverts: those of the "target", or of "both"
            domains as the release, which halves the gradient where the batches are of one size.
        weights: factor of each tap's losses, in order; by default the task's.
        drift: λ of the weight drift, by default the task's; 0 leaves it out.
        drift_convention: "mean" over each tensor (paper and release), or "sum" over all entries.
        discriminator: a function from a tap's shape, without the batch, to a module from (B, *shape) to
            (B, K, ...) for "jsd" K = 2 and "lsgan" K = 1; K last where channels are. Default: hidden layers of
            ``hidden`` over the channels, one decision per position or token (class tokens included).
        hidden: width of the two hidden layers.
        activation: the activation of the hidden layers, "relu" (the release's scripts) or "leaky" (slope 0.1).
        layout: layout of the taps that have as many dimensions as it names: NCHW, NHWC, NLC, NCL, NC, NCDHW or NDHWC;
            found if left out.
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
        "discriminator; otherwise a scale and a shift at each tap until merged"
    )
    idea = (
        "A trained network is adapted to another domain without its labels: discriminators tell its "
        "activations there from those of the frozen source network, and it learns to be mistaken for "
        "that."
    )
    equation = (
        "x' = (x − μ_t) / σ_t · σ_s + μ_s at each tap; the discriminator D minimises −log D(A_s) − log(1 "
        "− D(x')), the network −log D(x') + λ · Σ mean((w_s − w_t)²)"
    )
    works_with = (
        "classifiers and dense predictors; fxgraft.adapt, checkpoints, DistributedDataParallel; all other "
        "methods"
    )
    hurts = (
        "domains whose classes are not equally frequent, since equal activations are then not what is "
        'right; batches of a few images (statistics="running" helps)'
    )
    measures = MappingProxyType(
        {
            "accuracy.<tap>": "share of right decisions of the discriminator: 0.5 is guessing, 1 a game lost",
            "discriminator.<tap>": "loss of the discriminator, weighted",
            "mapping.<tap>": "loss of the network, weighted",
            "drift": "weight drift, weighted",
        }
    )
    adds_parameters = True
    saves = False
    example = MappingProxyType({"layers": -1})
    presets = PRESETS

    source: nn.Module | None = None
    task: Literal["classification", "dense"] = "classification"
    matching: Literal["gaussian"] | None = "gaussian"
    match_in: Literal["network", "discriminators"] = "network"
    statistics: Literal["batch", "running"] = "batch"
    momentum: float = 0.1
    eps: float = 1e-5
    gan: core.Gan | None = None
    invert: core.Invert = "target"
    weights: Sequence[float] | None = None
    drift: float | None = None
    drift_convention: core.DriftConvention = "mean"
    discriminator: Callable[[tuple[int, ...]], nn.Module] | None = None
    hidden: int = 500
    activation: Literal["relu", "leaky"] = "relu"
    layout: LayoutName | None = None
    output: str | int | None = None

    def __post_init__(self, layer: SiteSpec | None) -> None:
        super().__post_init__(layer)
        if isinstance(self.weights, list):
            object.__setattr__(self, "weights", tuple(self.weights))
        for option, value in TASKS[self.task].items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, value)
        check_share(self, "momentum")
        weights = self.weights if self.weights is not None else ()
        if not isinstance(weights, tuple):
            raise ConfigError(
                f"GAM: weights are one number per tap, in order; got {weights!r}.\n"
                "Pass for example weights=[1.0, 0.5] for two layers."
            )
        for name, value in (("eps", self.eps), ("drift", self.drift), *(("weights", w) for w in weights)):
            if not is_number(value) or not 0 <= value < float("inf"):  # type: ignore[operator]
                raise ConfigError(f"GAM: {name} must be 0 or more, got {value!r}.")
        check_count(self, "hidden")
        if self.discriminator is not None and not callable(self.discriminator):
            raise ConfigError(
                f"GAM: discriminator is called with a tap's shape and returns a module; got {self.discriminator!r}.\n"
                "Pass the function or class that builds it, or leave it out for two layers of hidden= features."
            )
        if self.source is None:
            return
        if not isinstance(self.source, nn.Module):
            raise ConfigError(
                f"GAM: source must be a network (torch.nn.Module), got {self.source!r}.\n"
                "Pass the trained network itself, or leave source= out to take a copy of the model as it is."
            )
        learning = [name for name, p in self.source.named_parameters() if p.requires_grad]
        if learning:
            raise ConfigError(
                f"GAM: the source network requires gradients ({learning[0]!r} and {len(learning) - 1} more).\n"
                "It stays as it is while the target network is trained; this one looks like a network in training.\n"
                "Call source.requires_grad_(False), or leave source= out to take a copy of the model as it is."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out networks and functions: a copy of the model carries the modules made from them."""
        return {**self.__dict__, "source": None, "discriminator": None}

    def place(self, backbone: Backbone, make: Make) -> list[Placement]:
        """Put a tap on each layer, and check the taps against the source network's."""
        if self.layers is None:
            raise _no_layers(backbone, self.task)
        layers = self.layers
        sites = _sites(backbone, layers, "target")
        game = make(Game.KEY, Game, Rules.of(self))
        if self.weights is not None and len(self.weights) != len(sites):
            raise ConfigError(
                f"GAM: {len(self.weights)} weights were given for {len(sites)} taps: {', '.join(sites)}.\n"
                "Pass one for each tap, in the order of layers."
            )
        inner = 0.1 if self.task == "classification" else 1.0
        weights = self.weights or (*[inner] * (len(sites) - 1), 1.0)
        values = {key: _value(site, "target") for key, site in sites.items()}
        if self.source is not None:
            source = Backbone.of(self.source, backbone.input_size)
            _check_alike(values, _sites(source, layers, "source"))
            if self.drift:
                paired_weights(self.source, backbone.model)
        game.weights = dict(zip(sites, weights, strict=True))
        game.input_size = backbone.input_size
        for key, site in sites.items():
            with suppress(TraceError, StructureError):  # a network that cannot be followed passes the check
                backbone.check_reaches_output(site, self.output)
            layout = _layout(self, backbone, site, values[key])
            game.layouts[key] = layout
            game.add(key, values[key], layout, backbone)
        if self.matching is None or self.match_in == "discriminators":
            return tap_placements(backbone, make, sites, kind=SwitchedTap)

        def matched(key: str, detach: bool) -> MatchedTap:
            channels = values[key].shape[channel_dim(game.layouts[key])]
            running = self.statistics == "running"
            settings = {"running": running, "momentum": self.momentum, "eps": self.eps}
            return MatchedTap(key, detach, channels=channels, like=values[key], **settings)

        placed = tap_placements(backbone, make, sites, kind=matched)
        for key, site in sites.items():
            layout = game.layouts[key]
            tap = make(key, matched, key, False)
            tap.bind(dim=channel_dim(layout), absorber=backbone.absorber(site, layout))
        return placed

    def on_installed(self, graft: Graft, backbone: Backbone) -> None:
        """Take the copy of the source network, once; `Game.begin` brings it up to date."""
        model = graft.model()
        if model is not None:
            game_of(graft).take_source(model, self.source, graft, () if self.layers is None else self.layers)

    def describe(self, graft: Graft) -> str:
        """Name the taps, how they are matched and what they are told apart by."""
        game = game_of(graft)
        taps = ", ".join(f"{key} ({layout.name})" for key, layout in game.layouts.items())
        alone = " for the discriminators alone" if self.match_in == "discriminators" else ""
        matched = f"gaussian ({self.statistics}){alone}, " if self.matching else ""
        stuck = ", ".join(tap.key for tap in graft.units_of(MatchedTap) if tap.absorber is None)
        kept = f"; cannot be merged, for no layer can take in the matching at {stuck}" if stuck else ""
        return f"taps {taps}; {matched}{self.gan}, drift {self.drift:g}{kept}"

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show the channel means at every tap, before and after matching."""
        return tap_panels(view, graft)

    def merge(self, graft: Graft, model: nn.Module) -> None:
        """Fold the shift and scale of every tap into stock weights."""
        taps = [tap for tap in graft.units_of(MatchedTap) if tap.trained]
        stuck = [tap.key for tap in taps if tap.absorber is None]
        if stuck:
            raise MergeError(
                f"{graft.name!r} scales the channels at {', '.join(map(repr, stuck))}, and no layer can take that in.\n"
                "None with a weight and a bias per channel gives the value, and no linear layer alone reads it.\n"
                "Keep the patched model (torch.save(model, ...)), or adapt with taps on a normalisation, a linear "
                'layer or the pooled features, or with match_in="discriminators".'
            )
        for tap in taps:
            if tap.absorber is not None:
                tap.absorber.absorb(model, *tap.affine())


def _no_layers(backbone: Backbone, task: str) -> ConfigError:
    """Say that there are no taps, and what they may be on this network."""
    sites = [
        site for site in backbone.module_outputs() if site.shape is not None and len(site.shape) in (2, 3, 4)
    ]
    outer = [site.name for site in sites if "." not in site.name]
    chosen = outer[:: -(-len(outer) // 4)] if task == "dense" else _last_two(backbone, sites) or outer[-2:]
    example = f"for example layers={chosen!r}" if chosen else "as layers=[...]"
    return ConfigError(
        f"GAM needs layers: the taps at which the activations of both networks are matched.\n"
        "The authors take the last two layers of a classifier, and four over the depth of a dense predictor.\n"
        f"On this {backbone.name}, {example}; fxgraft.sites(model) lists all."
    )


def _last_two(backbone: Backbone, sites: Sequence[Site]) -> list[str]:
    """Name the last two values whose matching folds into stock weights, each by its shortest name."""
    absorbers: dict[Absorber, str] = {}
    for site in reversed(sites):
        with suppress(SiteError, StructureError, TraceError):
            absorber = backbone.absorber(site, backbone.layout(site))
            if absorber is None:
                continue
            if absorber not in absorbers and len(absorbers) == 2:
                break
            named = absorbers.setdefault(absorber, site.name)
            if site.name.count(".") < named.count("."):
                absorbers[absorber] = site.name
    return list(absorbers.values())[::-1]


def _sites(backbone: Backbone, layers: SiteSpec, network: str) -> dict[str, Site]:
    try:
        return backbone.named_sites(layers)
    except SiteError as error:
        raise SiteError(
            f"GAM: the {network} network has no such tap.\n{error}\nName layers that both networks have."
        ) from error


def _value(site: Site, network: str) -> Tensor:
    """Return the fake tensor at a site, batch of 2."""
    value = site.value
    if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.ndim <= 5:
        kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SiteError(
            f"GAM needs vectors, tokens or maps at {site.name!r}, and the {network} network has {kind} there.\n"
            "A discriminator works on the channels of a floating-point tensor with the batch first.\n"
            "fxgraft.sites(model) shows what every layer returns."
        )
    return value


def _check_alike(values: Mapping[str, Tensor], sites: Mapping[str, Site]) -> None:
    """Raise unless the taps of the source network have the shapes of the target's."""
    if len(sites) != len(values):
        raise ConfigError(
            f"GAM: layers stands for {len(values)} taps in the target network ({', '.join(values)}) and for "
            f"{len(sites)} in the source network ({', '.join(sites)}).\nName the taps one by one."
        )
    for (key, value), (name, site) in zip(values.items(), sites.items(), strict=True):
        other = _value(site, "source")
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
