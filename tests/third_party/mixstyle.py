"""MixStyle, as somebody else would write it: from public names alone.

Zhou, Yang, Qiao, Xiang: "Domain Generalization with MixStyle", ICLR 2021. Channel means and deviations of a map
are mixed with those of other images of the batch, in training, with one ratio per image:

    σ_mix = λ·σ + (1 − λ)·σ',   μ_mix = λ·μ + (1 − λ)·μ',   y = σ_mix · (x − μ) / σ + μ_mix,   λ ~ Beta(α, α).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import fxgraft
from fxgraft import extend


@dataclass(frozen=True, kw_only=True)
class MixStyle(extend.LayeredPatch):
    """MixStyle: mix channel means and deviations within the batch.

    Args:
        layers: where, by name, glob or stage number. Default: the first two stages, as in the paper.
        layer: the same, for one.
        p: probability that a pass is mixed.
        alpha: of the Beta distribution of the mixing ratio.
        mix: with whom: any image ("random"), or one of the other half of the batch ("crossdomain"), for batches
            that hold one domain in each half.
    """

    title = "MixStyle"
    paper = "Zhou, Yang, Qiao, Xiang: Domain Generalization with MixStyle. ICLR 2021"
    url = "https://arxiv.org/abs/2104.02008"
    where = "behind the first stages"
    cost = "training: one pass over each map; evaluation: none"
    hurts = "where the style tells the classes apart"
    measures = {"ratio": "share of an image's own statistics in its mixture"}  # noqa: RUF012 - likewise
    train_only = True
    example = {"layers": 0}  # noqa: RUF012 - as fxgraft reads it; two stages are not everywhere

    layers: extend.SiteSpec | None = (0, 1)
    p: float = 0.5
    alpha: float = 0.1
    mix: Literal["random", "crossdomain"] = "random"

    def __post_init__(self, layer: extend.SiteSpec | None) -> None:
        super().__post_init__(layer)
        extend.check_share(self, "p")
        extend.check_positive(self, "alpha")

    def place(self, backbone: extend.Backbone, make: extend.Make) -> Iterator[list[extend.Placement]]:
        for site in backbone.sites((0, 1) if self.layers is None else self.layers):
            layout = backbone.layout(site)
            if layout.name == "NC":
                raise fxgraft.SiteError(f"MixStyle needs positions, and {site.name!r} holds vectors.")
            unit = make(site.name, MixStyleUnit, self)
            unit.bind(layout=layout)
            yield backbone.place(site, unit, evaluation=False)

    def describe(self, graft: extend.Graft) -> str:
        return f"mixes styles at {', '.join(graft.units)} with probability {self.p:g}"


class MixStyleUnit(extend.Unit):
    layout: extend.Layout

    def __init__(self, config: MixStyle) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        run = self.current
        if run is None or not self.config.p:
            return x
        on = run.shared("on", lambda: extend.draws.coin(self.config.p, x.device))
        return extend.draws.choose(on, lambda: self.mixed(x), x)

    def mixed(self, x: Tensor) -> Tensor:
        z = self.layout.canonical(x)
        dims = tuple(range(2, z.ndim))
        mean = z.mean(dims, keepdim=True).detach()
        std = (z.var(dims, keepdim=True, correction=0) + 1e-6).sqrt().detach()
        order = self.partners(len(z), z.device)
        share = torch.full((len(z), *[1] * (z.ndim - 1), 2), self.config.alpha, device=z.device)
        ratio = torch._sample_dirichlet(share)[..., 0].to(z.dtype)
        self.run.measure("ratio", ratio)
        new_mean = ratio * mean + (1 - ratio) * mean[order]
        new_std = ratio * std + (1 - ratio) * std[order]
        return self.layout.restore(x, (z - mean) / std * new_std + new_mean)

    def partners(self, batch: int, device: torch.device) -> Tensor:
        if self.config.mix == "random":
            return extend.draws.permutation(batch, device)
        half = batch // 2
        first, second = (extend.draws.permutation(n, device) for n in (half, batch - half))
        return torch.cat((second + half, first))
