"""Manifold Mixup, as somebody else would write it: from public names alone.

Verma, Lamb, Beckham, Najafi, Mitliagkas, Lopez-Paz, Bengio: "Manifold Mixup: Better Representations by Interpolating
Hidden States", ICML 2019. In each training pass one layer is drawn; there every sample is mixed with another one of
the batch, λ·h + (1 − λ)·h' with one λ ~ Beta(α, α), and the loss is λ·L(out, y) + (1 − λ)·L(out, y').
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fxgraft
from fxgraft import extend


@dataclass(frozen=True, kw_only=True)
class ManifoldMixup(extend.LayeredPatch):
    """Manifold Mixup: mix hidden states, and the losses of both labels.

    Args:
        layers: the layers to draw from, besides the image. Default: the first two stages.
        layer: the same, for one.
        image: draw from the image, too.
        p: probability that a pass is mixed.
        alpha: of the Beta distribution of the mixing ratio.
    """

    title = "Manifold Mixup"
    paper = (
        "Verma, Lamb, Beckham, Najafi, Mitliagkas, Lopez-Paz, Bengio: Manifold Mixup: Better Representations by "
        "Interpolating Hidden States. ICML 2019"
    )
    url = "https://arxiv.org/abs/1806.05236"
    where = "the image and the first stages, one of them in each pass"
    cost = "training: one pass over one map, and the loss twice; evaluation: none"
    train_only = True
    pairs_labels = "mixes images at a layer again in every pass"
    example = {"layers": 0}  # noqa: RUF012 - as fxgraft reads it; two stages are not everywhere

    layers: extend.SiteSpec | None = (0, 1)
    image: bool = True
    p: float = 1.0
    alpha: float = 2.0

    def __post_init__(self, layer: extend.SiteSpec | None) -> None:
        super().__post_init__(layer)
        extend.check_share(self, "p")
        extend.check_positive(self, "alpha")

    def place(self, backbone: extend.Backbone, make: extend.Make) -> Iterator[Any]:
        sites = backbone.sites((0, 1) if self.layers is None else self.layers)
        out = backbone.output
        if not isinstance(out, Tensor) or out.ndim != 2:
            raise fxgraft.StructureError(
                f"Manifold Mixup mixes labels of (B, K); {backbone.name} gives others."
            )
        for site in sites:
            value = site.value
            if not isinstance(value, Tensor) or not value.is_floating_point() or len(value) != 2:
                raise fxgraft.SiteError(
                    f"Manifold Mixup needs one tensor, a row per image, at {site.name!r}."
                )
        units = [make(site.name, MixUnit, self) for site in sites]
        if self.image:
            units.append(make("image", MixUnit, self))
            yield backbone.before(units[-1], "image", evaluation=False)
        for index, unit in enumerate(units):
            unit.bind(index=index, count=len(units), classes=out.shape[1])
        for site, unit in zip(sites, units, strict=False):
            yield backbone.place(site, unit, evaluation=False)

    def describe(self, graft: extend.Graft) -> str:
        return f"mixes at one of {', '.join(graft.units)}"

    def criterion(self, graft: extend.Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mixed(out: Any, y: Any) -> Tensor:
            mixture: Mixture | None = graft.recall(out)
            if mixture is None:  # a pass of evaluation, or one that was not mixed
                return criterion(out, y)
            share = mixture.share
            return share * criterion(out, y) + (1 - share) * criterion(out, y[mixture.order])

        return mixed


@dataclass
class Mixture:
    layer: int | Tensor
    order: Tensor
    share: Tensor


class MixUnit(extend.Unit):
    index: int
    count: int
    classes: int

    def __init__(self, config: ManifoldMixup) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        run = self.current
        if run is None or not self.config.p:
            return x
        mixture = run.shared("mixture", lambda: self.draw(run, x))
        on = mixture.layer == self.index
        if on is False:
            return x
        if run.target is not None:
            self.relabel(run, mixture, on, len(x))
        return extend.draws.choose(on, lambda: mix(x, mixture), x)

    def draw(self, run: extend.PassView, x: Tensor) -> Mixture:
        alpha = torch.full((2,), self.config.alpha, device=x.device)
        on = extend.draws.coin(self.config.p, x.device)
        share, order = torch._sample_dirichlet(alpha)[0], extend.draws.permutation(len(x), x.device)
        layer = extend.draws.choice(self.count, x.device)
        if on is not True:
            layer = -1 if on is False else torch.where(on, layer, -1)
            share = torch.ones_like(share) if on is False else torch.where(on, share, 1.0)
        mixture = Mixture(layer, order, share)
        run.remember(mixture)
        return mixture

    def relabel(self, run: extend.PassView, mixture: Mixture, on: Any, batch: int) -> None:
        """Let the grafts behind this layer see the labels of what they get."""
        labels = run.labels(batch)
        soft = labels if labels.is_floating_point() else F.one_hot(labels, self.classes).float()
        run.relabel(extend.draws.choose(on, lambda: mix(soft, mixture), soft))


def mix(x: Tensor, mixture: Mixture) -> Tensor:
    share = mixture.share.to(x.dtype)
    return share * x + (1 - share) * x[mixture.order]
