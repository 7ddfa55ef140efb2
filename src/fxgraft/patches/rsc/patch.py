"""Representation Self-Challenging: the patch and the unit that mutes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    Backbone,
    BypassError,
    Capture,
    ConfigError,
    FxgraftWarning,
    Graft,
    LayeredPatch,
    Layout,
    LayoutName,
    Make,
    Picture,
    Placement,
    Rest,
    Site,
    SiteSpec,
    Unit,
    View,
    check_count,
    check_share,
    draws,
    grafts_in,
    grafts_on,
    recomputed,
    recording,
    register,
)
from fxgraft.patches.rsc import tensors as core
from fxgraft.patches.rsc.locate import found_sites
from fxgraft.patches.rsc.picture import mute_panels
from fxgraft.patches.rsc.presets import PRESETS
from fxgraft.patches.rsc.probe import Probe


@register("rsc")
@dataclass(frozen=True, kw_only=True)
class RSC(LayeredPatch):
    """Representation Self-Challenging: mute what the true class leans on most, train on the rest.

    Huang, Wang, Xing, Huang: "Self-Challenging Improves Cross-Domain Generalization", ECCV 2020.

    In training, the part of a feature map that the true class's logit leans on most is muted, for the samples
    that suffer most from it; the loss is taken on what is left. Where the part is follows from one gradient
    through the rest of the network, evaluated without side effects. Evaluation is the bare model's.

    It goes to the last map before global pooling, whatever gives it (ResNet's ``layer4``, EfficientNet's ``bn2``):
    between that map and the logits there is then no BatchNorm, whose statistics zeros would change in training
    alone, and where one linear layer is all that follows, what RSC needs to know of the network has a closed form.
    Elsewhere the rest of the network runs twice more on the map's batch, once with a gradient to the map. Small
    maps lose more than a third, which is rounded up: of 2×2 positions the spatial scope mutes two.

    The network behind the site is looked at as it predicts: in evaluation, on images alone, without the labels that a
    margin head takes. Calls that give the model more, such as a mask of padded patches, are refused.

    A single logit z is a question of yes and no: the label 1 has the score z/2 and the probability sigmoid(z), the
    label 0 has −z/2 and 1 − sigmoid(z). Labels are integers or floating point, (B,) or (B, 1). With several labels
    per image every logit is such a question; the scores add up, and the probability is the mean over the labels. Labels
    outside [0, 1], as of a regression or of ordered levels, are refused where reading them waits for no device.

    Args:
        layers: where, by name, glob or stage number (-1 is the last stage whose positions reach the logits); several
            give one unit each. Default: the last map before global pooling. Where the head averages no map of several
            positions, or reads the class token alone, the last stage or block whose positions still reach the logits.
        layer: the same, for one.
        scope: what is muted in one batch: positions ("spatial"), channels ("channel"), or one of the two
            drawn for each batch with probability 1/2 ("both", the default).
        strategy: what is muted: the top share by the gradient of the label's logit ("top_gradient", the method), a
            random share of all within the top half by it ("random_top_half", the authors' ImageNet code, which
            rounds the share down), the top share by activation ("top_activation") or a "random" one; the latter two
            are the paper's ablation.
        saliency: how positions are ranked by gradient: "grad_cam" as in the authors' code, or the mean
            "gradient" as in the paper's text. Channels are ranked by their mean gradient in both.
        spatial_drop: share of positions to mute, in [0, 1]; rounded up to a count.
        channel_drop: share of channels to mute, in [0, 1]; 1/3.2 in the authors' code, 1/3 in the paper.
        vector_drop: share of features to mute where the site is a vector (B, D), as DomainBed does.
        batch_share: share of the batch that stays muted, those whose label loses most probability. The count is
            rounded, half to even: a third of a batch of one isn't a sample, of which a warning tells once.
        batch_schedule: "constant", or one in place of batch_share: "authors", 0.3 + 0.2·⌊epoch/10⌋ capped at 1, or
            "imagenet", 1/6, 1/5.5, 1/5, 1/4.5 and 1/4 from epochs 0, 19, 39, 59 and 79.
        epochs: length of the training in epochs, which a schedule needs to turn progress into epochs.
        start: share of training before which nothing is muted; read from `fxgraft.set_progress`.
        layout: meaning of the dimensions at the site, one of NCHW, NHWC, NLC, NCL, NC, NCDHW and NDHWC; found
            if left out.
        output: which entry of a structured output holds the logits (a key, an attribute or a position).
        ignore_index: class index of pixels to leave out, for dense predictions (B, K, H, W).
        probability: how logits become probabilities: the "softmax" over classes, or the "sigmoid" of each logit, for
            several labels per image (B, K) of 0 and 1. By default the softmax, and the sigmoid of a single logit.

    Raises:
        ConfigError: an option outside its range.
        SiteError: no such layer, or one whose value isn't a feature map.
        StructureError: the model, or the part of one, ends in features and not in logits.
    """

    title = "Representation Self-Challenging"
    paper = "Huang, Wang, Xing, Huang: Self-Challenging Improves Cross-Domain Generalization. ECCV 2020"
    url = "https://arxiv.org/abs/2007.02454"
    where = "the output of a layer, by default the last map before global pooling"
    cost = (
        "training: the layers after the site run twice more, nothing after pooling + linear; evaluation: none"
    )
    idea = (
        "The part of a feature map that the true class leans on most is muted in training, so that the "
        "network has to find other evidence for it."
    )
    equation = (
        "g = ∂ logit_y / ∂ z; mask = 0 where g (averaged over channels or over positions) is in its top "
        "share, else 1; loss on rest(z · mask) for the share of the batch that loses most probability, on "
        "rest(z) for the others"
    )
    works_with = (
        "maps, tokens and vectors of any backbone, all other methods, hard and soft labels, dense labels; "
        "every training pass needs its labels"
    )
    hurts = (
        "maps smaller than 3×3, of which it mutes more than a third (of 2×2 positions two); sites behind which a "
        "class token alone is read, where there is nothing to mute"
    )
    smallest_map = 3
    measures = MappingProxyType(
        {
            "muted": "share of the positions, channels or features that the mask of a sample mutes",
            "samples": "share of the batch that stays muted",
        }
    )
    train_only = True
    needs_labels = True
    presets = PRESETS

    layers: SiteSpec | None = None
    scope: Literal["both", "spatial", "channel"] = "both"
    strategy: core.Strategy = "top_gradient"
    saliency: core.Saliency = "grad_cam"
    spatial_drop: float = 1 / 3
    channel_drop: float = 1 / 3.2
    vector_drop: float = 1 / 3
    batch_share: float = 1 / 3
    batch_schedule: Literal["constant", "authors", "imagenet"] = "constant"
    epochs: int | None = None
    start: float = 0.0
    layout: LayoutName | None = None
    output: str | int | None = None
    ignore_index: int = -100
    probability: Literal["softmax", "sigmoid"] | None = None

    def __post_init__(self, layer: SiteSpec | None) -> None:
        super().__post_init__(layer)
        check_share(self, "spatial_drop", "channel_drop", "vector_drop", "batch_share", "start")
        if self.epochs is None and self.batch_schedule != "constant":
            raise ConfigError(
                f'RSC: batch_schedule="{self.batch_schedule}" counts epochs; epochs must be their number, got None.\n'
                "Pass the number of epochs that you train, as epochs=30."
            )
        if self.epochs is not None:
            check_count(self, "epochs")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ConfigError(
                f"RSC: ignore_index must be a whole number, got {self.ignore_index!r}.\n"
                "Leave it out for that of torch's losses, -100."
            )

    def schedules(self) -> tuple[str, ...]:
        """Name ``start``, and the schedule of the batch share."""
        follows = {"start": self.start > 0, "batch_schedule": self.batch_schedule != "constant"}
        return tuple(option for option, on in follows.items() if on)

    def place(self, backbone: Backbone, make: Make) -> Iterator[list[Placement]]:
        """Put one unit on each site, and record what else the rest of the network needs."""
        backbone.check_logits(self.output)
        for site, layout, rest in found_sites(backbone, self.layers, self.output, self.layout):
            unit = make(site.name, RSCUnit, self)
            unit.bind(site=site, layout=layout, rest=rest, bare=rest)
            for capture in rest.captured:
                yield backbone.place(capture, make(capture.name, Capture, capture.name), evaluation=False)
            yield backbone.place(site, unit, evaluation=False)
            if self.saliency == "gradient" and self.scope != "channel" and rest.tail is not None:
                warnings.warn(
                    f"RSC: behind {site.name!r} come global average pooling and a linear layer, so the gradient "
                    'is the same at every position and saliency="gradient" mutes none of them. '
                    'Use saliency="grad_cam", an earlier layer, or scope="channel".',
                    FxgraftWarning,
                    stacklevel=2,
                )

    def on_installed(self, graft: Graft, backbone: Backbone) -> None:
        """Trace the rest again with the grafts on, where some of them act in it."""
        names = [known.name for known in grafts_on(backbone.model)]
        behind = names[: names.index(graft.name)]
        for unit in graft.units_of(RSCUnit):
            unit.bind(rest=backbone.rest(unit.site, self.output, behind, unit.bare))

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show what a training pass mutes in an image."""
        return mute_panels(view, graft.units_of(RSCUnit), self)

    def describe(self, graft: Graft) -> str:
        """Name the sites and how the probe is computed."""
        parts = []
        for unit in graft.units_of(RSCUnit):
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

    site: Site
    layout: Layout
    rest: Rest
    bare: Rest
    records: list[RSCRecord] | None = None

    def __init__(self, config: RSC) -> None:
        super().__init__()
        self.config = config
        self.set_progress(0.0)

    def set_progress(self, fraction: float) -> None:
        """Switch muting on at ``start`` and follow the schedule of the batch share."""
        config = self.config
        self.batch_share = config.batch_share
        schedule = {"authors": core.batch_share_schedule, "imagenet": core.imagenet_share_schedule}
        if config.batch_schedule != "constant" and config.epochs:
            # A fraction of k/epochs may come out just below k; it means that epoch k begins.
            self.batch_share = schedule[config.batch_schedule](int(fraction * config.epochs + 1e-9))
        self.active = fraction >= config.start and self.batch_share > 0

    def stale(self, model: nn.Module) -> bool:
        """Say whether a module or setting after the site has changed."""
        return self.rest.stale(model)

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z``, shaped as it is, with the muted entries at zero."""
        vector = self.layout.name == "NC"
        if not self.active or not any(self._drops(vector)):
            if self.current is not None:
                self._measure(0.0, 0.0)
            return z
        self.run.check_images_alone(
            "What comes after its site would be looked at without them, and positions that are padding be muted and "
            "counted as others are."
        )
        target = self.run.labels(z.shape[0])
        scope = "vector" if vector else self._draw_scope(z.device)
        return self.layout.multiply(z, self._muting(z.detach(), target, scope))

    @torch.no_grad()
    def _muting(self, z: Tensor, target: Tensor, scope: str) -> Tensor:
        """Return 0 where an entry is muted, else 1: a constant of the second pass, so no mask joins the graph."""
        probe = Probe(self, z, target)
        if probe.layer is None and recomputed() and self.rest.averages(self.run.model):
            raise BypassError(
                f"{self.graft!r} looks ahead through BatchNorm, whose running statistics moved in the pass that "
                "activation checkpointing runs again: it would mute something else, and the gradients be wrong.\n"
                "Checkpoint parts of the model (timm: model.set_grad_checkpointing()), not the call of it, or choose "
                "a site that only pooling and a linear layer follow."
            )
        mask = probe.mask(scope)
        selected = self._select(probe, mask, scope == "vector")
        self._measure(mask == 0, selected)
        if self.records is not None:
            self.records.append(RSCRecord(self.site.name, scope, mask.cpu(), selected.cpu()))
        return core.apply_selection(mask, selected)

    def _measure(self, muted: Tensor | float, selected: Tensor | float) -> None:
        self.run.measure("muted", muted)
        self.run.measure("samples", selected)

    def _drops(self, vector: bool) -> tuple[float, ...]:
        """List the shares that a pass may mute."""
        config = self.config
        if vector:
            return (config.vector_drop,)
        shares = {"spatial": config.spatial_drop, "channel": config.channel_drop}
        return tuple(shares.values()) if config.scope == "both" else (shares[config.scope],)

    def _draw_scope(self, device: torch.device) -> str:
        """Draw the scope of this batch; where decisions are data, it is chosen among the masks."""
        if self.config.scope != "both":
            return self.config.scope
        if draws.as_data():
            return "either"
        return "spatial" if draws.coin(0.5, device) else "channel"

    def _select(self, probe: Probe, mask: Tensor, vector: bool) -> Tensor:
        batch = mask.shape[0]
        if self.batch_share >= 1:
            return mask.new_ones(batch, dtype=torch.bool)
        before, after = probe.probabilities(mask)
        if vector:
            return core.vector_select(before, after, self.batch_share)
        count = core.batch_count(batch, self.batch_share)
        if batch and not count:
            self.run.tell(
                "small batch",
                f"mutes nothing in a batch of {batch}: a share of {self.batch_share:.3g} of it rounds to no sample.\n"
                "Use larger (micro-)batches, or batch_share=1, which mutes in every sample.",
            )
        return core.select_samples(before, after, count)


@contextmanager
def record(model: nn.Module) -> Iterator[list[RSCRecord]]:
    """Collect what RSC mutes in the training passes of the block, one `RSCRecord` per site and pass.

    Args:
        model: a model with at least one RSC patch.

    Yields:
        The list that fills up.
    """
    with recording(
        grafts_in(model), RSCUnit, 'There is no RSC on this model.\nCall fxgraft.patch(model, "rsc") first.'
    ) as records:
        yield records
