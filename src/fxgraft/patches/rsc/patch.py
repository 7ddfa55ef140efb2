"""Representation Self-Challenging.

Huang, Wang, Xing, Huang: "Self-Challenging Improves Cross-Domain Generalization", ECCV 2020.

In training, the part of a feature map that the true class's logit leans on most is muted, for the samples
that suffer most from it; the loss is taken on what is left. Where the part is follows from one gradient
through the rest of the network, evaluated without side effects. Evaluation is the bare model's.

Put it on the last stage (``layer=-1``); where a transformer's head reads the class token alone, that is the
last block whose positions still reach the logits. The rest of the network runs twice more on the map's batch, once with
a gradient to the map; behind pooling and one linear layer both are closed forms. Small maps lose too
much: below about 3×3 positions the spatial scope mutes most of what there is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fxgraft.errors import ConfigError, FxgraftWarning, SiteError
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.labels import check_label_range
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.layout import NAMES, Layout, layout_of
from fxgraft.graph.structure.places import blocks_before, site_edit
from fxgraft.graph.structure.rest import Rest, captures, rest_of_network
from fxgraft.graph.structure.sites import Site, Words, resolve
from fxgraft.graph.structure.tail import tail_layer
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.patches.base import Make, Patch, recording
from fxgraft.patches.options import check_choices, check_share
from fxgraft.patches.registry import register
from fxgraft.patches.rsc import tensors as core


@register("rsc")
@dataclass(frozen=True, kw_only=True)
class RSC(Patch):
    """Representation Self-Challenging: mute what the true class leans on most, train on the rest.

    Args:
        layer: where, by name, glob or stage number; several give one unit each. Default: the last stage.
        scope: what is muted in one batch: positions ("spatial"), channels ("channel"), or one of the two
            drawn for each batch with probability 1/2 ("both", the default).
        strategy: what ranks them: the gradient of the label's logit ("top_gradient", the method), the
            activation ("top_activation") or chance ("random"); the latter two are the paper's ablation.
        saliency: how positions are ranked by gradient: "grad_cam" as in the authors' code, or the mean
            "gradient" as in the paper's text. Channels are ranked by their mean gradient in both.
        spatial_drop: share of positions to mute, in [0, 1]; rounded up to a count.
        channel_drop: share of channels to mute, in [0, 1]; 1/3.2 in the authors' code, 1/3 in the paper.
        vector_drop: share of features to mute where the site is a vector (B, D), as DomainBed does.
        batch_share: share of the batch that stays muted, those whose label loses most probability.
        batch_schedule: "constant", or "authors": 0.3 + 0.2·⌊epoch/10⌋ capped at 1 in place of batch_share.
        epochs: length of the training in epochs, which "authors" needs to turn progress into epochs.
        start: share of training before which nothing is muted; read from `fxgraft.set_progress`.
        layout: meaning of the dimensions at the site, one of NCHW, NHWC, NLC, NCL, NC; found if left out.
        output: which entry of a structured output holds the logits (a key, an attribute or a position).
        ignore_index: class index of pixels to leave out, for dense predictions (B, K, H, W).

    Raises:
        ConfigError: an option outside its range.
        SiteError: no such layer, or one whose value is no feature map.
    """

    title = "Representation Self-Challenging"
    paper = "Huang, Wang, Xing, Huang: Self-Challenging Improves Cross-Domain Generalization. ECCV 2020"
    url = "https://arxiv.org/abs/2007.02454"
    where = "the output of a layer, by default the last stage"
    cost = (
        "training: the layers after the site run twice more, nothing after pooling + linear; evaluation: none"
    )
    train_only = True
    needs_labels = True

    layer: Words = -1
    scope: Literal["both", "spatial", "channel"] = "both"
    strategy: core.Strategy = "top_gradient"
    saliency: core.Saliency = "grad_cam"
    spatial_drop: float = 1 / 3
    channel_drop: float = 1 / 3.2
    vector_drop: float = 1 / 3
    batch_share: float = 1 / 3
    batch_schedule: Literal["constant", "authors"] = "constant"
    epochs: int | None = None
    start: float = 0.0
    layout: Literal["NCHW", "NHWC", "NLC", "NCL", "NC"] | None = None
    output: str | int | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if isinstance(self.layer, list):  # what a recipe gives back, and what no one can change afterwards
            object.__setattr__(self, "layer", tuple(self.layer))
        check_choices(self)
        check_share(
            "RSC",
            spatial_drop=self.spatial_drop,
            channel_drop=self.channel_drop,
            vector_drop=self.vector_drop,
            batch_share=self.batch_share,
            start=self.start,
        )
        whole = isinstance(self.epochs, int) and not isinstance(self.epochs, bool)
        if (self.epochs is not None or self.batch_schedule == "authors") and not (whole and self.epochs > 0):  # type: ignore[operator]
            raise ConfigError(
                f'RSC: batch_schedule="authors" counts epochs; epochs must be their number, got {self.epochs!r}.'
            )

    def place(self, anatomy: Anatomy, make: Make) -> Sequence[Placement]:
        """Put one unit on each site, and record what the rest of the network needs besides."""
        placements = []
        for site, layout, rest in self._sites(anatomy):
            unit = cast(RSCUnit, make(site.name, lambda: RSCUnit(self)))
            unit.site, unit.layout, unit.rest = site, layout, rest
            owner, edit = site_edit(anatomy, site)
            for capture_owner, capture_edit, key, capture in captures(rest):
                kept = make(key, lambda capture=capture: capture)
                placements.append(Placement(capture_owner, capture_edit, key, kept, evaluation=False))
            placements.append(Placement(owner, edit, site.name, unit, evaluation=False))
            if self.saliency == "gradient" and self.scope != "channel" and rest.tail is not None:
                warnings.warn(
                    f"RSC: behind {site.name!r} come global average pooling and a linear layer, so the gradient "
                    'is the same at every position and saliency="gradient" mutes none of them. '
                    'Use saliency="grad_cam", an earlier layer, or scope="channel".',
                    FxgraftWarning,
                    stacklevel=2,
                )
        return placements

    def _sites(self, anatomy: Anatomy) -> Iterator[tuple[Site, Layout, Rest]]:
        """Find the sites; a stage number means the last block of the stage whose positions reach the logits."""
        for site in resolve(anatomy, self.layer):
            for choice in [site, *(blocks_before(anatomy, site) if site.numbered else ())]:
                layout = self._layout(anatomy, choice)
                rest = rest_of_network(anatomy, choice, self.output, layout.prefix)
                if rest.positions_matter:
                    yield choice, layout, rest
                    break
            else:
                raise SiteError(
                    f"RSC would mute nothing at {site.name!r}: the logits read its class token alone.\n"
                    "It mutes the positions that a prediction leans on, and this one leans on none of them.\n"
                    "Choose an earlier block, or build the model to pool by average (timm: global_pool='avg')."
                )

    def _layout(self, anatomy: Anatomy, site: Site) -> Layout:
        known = anatomy.observation.output(site.path) if site.path else None
        value = known if site.path else anatomy.values(site.owner).get(site.node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = type(value).__name__ if not isinstance(value, Tensor) else f"a tensor of {value.dtype}"
            raise SiteError(
                f"RSC needs a feature map at {site.name!r}, and {site.op} returns {found}.\n"
                "It mutes positions or channels of a floating-point tensor with the batch first.\n"
                "fxgraft.sites(model) shows what every layer returns."
            )
        if self.layout is None:
            return layout_of(anatomy, value, site.path) or Layout("NCHW")
        dims = {"NC": 2, "NLC": 3, "NCL": 3}.get(self.layout, 4)
        if dims != value.ndim:
            raise SiteError(
                f"RSC was told that {site.name!r} is {self.layout}, but its shape is {tuple(value.shape)}.\n"
                f"Leave layout= out, or pass one of {', '.join(NAMES)} that fits."
            )
        known = layout_of(anatomy, value, site.path, strict=False)
        return known if known is not None and known.name == self.layout else Layout(self.layout)

    def describe(self, graft: Graft) -> str:
        """Name the sites and how the probe is computed."""
        parts = []
        for unit in graft.units.values():
            if isinstance(unit, RSCUnit):
                how = "closed form" if unit.rest.tail else f"{len(unit.rest.children)} modules run again"
                parts.append(f"{unit.site.name or 'output'} ({unit.layout}; {how})")
        return "; ".join(parts)


@dataclass(frozen=True)
class RSCRecord:
    """What one training pass muted at one site.

    Attributes:
        site: its name.
        scope: "spatial", "channel" or "vector".
        mask: 1 keep, 0 mute, before the choice of samples: (B, 1, *positions), (B, C, 1, ...) or (B, D).
        selected: (B,) bool, the samples that stayed muted.
    """

    site: str
    scope: str
    mask: Tensor
    selected: Tensor


class RSCUnit(Unit):
    """Mutes the value at one site. Holds no parameters and no buffers."""

    transient = ("site", "layout", "rest", "records")

    def __init__(self, config: RSC) -> None:
        super().__init__()
        self.config = config
        self.site: Site
        self.layout: Layout
        self.rest: Rest
        self.records: list[RSCRecord] | None = None
        self.set_progress(0.0)

    def set_progress(self, fraction: float) -> None:
        """Switch muting on at ``start`` and follow the schedule of the batch share."""
        config = self.config
        self.batch_share = config.batch_share
        if config.batch_schedule == "authors" and config.epochs:
            # A fraction of k/epochs may come out just below k; it means that epoch k begins.
            self.batch_share = core.batch_share_schedule(int(fraction * config.epochs + 1e-9))
        self.active = fraction >= config.start and self.batch_share > 0

    def installed(self, anatomy: Anatomy) -> None:
        """Trace the rest again with the grafts on, since some of them act in it."""
        self.rest = rest_of_network(anatomy, self.site, self.config.output, self.layout.prefix)

    def stale(self, model: nn.Module) -> bool:
        """Say whether a module or setting after the site has changed."""
        return self.rest.stale(model)

    def __getstate__(self) -> dict[str, Any]:
        """Start without records in a copy."""
        return {**super().__getstate__(), "records": None}

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z``, shaped as it is, with the muted entries at zero."""
        vector = self.layout.name == "NC"
        if not self.active or not any(self._drops(vector)):
            return z
        target = self.context.labels(self.graft, z.shape[0])
        scope = "vector" if vector else self._draw_scope()
        with torch.no_grad():
            # Under no_grad no mask ever joins the graph: muting is a constant of the second pass.
            probe = _Probe(self, z.detach(), target)
            mask = probe.mask(scope)
            selected = self._select(probe, mask, vector)
            final = core.apply_selection(mask, selected)
        if self.records is not None:
            self.records.append(RSCRecord(self.site.name, scope, mask.cpu(), selected.cpu()))
        return self.layout.multiply(z, final)

    def _drops(self, vector: bool) -> tuple[float, ...]:
        """List the shares that a pass may mute."""
        config = self.config
        if vector:
            return (config.vector_drop,)
        shares = {"spatial": config.spatial_drop, "channel": config.channel_drop}
        return tuple(shares.values()) if config.scope == "both" else (shares[config.scope],)

    def _draw_scope(self) -> str:
        """Draw the scope of this batch: on the CPU, which stalls no device, or inside compiled code as data."""
        if self.config.scope != "both":
            return self.config.scope
        if torch.compiler.is_compiling():
            return "either"
        return "spatial" if torch.rand(()).item() < 0.5 else "channel"

    def _select(self, probe: _Probe, mask: Tensor, vector: bool) -> Tensor:
        batch = mask.shape[0]
        if self.batch_share >= 1:
            return mask.new_ones(batch, dtype=torch.bool)
        before, after = probe.probabilities(mask)
        if vector:
            return core.vector_select(before, after, self.batch_share)
        return core.select_samples(before, after, core.batch_count(batch, self.batch_share))


class _Probe:
    """Looks through the rest of the network from one value, and leaves no trace of having looked."""

    def __init__(self, unit: RSCUnit, z: Tensor, target: Tensor) -> None:
        self.unit = unit
        self.z = z
        self.target = target
        self.context = unit.context
        model = unit.context.root
        if model is None:  # labels are only there during a pass, so this needs a hand-made call
            raise SiteError("RSC acts inside a pass of its model.\nCall the model, not its parts.")
        self.model: nn.Module = model
        tail = unit.rest.tail
        self.layer = tail_layer(model, tail) if tail is not None else None
        self.logits: Tensor | None = None

    @property
    def canonical(self) -> Tensor:
        return self.unit.layout.canonical(self.z)

    def mask(self, scope: str) -> Tensor:
        """Mask the canonical map, (B, 1, *positions), (B, C, 1, ...) or, for vectors, (B, D)."""
        config = self.unit.config
        gradient = self._gradient() if config.strategy == "top_gradient" else None
        if scope == "vector":
            ranked = core.saliency(self.z, gradient, "channel", strategy=config.strategy)
            return core.vector_keep_mask(ranked, config.vector_drop).to(self.z.dtype)
        if scope == "either":
            spatial, channel = self._scored("spatial", gradient), self._scored("channel", gradient)
            return torch.where(torch.rand((), device=self.z.device) < 0.5, spatial, channel)
        return self._scored("spatial" if scope == "spatial" else "channel", gradient)

    def _scored(self, scope: core.Scope, gradient: Tensor | None) -> Tensor:
        config = self.unit.config
        z = self.canonical
        if gradient is not None and gradient.ndim == 2 and z.ndim > 2:
            scores = core.linear_tail_saliency(z, gradient, scope, kind=config.saliency)
        else:
            scores = core.saliency(z, gradient, scope, kind=config.saliency, strategy=config.strategy)
        share = config.spatial_drop if scope == "spatial" else config.channel_drop
        return core.feature_mask(scores, z, scope, share)

    def _gradient(self) -> Tensor:
        """Differentiate the label's logit by the map, in canonical form; (B, C) where it is equal everywhere."""
        if self.layer is not None:
            weight = _whole(self.layer.weight)
            self._check(self.layer.out_features)
            return core.linear_tail_gradient(weight, self.target, self.canonical[0, 0].numel())
        if torch.compiler.is_compiling():
            # torch.func.grad compiles into the same graph; torch.autograd.grad would break it.
            gradient, self.logits = torch.func.grad(self._score, has_aux=True)(self.z.clone())
        else:
            # Tensors made in inference mode cannot be differentiated; their copies made outside of it can.
            with torch.inference_mode(False), torch.enable_grad():
                leaf = self.z.clone().requires_grad_()
                if self.target.is_inference():
                    self.target = self.target.clone()
                score, logits = self._score(leaf)
                (gradient,) = torch.autograd.grad(score, leaf)
                self.logits = logits.detach()
        return self.unit.layout.canonical(gradient)

    def _score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # The clone keeps an in-place first layer from writing to the leaf.
        logits = self.unit.rest.evaluate(self.model, z.clone(), self.context)
        self._check(logits.shape[1], logits.ndim - 2)
        flat, target, counts = core.label_rows(logits, self.target, self.unit.config.ignore_index)
        return core.label_score(flat * counts.unsqueeze(1), target), logits

    def probabilities(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the label's probability before and after muting, (B,) each."""
        if self.layer is not None:
            weight = _whole(self.layer.weight)
            bias = None if self.layer.bias is None else _whole(self.layer.bias)
            before = core.linear_tail_logits(self.canonical, None, weight, bias)
            after = core.linear_tail_logits(self.canonical, mask, weight, bias)
            self._check(before.shape[1])
        else:
            rest, layout = self.unit.rest, self.unit.layout
            before = self.logits
            if before is None:
                before = rest.evaluate(self.model, self.z.clone(), self.context)
                self._check(before.shape[1], before.ndim - 2)
            after = rest.evaluate(self.model, layout.multiply(self.z, mask), self.context)
        return self._probability(before), self._probability(after)

    def _probability(self, logits: Tensor) -> Tensor:
        return core.sample_probability(logits, self.target, self.unit.config.ignore_index)

    def _check(self, classes: int, spatial: int = 0) -> None:
        target = self.target
        ignored = self.unit.config.ignore_index
        if target.ndim > 1 and not target.is_floating_point():
            target = target.where(target != ignored, torch.zeros_like(target))
        check_label_range(self.unit.graft, target, classes, spatial)


def _whole(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, gathered where its layer is a shard of its own (FSDP2)."""
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


@contextmanager
def record(model: nn.Module) -> Iterator[list[RSCRecord]]:
    """Collect what RSC mutes in the training passes of the block, one `RSCRecord` per site and pass.

    Args:
        model: a model with at least one RSC patch.

    Yields:
        The list that fills up.
    """
    with recording(
        model, RSCUnit, 'There is no RSC on this model.\nCall fxgraft.patch(model, "rsc") first.'
    ) as records:
        yield records
