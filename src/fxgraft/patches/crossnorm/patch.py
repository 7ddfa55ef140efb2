"""CrossNorm: the patch and the unit that exchanges styles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fxgraft.extend import (
    Arguments,
    Backbone,
    BlockPatch,
    ConfigError,
    Graft,
    Layout,
    Make,
    PassView,
    Picture,
    Placement,
    Site,
    SiteError,
    SiteSpec,
    StructureError,
    Unit,
    View,
    binary_labels,
    check_count,
    check_positive,
    check_share,
    check_soft_labels,
    draws,
    is_count,
    register,
    take_logits,
)
from fxgraft.functional.divergence import jensen_shannon
from fxgraft.patches.crossnorm import tensors as core
from fxgraft.patches.crossnorm.picture import style_panels
from fxgraft.patches.crossnorm.presets import PRESETS


@register("crossnorm")
@dataclass(frozen=True, kw_only=True)
class CrossNorm(BlockPatch):
    """CrossNorm: exchange the channel statistics of maps within the batch.

    Tang, Gao, Zhu, Zhang, Li, Metaxas: "CrossNorm and SelfNorm for Generalization under Distribution Shifts",
    ICCV 2021. In training, maps inside the residual blocks exchange their channel means and deviations with those
    of other images (or of other channels): styles are mixed, labels stay. Each pass, with probability ``p``, exactly
    ``active`` of all units are on; the others cost nothing. Evaluation is the bare model's.

    With ``consistency=True`` the model's own pass stays clean. With probability ``p``, one draw per call of
    `fxgraft.loss`, the batch runs twice more with CrossNorm on, and the loss is CE(clean) + weight · JS(clean, first,
    second); otherwise it is the criterion on the clean pass and nothing else. Processes that share one model by
    FSDP have to draw alike: seed them alike, or compare in every step (``p=1``). The model that is patched has to be
    the one that gives the predictions.

    A batch of one image (a micro-batch, or a last batch) has no other to exchange with, except with its own channels:
    nothing happens in such a pass, of which a warning tells once.

    Under torch.compile which units are on is data, so that nothing is compiled again; then every unit computes,
    whether on or off, and a step costs what all units on cost. Where it goes: the options of `BlockPatch`.

    Args:
        p: probability that a training pass has any unit on; with consistency, that a step compares.
        active: how many units are then on (1 on ImageNet, 2 on CIFAR in the paper); None for all.
        mode: whose statistics a map takes: those of another image ("two-instance", the released code), of
            other channels of its own ("one-instance"), or of other channels of another image ("both").
        crop: take the statistics from a box of the partner's map ("style"), restyle only a box of the map
            ("content"), "both", or "neither".
        beta: the box's share of the map is drawn from Beta(beta, beta).
        threshold: smallest share of the map that a box may have; on maps too small for it, all of the map.
        lam: share of the original map that is blended in, in [0, 1].
        skip_last: leave out the unit of the network's last block. Behind it comes global pooling, which reads the
            mean of each channel: where that unit is on, the pooled features are the partner's alone and the image's
            own label is trained on them.
        detach: take the partner's statistics as constants instead of letting gradients flow through them.
        consistency: leave the pass itself clean, and add to the loss how far two more passes with CrossNorm on are from
            it.
        consistency_weight: factor of the divergence.
        views: how many views of the same images a batch holds, one after another, the clean ones first. The consistency
            compares those alone: they are what runs again, and `fxgraft.loss` may be given their predictions. With
            AugMix: 3; see `fxgraft.functional.jensen_shannon` for the term that compares the views.
        output: which entry of a structured output holds the logits (a key, an attribute or a position).
        probability: what the divergence compares: the "softmax" over classes, or the "sigmoid" of each logit, for
            several labels per image, averaged over the labels. By default the softmax, and the sigmoid of one logit.
            A number to predict has no probability: labels outside [0, 1] of such logits are refused.

    Raises:
        ConfigError: an option outside its range, or more active units than there are.
        StructureError: the model has no block with the position; says what it has.
        SiteError: no such layer, one without maps or tokens, or a crop of what isn't a map.
    """

    title = "CrossNorm"
    paper = (
        "Tang, Gao, Zhu, Zhang, Li, Metaxas: CrossNorm and SelfNorm for Generalization under Distribution "
        "Shifts. ICCV 2021"
    )
    url = "https://arxiv.org/abs/2102.02811"
    cost = (
        "training: one pass over a map for its statistics and one to restyle it, for each unit that is on, and two "
        "more passes of the model in steps that compare, with consistency; evaluation: none"
    )
    idea = (
        "Images of a batch exchange the channel means and deviations of their maps in training: the style "
        "changes, content and label stay."
    )
    equation = (
        "y = σ' · (x − μ) / σ + μ', with mean μ and deviation σ of each channel of a map, and μ', σ' of "
        "another image's"
    )
    works_with = (
        "residual blocks, dense blocks, plain stacks and vision transformers; SelfNorm, which acts behind "
        "it; all other methods. Not inside activation checkpointing"
    )
    hurts = (
        "where colour or texture tells the classes apart; batches of one, which have nobody to exchange "
        "with. The unit of the last block replaces what global pooling reads: skip_last=True leaves it "
        "out"
    )
    smallest_map = 2
    measures = MappingProxyType(
        {
            "active": "how many units were on",
            "consistency": "the divergence between the passes, weighted, in steps that compare",
        }
    )
    train_only = True
    presets = PRESETS
    order = ("style", 0)  # at one site before SelfNorm, in the authors' order

    p: float = 0.5
    active: int | None = 1
    mode: Literal["two-instance", "one-instance", "both"] = "two-instance"
    crop: Literal["neither", "content", "style", "both"] = "neither"
    beta: float = 1.0
    threshold: float = 0.1
    lam: float = 0.0
    skip_last: bool = False
    detach: bool = False
    consistency: bool = False
    consistency_weight: float = 10.0
    views: int = 1
    output: str | int | None = None
    probability: Literal["softmax", "sigmoid"] | None = None

    def __post_init__(self, layer: SiteSpec | None) -> None:
        super().__post_init__(layer)
        check_share(self, "p", "lam", "threshold")
        check_positive(self, "beta", "consistency_weight")
        check_count(self, "views")
        if self.active is not None and not is_count(self.active):
            raise ConfigError(
                f"CrossNorm: active must be a number of units, or None for all; got {self.active!r}."
            )

    def place(self, backbone: Backbone, make: Make) -> Iterator[list[Placement]]:
        """Put one unit in every block, for training alone."""
        if self.replays():
            backbone.check_logits(self.output, returned=True)
        sites = backbone.positions(self.position, self.layers)
        if self.skip_last:
            last = (sites if self.layers is None else backbone.positions(self.position))[-1].name
            sites = [site for site in sites if site.name != last]
            if not sites:
                raise ConfigError(
                    f"CrossNorm: skip_last leaves out {last!r}, and there is no other unit.\n"
                    "Pass skip_last=False, or layers= with earlier blocks."
                )
        self._check_active(sites)
        for index, site in enumerate(sites):
            layout = backbone.layout(site, self.layout)
            if self.crop != "neither" and not layout.is_map:
                raise SiteError(
                    f"CrossNorm: crop={self.crop!r} needs maps, and {site.name!r} holds {layout}.\n"
                    'A box needs rows and columns.\nPass crop="neither", or layers= with maps.'
                )
            unit = make(site.name, CrossNormUnit, self)
            unit.bind(layout=layout, index=index, count=len(sites))
            yield from self.put(backbone, make, site, unit, evaluation=False)

    def _check_active(self, sites: Sequence[Site]) -> None:
        if self.active is not None and self.active > len(sites):
            names = ", ".join(site.name for site in sites[:8]) + (", …" if len(sites) > 8 else "")
            raise ConfigError(
                f"CrossNorm: active={self.active} units cannot be on, since there are {len(sites)}: {names}.\n"
                "Pass a smaller number, or active=None for all of them."
            )

    def replays(self) -> str:
        """Say that consistency runs the batch again."""
        compares = self.consistency and self.p > 0
        return "runs the batch again to compare predictions (not with consistency=False)" if compares else ""

    def contributes_loss(self) -> bool:
        """Say that consistency is a term of the loss."""
        return bool(self.replays())

    def losses(
        self, graft: Graft, out: Any, target: Any, criterion: Callable[..., Tensor]
    ) -> Mapping[str, Tensor]:
        """In a step that compares, run the batch twice more with CrossNorm on and weigh the divergence."""
        if not self.replays():
            return {}
        again, model = graft.arguments(out), graft.model()
        if again is None or model is None:  # the pass may have been made in evaluation
            return {}
        if not model.training:
            raise ConfigError(
                f"{graft.name!r} runs the batch of this loss again, and the model was put into evaluation mode since "
                "its pass.\nThere it does nothing, and the predictions would be compared with themselves.\n"
                "Call fxgraft.loss first, then model.eval()."
            )
        logits = take_logits(out, [self.output])
        if not logits.ndim:
            raise StructureError(
                f"{graft.name!r} compares predictions, and was given one number in their place.\n"
                "Pass what the model returned: fxgraft.extra_loss(model, out, y)."
            )
        clean = _rows(logits)
        again, clean = self._clean(graft, again, clean)
        self._check_labels(graft, clean, target)
        on = self.p == 1 or draws.coin(self.p, clean.device)
        if on is False:
            return {}

        def compared() -> Tensor:
            with graft.override(forced=True):
                passes = [again.repeat(model, target) for _ in range(2)]
            others = [_rows(take_logits(out, [self.output])) for out in passes]
            if others[0].shape != clean.shape:
                raise ConfigError(
                    f"{graft.name!r} compares predictions, and the model that it is on gives {tuple(others[0].shape)} "
                    f"where the loss is for {tuple(clean.shape)}.\nIt is on a part whose output is not the "
                    "predictions.\nPatch the whole model instead of the part; layers= takes names inside of it."
                )
            return self.consistency_weight * jensen_shannon(clean, *others, probability=self.probability)

        divergence = draws.choose(on, compared, clean.new_zeros(()))
        graft.measure("consistency", divergence)
        return {"consistency": divergence}

    def _check_labels(self, graft: Graft, logits: Tensor, target: Any) -> None:
        """Raise unless the labels are classes or binary answers: a number to predict has no probability to compare."""
        one = self.probability == "sigmoid" or (self.probability is None and logits.shape[1] == 1)
        if one and isinstance(target, Tensor):
            binary_labels(graft.name, target[: logits.shape[0]], logits.shape)
        elif self.probability is None and isinstance(target, Tensor) and target.ndim == logits.ndim:
            check_soft_labels(graft.name, target)

    def _clean(self, graft: Graft, again: Arguments, logits: Tensor) -> tuple[Arguments, Tensor]:
        """Return the arguments of a pass and the predictions for the clean images alone."""
        first = next(iter((*again.args, *again.kwargs.values())), None)
        if not isinstance(first, Tensor):
            return again, logits
        size = first.shape[0]
        rows = size // self.views
        if size % self.views or logits.shape[0] not in (size, rows):
            views = f", {self.views} views of each" if self.views > 1 else ""
            raise ConfigError(
                f"{graft.name!r} was asked for the loss of {logits.shape[0]} predictions, but the model's last "
                f"training pass had {size} images{views}.\nIt runs that batch again to compare.\n"
                "Call fxgraft.loss right after the pass it is for."
            )
        return (again, logits) if self.views == 1 else (again.first(rows, size), logits[:rows])

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show two images in each other's style."""
        return style_panels(view, graft.units_of(CrossNormUnit), self._picture_box)

    def _picture_box(self, x: Tensor, what: str) -> core.Box | None:
        return draw_box(self, x) if self.crop in (what, "both") else None

    def describe(self, graft: Graft) -> str:
        """Say how many units there are, where, and how often they act."""
        active = "all" if self.active is None else str(self.active)
        when = f"{'in two more passes ' if self.consistency else ''}with probability {self.p:g}"
        return f"{len(graft.units_of(CrossNormUnit))} units ({self.placed_at(graft)}), {active} on {when}"


def _rows(logits: Tensor) -> Tensor:
    """Return logits as (B, K, ...): one logit that was squeezed is (B,)."""
    return logits.unsqueeze(1) if logits.ndim == 1 else logits


class CrossNormUnit(Unit):
    """Restyles the value at one site. Holds no parameters and no buffers."""

    layout: Layout
    index: int
    count: int

    def __init__(self, config: CrossNorm) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, shaped as it is, restyled if the unit is on in this pass."""
        config = self.config
        alone = x.shape[0] == 1 and config.mode == "two-instance"
        run = self.current
        if run is None:
            self.refuse_recomputation()
            return x
        if config.lam == 1:
            return x
        chance = self._chance(run)
        if chance and alone:
            run.tell(
                "small batch",
                "exchanges nothing in a batch of one: there is no other image to take statistics of.\n"
                'Use larger (micro-)batches, or mode="one-instance", which takes those of other channels.',
            )
        if alone or not chance:
            run.measure("active", 0)
            return x
        run.check_images_alone(
            "Statistics of channels would count positions that are padding.", all_positions=True
        )
        chosen = run.shared("on", lambda: self._draw(run, chance, x.device))
        on = draws.among(chosen, self.index, x.device)
        return draws.choose(on, lambda: self.layout.restore(x, self._restyled(self.layout.canonical(x))), x)

    def _chance(self, run: PassView) -> float:
        """Return the probability that units are on in this pass; with consistency, 0 but for the passes of the loss."""
        if run.asked("forced"):
            return 1.0
        return 0.0 if self.config.consistency else self.config.p

    def _draw(self, run: PassView, chance: float, device: torch.device) -> frozenset[int] | Tensor:
        """Draw the units of a pass; the first unit to ask draws for all of the graft."""
        active = self.count if self.config.active is None else self.config.active
        chosen = draws.subset(self.count, active, chance, device)
        run.measure("active", chosen.sum() if isinstance(chosen, Tensor) else len(chosen))
        return chosen

    def _restyled(self, x: Tensor) -> Tensor:
        config = self.config
        permutation = channels = None
        if config.mode != "one-instance" and x.shape[0] > 1:
            permutation = torch.randperm(x.shape[0], device=x.device)
        if config.mode != "two-instance":
            channels = torch.randperm(x.shape[1], device=x.device)
        return core.crossnorm(
            x,
            permutation,
            channels,
            lam=config.lam,
            content_box=draw_box(config, x) if config.crop in ("content", "both") else None,
            style_box=draw_box(config, x) if config.crop in ("style", "both") else None,
            detach=config.detach,
        )


def draw_box(config: CrossNorm, x: Tensor) -> core.Box:
    """Draw a box of a map (B, C, H, W), or of a clip or volume (B, C, T, H, W)."""
    sizes, beta, threshold = x.shape[2:], config.beta, config.threshold
    return draws.numbers(
        lambda device: core.draw_box(*sizes, beta=beta, threshold=threshold, device=device), x.device
    )
