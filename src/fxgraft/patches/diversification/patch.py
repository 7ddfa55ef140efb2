"""The diversification block: the patch and the unit that takes the head's place in training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.extend import (
    Backbone,
    Capture,
    ConfigError,
    Graft,
    Head,
    Make,
    Patch,
    Picture,
    Placement,
    PositionwiseHead,
    StructureError,
    Unit,
    View,
    because,
    check_count,
    check_share,
    grafts_in,
    is_count,
    recording,
    register,
)
from fxgraft.extend import position_scores as maps
from fxgraft.patches.diversification import tensors as core
from fxgraft.patches.diversification.loss import GradientBoostingCrossEntropy, gradient_boosting_cross_entropy
from fxgraft.patches.diversification.picture import class_map_panels
from fxgraft.patches.diversification.presets import PRESETS

HEAD, MAP, RETURN = "head", "map", "maps"


@register("diversification")
@dataclass(frozen=True, kw_only=True)
class Diversification(Patch):
    """Diversification block: damp the peak and random patches of every class map in training.

    Sun, Cholakkal, Khan, Khan, Shao: "Fine-grained Recognition: Accounting for Subtle Differences between Similar
    Classes", AAAI 2020. In training, pooling and the linear classifier change places: the classifier's weight makes
    one map per class, the largest entry and random patches of every map are damped to α of their value, and the
    average of what is left are the logits. The network has to find more than one place that tells classes apart. The
    loss that goes with it sets the label against its k highest-scoring wrong classes alone. Evaluation is the bare
    model's.

    Where nothing is damped, the logits are the bare network's: dropout draws one mask per image, and norms between
    pooling and classifier have the statistics of the pooled vector. With an activation between them they are not: all
    layers but BatchNorm then act at every position by itself, and the average is another than evaluation's. The summary
    and the plan of such a network say "not exact".

    Put it on the head, which is found. It costs one small matrix product per position. It hurts where maps are
    small: below about 7×7 positions one patch is much of the image. Training passes call none of the head's modules,
    so they refuse hooks and replaced forwards on them (`BypassError`); those of modules around the head act as ever.

    Args:
        alpha: what damped entries are multiplied by, in [0, 1]; 1 damps nothing.
        p_peak: probability, per image and class, that the peak of the map is damped.
        p_patch: probability that a patch is damped; the peak belongs to none.
        patch: side G of the square patches, in positions of the map; of clips and volumes of the cubes, or a side for
            each dimension, (T, H, W).
        border: positions that no whole patch covers are damped as peaks only ("skip", as in the reference
            code) or belong to smaller patches ("partial").
        ties: which of several largest entries is the peak: the "first" one, or "all", each with its own draw, as in
            the reference code.
        head: qualified name of the classifier, where a model has several. By default all whose logits are put
            together, if they read the same average.
        output: which entry of a structured output holds the logits (a key, an attribute or a position).
        loss: "gradient_boosting" makes `fxgraft.loss` use that loss in place of cross-entropy. With it this is the
            method that the paper published (87.7, ``preset="paper"``), without it the row of the block alone (86.3,
            ``preset="block"``).
        loss_k: how many wrong classes that loss counts, at least 1.
        loss_start: share of training before which cross-entropy stays; read from `fxgraft.set_progress`.
        return_maps: training passes return ``(logits, maps)``, the class maps (B, K, H, W), or (B, K, T, H, W), before
            damping.

    Raises:
        ConfigError: an option outside its range, or patches larger than the map.
        StructureError: no head of average pooling and a linear classifier, or several that read averages of their own.
    """

    title = "Diversification block and gradient-boosting loss"
    paper = (
        "Sun, Cholakkal, Khan, Khan, Shao: Fine-grained Recognition: "
        "Accounting for Subtle Differences between Similar Classes. AAAI 2020"
    )
    url = "https://arxiv.org/abs/1912.06842"
    where = "the head: average pooling and linear classifier"
    cost = "training: the classifier runs at every position of the last map; evaluation: none"
    idea = (
        "The peak and random patches of every class map are damped in training, so that the network finds "
        "more than one place that tells similar classes apart."
    )
    equation = (
        "M = W · F, one map per class; M' = α · M at peaks and patches that are drawn, M elsewhere; "
        "logits = mean of M' over positions"
    )
    works_with = (
        "heads of average pooling and a linear classifier, exactly behind dropout and norms, not exactly behind an "
        "activation (its summary says so); all other methods but MixMo. Not heads that read a class token"
    )
    hurts = (
        "maps below about 7×7 positions, of which one patch is much; coarse classes, which one place "
        "tells apart"
    )
    smallest_map = 7
    measures = MappingProxyType(
        {
            "suppressed": "share of the entries of all class maps that were damped",
        }
    )
    train_only = True
    presets = PRESETS

    alpha: float = 0.1
    p_peak: float = 0.5
    p_patch: float = 0.5
    patch: core.Patch = 3
    border: core.Border = "skip"
    ties: core.Ties = "first"
    head: str | None = None
    output: str | int | None = None
    loss: Literal["gradient_boosting"] | None = None
    loss_k: int = 15
    loss_start: float = 0.0
    return_maps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "alpha", "p_peak", "p_patch", "loss_start")
        check_count(self, "loss_k")
        sides = self.patch if isinstance(self.patch, (tuple, list)) else (self.patch,)
        if not sides or not all(map(is_count, sides)):
            raise ConfigError(
                "Diversification: patch must be a whole number of cells above 0, or one for each dimension; got "
                f"{self.patch!r}."
            )
        if isinstance(self.patch, list):  # as JSON holds it
            object.__setattr__(self, "patch", tuple(self.patch))

    def place(self, backbone: Backbone, make: Make) -> Iterator[Placement]:
        """Replace the head in the training graph of the smallest module that holds it."""
        if self.loss is not None:
            backbone.check_logits(self.output, returned=True)
        with because(
            "Only an average can change places with the classifier, which turns features into class maps."
        ):
            head = backbone.head(self.head, self.output)
        unit = make(HEAD, DiversificationUnit, self)
        unit.bind(head=head, class_maps=backbone.positionwise(head))
        core.patch_grid(unit.grid, self.patch, self.border)
        if head.source is not None:
            yield from backbone.place(head.source, make(MAP, Capture, MAP), evaluation=False, key=MAP)
        yield backbone.replace_head(head, unit, HEAD)
        if self.return_maps:
            if not isinstance(backbone.output, Tensor):
                raise StructureError(
                    f"{backbone.name} does not return one tensor, so maps have no place "
                    "beside it.\nLeave return_maps out; patches.diversification.record gives the maps."
                )
            yield backbone.after(make(RETURN, WithMapsUnit), RETURN, evaluation=False)

    def describe(self, graft: Graft) -> str:
        """Name the head, the size of its maps, and whether training and evaluation heads differ."""
        (unit,) = graft.units_of(DiversificationUnit)
        sides = core.patch_sides(self.patch, unit.grid)
        maps, patches = ("×".join(map(str, lengths)) for lengths in (unit.grid, sides))
        where = " + ".join(unit.head.classifiers) or unit.head.owner
        parts = [f"{where} (class maps of {maps}, patches of {patches})"]
        inexact = self.inexact(graft)
        if inexact:
            parts.append(f"not exact: {inexact}")
        if self.loss is not None:
            start = f" from {self.loss_start:.0%} of the training" if self.loss_start else ""
            parts.append(f"gradient-boosting loss with k={self.loss_k}{start}")
        return "; ".join(parts)

    def inexact(self, graft: Graft) -> str:
        """Name the layers between pooling and classifier that do not commute with the average, such as activations."""
        (unit,) = graft.units_of(DiversificationUnit)
        if not unit.class_maps.inexact:
            return ""
        return (
            f"{', '.join(unit.class_maps.inexact)} between pooling and classifier acts at every position, so that the "
            "heads of training and evaluation differ"
        )

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show the class maps of an image, and what a pass damps in them."""
        return class_map_panels(view, self)

    def schedules(self) -> tuple[str, ...]:
        """Name ``loss_start``, where there is a loss to start."""
        return ("loss_start",) if self.loss is not None and self.loss_start > 0 else ()

    def replaces_criterion(self) -> bool:
        """Say whether there is a loss that goes with the block."""
        return self.loss is not None

    def criterion(self, graft: Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the gradient-boosting loss, with the settings of the cross-entropy it replaces; none in evaluation."""
        (unit,) = graft.units_of(DiversificationUnit)
        model = graft.model()
        if self.loss is None or not unit.boosts or (model is not None and not model.training):
            return criterion
        plain: Any = criterion  # a subclass, or one with hooks, may compute something else
        forward = getattr(type(plain), "forward", None)
        hooked = getattr(plain, "_forward_hooks", None) or getattr(plain, "_forward_pre_hooks", None)
        if forward is nn.CrossEntropyLoss.forward and "forward" not in vars(plain) and not hooked:
            return GradientBoostingCrossEntropy(
                self.loss_k,
                label_smoothing=plain.label_smoothing,
                weight=plain.weight,
                ignore_index=plain.ignore_index,
                reduction=plain.reduction,
            )
        options: dict[str, Any] = {}
        inner = criterion
        if isinstance(criterion, functools.partial) and not criterion.args:
            inner, options = criterion.func, criterion.keywords
        if inner is not F.cross_entropy or not options.keys() <= _SETTINGS:
            name = getattr(criterion, "__name__", type(criterion).__name__)
            raise ConfigError(
                f'{graft.name!r} was made with loss="gradient_boosting", and fxgraft.loss was given {name}.\n'
                "That loss stands in for cross-entropy, and cannot be had together with another criterion.\n"
                "Leave criterion= out (or pass cross-entropy with its options), or patch without loss=."
            )
        return functools.partial(gradient_boosting_cross_entropy, k=self.loss_k, **options)


_SETTINGS = {"weight", "ignore_index", "reduction", "label_smoothing"}


class WithMaps(NamedTuple):
    """What a training pass returns with ``return_maps=True``.

    Attributes:
        logits: what the model returns otherwise.
        maps: the class maps (B, K, *S), before damping.
    """

    logits: Tensor
    maps: Tensor


@dataclass(frozen=True)
class DiversificationRecord:
    """What one training pass damped.

    Attributes:
        maps: class maps (B, K, *S) before damping.
        mask: bool (B, K, *S), what was damped; None where nothing can be.
    """

    maps: Tensor
    mask: Tensor | None


class DiversificationUnit(Unit):
    """Turns the map before the pooling into logits. Holds no parameters: it uses the classifier's own."""

    head: Head
    class_maps: PositionwiseHead
    records: list[DiversificationRecord] | None = None

    def __init__(self, config: Diversification) -> None:
        super().__init__()
        self.config = config
        self.set_progress(0.0)

    @property
    def grid(self) -> tuple[int, ...]:
        """Size (H, W) or (T, H, W) of the class maps as the model was looked at."""
        shape = [n for d, n in enumerate(self.head.shape) if d not in (0, self.head.training.pooling.channel)]
        if len(shape) > 1:
            return tuple(shape)
        return self.head.grid or (1, shape[0])

    def set_progress(self, fraction: float) -> None:
        """Switch the loss on at ``loss_start``."""
        self.boosts = fraction >= self.config.loss_start

    def stale(self, model: nn.Module) -> bool:
        """Say whether layers of the head were replaced, apart from the classifier, which is looked up at every pass."""
        return self.class_maps.stale(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shaped as the head's own, from a map or volume, channels first or last, or (B, N, C).

        Where the map lies in a module of its own, ``x`` is what that module pools of it.
        """
        config = self.config
        run = self.run
        run.check_images_alone(
            "Class maps of positions that are padding would be damped and averaged.", all_positions=True
        )
        if self.head.source is not None:
            x = self._map()
        scores = self.class_maps(run.model, x)
        mask = None
        if config.alpha < 1 and (config.p_peak > 0 or config.p_patch > 0):
            draws = core.draw(
                scores,
                p_peak=config.p_peak,
                p_patch=config.p_patch,
                patch=config.patch,
                border=config.border,
                ties=config.ties,
            )
            mask = core.suppression_mask(scores, draws, patch=config.patch, ties=config.ties)
        run.measure("suppressed", 0.0 if mask is None else mask)
        if self.records is not None:
            self.records.append(
                DiversificationRecord(scores.detach().cpu(), None if mask is None else mask.cpu())
            )
        if config.return_maps:
            run.put("maps", scores)
        kept = scores if mask is None else core.damp(scores, mask, config.alpha)
        logits = kept.mean(tuple(range(2, kept.ndim)))
        return logits.reshape(*logits.shape, *[1] * (self.head.ndim - 2))

    def _map(self) -> Tensor:
        """Return the captured map, for networks that pool it in another module than the classifier's."""
        captured = self.run.get(MAP)
        if captured is None:
            raise StructureError(
                f"{self.graft!r} saw no map in this training pass: the module that holds the pooling is in evaluation "
                "mode.\nClass maps are made of that map.\n"
                "Call model.train(); to freeze these layers, use requires_grad_(False)."
            )
        return captured  # type: ignore[no-any-return]


class WithMapsUnit(Unit):
    """Returns the model's output together with the class maps of the pass."""

    def forward(self, out: Tensor) -> WithMaps:
        """Return ``out`` with the maps."""
        return WithMaps(out, self.run.get("maps"))


@contextmanager
def record(model: nn.Module) -> Iterator[list[DiversificationRecord]]:
    """Collect class maps and masks of the training passes of the block, one record per pass.

    Args:
        model: a model with a diversification patch.

    Yields:
        The list that fills up.
    """
    missing = (
        "There is no diversification block on this model.\n"
        'Call fxgraft.patch(model, "diversification") first.'
    )
    with recording(grafts_in(model), DiversificationUnit, missing) as records:
        yield records


__all__ = ["Diversification", "DiversificationRecord", "DiversificationUnit", "WithMaps", "maps", "record"]
