"""Permuted AdaIN, as somebody else would write it: from public names alone.

Nuriel, Benaim, Wolf: "Permuted AdaIN: Reducing the Bias Towards Global Statistics in Image Classification", CVPR 2021.
In a few passes every map takes the channel means and deviations of another image's: y = σ' · (x − μ) / σ + μ'.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxgraft import extend


@dataclass(frozen=True, kw_only=True)
class PermutedAdaIN(extend.MapPatch):
    """Permuted AdaIN: swap channel means and deviations within the batch.

    Args:
        layers: where, by name, glob or stage number. Default: behind the last four stages.
        layer: the same, for one.
        p: probability that a unit swaps.
    """

    title = "Permuted AdaIN"
    paper = "Nuriel, Benaim, Wolf: Permuted AdaIN: Reducing the Bias Towards Global Statistics. CVPR 2021"
    url = "https://arxiv.org/abs/2010.05785"
    where = "behind the stages"
    cost = "training: two passes over each map; evaluation: none"
    hurts = "where the style tells the classes apart"
    example = {"p": 1.0}  # noqa: RUF012 - as fxgraft reads it

    p: float = 0.01

    def change(self, x: Tensor, run: extend.PassView) -> Tensor:
        order = extend.draws.permutation(len(x), x.device)

        def coefficients(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
            std = (var + 1e-5).sqrt()
            return std[order] / std, mean[order] - mean * std[order] / std

        return extend.modulated(x, coefficients)
