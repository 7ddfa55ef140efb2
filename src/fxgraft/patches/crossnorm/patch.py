"""CrossNorm (Tang, Gao, Zhu, Zhang, Li, Metaxas, ICCV 2021).

In training, maps inside the residual blocks exchange their channel means and deviations with those of other
images (or of other channels): styles are mixed, labels stay. Each pass, with probability ``p``, exactly
``active`` of all units are on; the others cost nothing. Evaluation is the bare model's.

With ``consistency=True`` the model's own pass stays clean, and `fxgraft.loss` runs the batch twice more with
CrossNorm on and adds the Jensen-Shannon divergence among the three predictions: three passes a step.

Under torch.compile which units are on is data, so that nothing is compiled again; then every unit computes,
whether on or off, and a step costs what all units on cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fxgraft.errors import ConfigError, SiteError
from fxgraft.functional.divergence import jensen_shannon
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.layout import Layout
from fxgraft.graph.structure.outputs import take_logits
from fxgraft.graph.structure.positions import spot_layout, spots
from fxgraft.graph.structure.sites import Words
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.patches.base import Make, Patch
from fxgraft.patches.crossnorm import tensors as core
from fxgraft.patches.options import check_choices, check_share
from fxgraft.patches.registry import register

ORDER = ("style", 0)
"""At one site CrossNorm runs before SelfNorm, in the authors' order."""


@register("crossnorm")
@dataclass(frozen=True, kw_only=True)
class CrossNorm(Patch):
    """CrossNorm: exchange the channel statistics of maps within the batch.

    Args:
        position: where in its block a unit sits. Residual blocks: "pre" (what the branch sees of the block's
            input), "residual" (the end of the branch), "identity" (the shortcut, after any downsampling) or
            "post" (the sum, before the last activation; the default). Densely connected layers: "conv1_pre",
            "conv1_post", "conv2_post". Plain stacks: behind every "conv", "norm" or "act".
        layers: only these blocks: names of blocks or of modules around them, globs, stage numbers, names from
            ``fxgraft.sites(model, "residual")``; a name without such a block stands for its own output, and
            "input" for the image. Default: every block.
        p: probability that a training pass has any unit on.
        active: how many units are then on (1 on ImageNet, 2 on CIFAR in the paper); None for all.
        mode: whose statistics a map takes: those of another image ("two-instance", the released code), of
            other channels of its own ("one-instance"), or of other channels of another image ("both").
        crop: take the statistics from a box of the partner's map ("style"), restyle only a box of the map
            ("content"), "both", or "neither".
        beta: the box's share of the map is drawn from Beta(beta, beta).
        threshold: smallest share of the map that a box may have; on maps too small for it, all of the map.
        lam: share of the original map that is blended in, in [0, 1].
        detach: take the partner's statistics as constants instead of letting gradients flow through them.
        consistency: train for consistent predictions instead; see the module.
        consistency_weight: factor of the divergence.
        layout: meaning of the dimensions at the sites, one of NCHW, NHWC, NLC, NCL; found if left out.
        output: which entry of a structured output holds the logits (a key, an attribute or a position).

    Raises:
        ConfigError: an option outside its range, or more active units than there are.
        StructureError: the model has no block with the position; says what it has.
        SiteError: no such layer, one without maps or tokens, or a crop of what is no map.
    """

    title = "CrossNorm"
    paper = (
        "Tang, Gao, Zhu, Zhang, Li, Metaxas: CrossNorm and SelfNorm for Generalization under Distribution "
        "Shifts. ICCV 2021"
    )
    url = "https://arxiv.org/abs/2102.02811"
    where = "inside every residual block, by default before its last activation"
    cost = (
        "training: one pass over a map for its statistics and one to restyle it, for each unit that is on, and two "
        "more passes of the model with consistency; evaluation: none"
    )
    train_only = True

    position: Literal[
        "pre", "residual", "identity", "post", "conv1_pre", "conv1_post", "conv2_post", "conv", "norm", "act"
    ] = "post"
    layers: Words | None = None
    p: float = 0.5
    active: int | None = 1
    mode: Literal["two-instance", "one-instance", "both"] = "two-instance"
    crop: Literal["neither", "content", "style", "both"] = "neither"
    beta: float = 1.0
    threshold: float = 0.1
    lam: float = 0.0
    detach: bool = False
    consistency: bool = False
    consistency_weight: float = 10.0
    layout: Literal["NCHW", "NHWC", "NLC", "NCL"] | None = None
    output: str | int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_share("CrossNorm", p=self.p, lam=self.lam, threshold=self.threshold)
        whole = isinstance(self.active, int) and not isinstance(self.active, bool)
        if self.active is not None and not (whole and self.active > 0):
            raise ConfigError(
                f"CrossNorm: active must be a number of units, or None for all; got {self.active!r}."
            )
        for name in ("beta", "consistency_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigError(f"CrossNorm: {name} must be a positive number, got {value!r}.")

    def place(self, anatomy: Anatomy, make: Make) -> Sequence[Placement]:
        """Put one unit in every block, for training alone."""
        found = spots(anatomy, self.position, self.layers)
        if self.active is not None and self.active > len(found):
            names = ", ".join(spot.name for spot in found[:8]) + (", …" if len(found) > 8 else "")
            raise ConfigError(
                f"CrossNorm: active={self.active} units cannot be on, since there are {len(found)}: {names}.\n"
                "Pass a smaller number, or active=None for all of them."
            )
        placements = []
        for index, spot in enumerate(found):
            unit = make(spot.name, lambda: CrossNormUnit(self))
            if not isinstance(unit, CrossNormUnit):
                raise ConfigError(f"{unit!r} is no unit of CrossNorm.")
            unit.layout = spot_layout(anatomy, spot, self.layout)
            unit.index, unit.count = index, len(found)
            if self.crop != "neither" and unit.layout.name not in ("NCHW", "NHWC"):
                raise SiteError(
                    f"CrossNorm: crop={self.crop!r} needs maps, and {spot.name!r} holds {unit.layout}.\n"
                    'A box needs rows and columns.\nPass crop="neither", or layers= with maps.'
                )
            edit = spot.training_edit
            placements.append(Placement(spot.owner, edit, spot.name, unit, evaluation=False, order=ORDER))
        return placements

    def losses(
        self, graft: Graft, out: Any, target: Tensor, criterion: Callable[..., Tensor]
    ) -> Mapping[str, Tensor]:
        """Run the batch twice more with CrossNorm on, and weigh the divergence of the predictions."""
        if not self.consistency:
            return {}
        units = [unit for unit in graft.units.values() if isinstance(unit, CrossNormUnit)]
        last = units[0].context.last
        if last is None:  # the pass was one in evaluation
            return {}
        model, args, kwargs = last
        clean = take_logits(out)
        if args and isinstance(args[0], Tensor) and args[0].shape[0] != clean.shape[0]:
            raise ConfigError(
                f"{graft.name!r} was asked for the loss of {clean.shape[0]} predictions, but the model's last "
                f"training pass had {args[0].shape[0]} images.\nIt runs that batch again to compare.\n"
                "Call fxgraft.loss right after the pass it is for."
            )
        with _forced(units):
            others = [take_logits(model(*args, target=target, **kwargs)) for _ in range(2)]
        return {"consistency": self.consistency_weight * jensen_shannon(clean, *others)}

    def describe(self, graft: Graft) -> str:
        """Say how many units there are, where, and how often they act."""
        active = "all" if self.active is None else str(self.active)
        when = "in two more passes" if self.consistency else f"with probability {self.p:g}"
        return f"{len(graft.units)} units ({self.position}), {active} on {when}"


@contextmanager
def _forced(units: Sequence[CrossNormUnit]) -> Iterator[None]:
    for unit in units:
        unit.forced = True
    try:
        yield
    finally:
        for unit in units:
            unit.forced = False


class CrossNormUnit(Unit):
    """Restyles the value at one site. Holds no parameters and no buffers."""

    transient = ("layout", "index", "count")

    def __init__(self, config: CrossNorm) -> None:
        super().__init__()
        self.config = config
        self.replays = config.consistency
        self.layout: Layout
        self.index: int
        self.count: int
        self.forced = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, shaped as it is, restyled if the unit is on in this pass."""
        config = self.config
        alone = x.shape[0] == 1 and config.mode == "two-instance"
        if alone or config.lam == 1 or not self._may_act():
            return x
        on = self._on(x.device)
        if on is False:
            return x
        restyled = self.layout.restore(x, self._restyled(self.layout.canonical(x)))
        return restyled if on is True else torch.where(on, restyled, x)

    def _may_act(self) -> bool:
        """Say whether a pass may have units on; only within a pass is there anything to draw for."""
        usual = self.config.p > 0 and not self.config.consistency
        return self.context.root is not None and (self.forced or usual)

    def _on(self, device: torch.device) -> Tensor | bool:
        """Say whether this unit is on in this pass; the first unit to ask draws for all of the graft."""
        values, key = self.context.values, f"{self.graft}:on"
        if key not in values:
            values[key] = self._draw(device)
        drawn = values[key]
        return drawn[self.index].to(device) if isinstance(drawn, Tensor) else self.index in drawn

    def _draw(self, device: torch.device) -> Tensor | frozenset[int]:
        """Draw the units of a pass: on the CPU, which stalls no device, or inside compiled code as data."""
        config = self.config
        active = self.count if config.active is None else config.active
        if torch.compiler.is_compiling():
            rank = torch.rand(self.count, device=device).argsort()
            happens = torch.rand((), device=device) < (1.0 if self.forced else config.p)
            return (rank < active) & happens
        if not self.forced and torch.rand(()).item() >= config.p:
            return frozenset()
        return frozenset(torch.randperm(self.count)[:active].tolist())

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
            content_box=self._box(x) if config.crop in ("content", "both") else None,
            style_box=self._box(x) if config.crop in ("style", "both") else None,
            detach=config.detach,
        )

    def _box(self, x: Tensor) -> core.Box:
        height, width = x.shape[-2:]
        if torch.compiler.is_compiling():
            return core.draw_box(height, width, self.config.beta, self.config.threshold, x.device)
        return core.draw_box(height, width, self.config.beta, self.config.threshold).tolist()
