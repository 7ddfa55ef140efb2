"""DSU: draws a new style for each map, around its own, as far from it as styles differ in the batch.

With mean μ and deviation σ of each channel of a map, Σ_μ and Σ_σ the deviations of these over the images of the batch,
and ε_μ, ε_σ ~ N(0, 1) for each image and channel,

    y = (σ + ε_σ Σ_σ) · (x − μ) / σ + μ + ε_μ Σ_μ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxgraft.extend import (
    Backbone,
    Graft,
    MapPatch,
    Panel,
    PassView,
    Picture,
    Preset,
    Site,
    SiteSpec,
    StructureError,
    TraceError,
    Training,
    View,
    check_positive,
    modulated,
    presets_by_name,
    register,
)


def perturb_moments(x: Tensor, mean_noise: Tensor, std_noise: Tensor, eps: float = 1e-6) -> Tensor:
    """Shift the channel means and deviations of maps by noise, in units of their deviation over the batch.

    Args:
        x: (B, C, *S), floating point, of at least two images.
        mean_noise: (B, C), of the means.
        std_noise: (B, C), of the deviations.
        eps: added to the unbiased variances under the roots.
    """

    def spread(values: Tensor) -> Tensor:
        return (values.var(0, keepdim=True) + eps).sqrt()

    def coefficients(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        std = (var + eps).sqrt()
        scale = 1 + std_noise.to(std.dtype) * spread(std) / std
        return scale, mean + mean_noise.to(mean.dtype) * spread(mean) - mean * scale

    return modulated(x, coefficients)


def _release(name: str, data: str) -> Preset:
    return Preset(
        name=name,
        options={},
        source=f"release, github.com/lixiaotong97/DSU, multi-domain-generalization/scripts/{name}.sh",
        training=Training(
            network="ResNet-18, ImageNet weights",
            data=f"{data}, 224 px",
            augmentation="flip, random translation",
        ),
    )


@register("dsu")
@dataclass(frozen=True, kw_only=True)
class DSU(MapPatch):
    """DSU: perturb the channel statistics of maps by how uncertain they are.

    Li, Dai, Ge, Liu, Shan, Duan: "Uncertainty Modeling for Out-of-Distribution Generalization", ICLR 2022. In training,
    each unit with probability ``p`` draws the mean and the deviation of every channel from a normal distribution around
    its own, as wide as the batch's images differ in it; labels stay. Evaluation is the bare model's. A batch of one
    stays as it is.

    Without ``layers`` the units are at the six places of the paper: behind the first layer (in front of its norm), in
    front of the first of the last four stages (behind the max-pooling of a ResNet), and behind each of these. Of a
    plain ViT the stages are four shares of its blocks. A place that a network does not have is left out, as is one that
    no prediction reads, such as the tokens behind the last block of a ViT with a class token.

    Args:
        factor: what the noise is multiplied by.

    Raises:
        ConfigError: an option outside its range.
        SiteError: no such layer, or one without maps or tokens.
    """

    title = "DSU"
    paper = (
        "Li, Dai, Ge, Liu, Shan, Duan: Uncertainty Modeling for Out-of-Distribution Generalization. ICLR 2022"
    )
    url = "https://arxiv.org/abs/2202.03958"
    idea = (
        "In training, the style of each image is replaced by one drawn at random around it. The further apart the "
        "styles in a batch are, the wider it is drawn."
    )
    equation = (
        "y = (σ + ε_σ Σ_σ) · (x − μ) / σ + μ + ε_μ Σ_μ, with Σ the deviation over the batch, and ε ~ N(0, 1)"
    )
    where = "behind the first layer, in front of the first of the last four stages, and behind each of these"
    cost = "training: one pass over a map for its statistics and one to change it, at each site; evaluation: none"
    works_with = "any backbone with maps or tokens; all other methods; activation checkpointing"
    hurts = "where the style tells the classes apart; small batches, whose spread says little; batches of one"
    presets = presets_by_name(_release("pacs", "PACS"), _release("office_home", "Office-Home"))

    factor: float = 1.0

    def __post_init__(self, layer: SiteSpec | None) -> None:
        super().__post_init__(layer)
        check_positive(self, "factor")

    def default_sites(self, backbone: Backbone) -> list[Site]:
        """Find the places of the paper."""
        try:
            sites = [site for stem in backbone.stems() for site in backbone.sites(stem.path)]
        except (StructureError, TraceError):  # the first layer cannot be told: use the other places
            sites = []
        stem = backbone.stem_output()
        if stem is not None and not any(map(stem.hands_on, sites)):
            sites.append(stem)
        sites += backbone.main_stages()
        return [*{site.name: site for site in sites}.values()]

    def change(self, x: Tensor, run: PassView | None = None) -> Tensor:
        """Draw other means and deviations around those of maps (B, C, *positions)."""
        mean_noise, std_noise = (torch.randn(x.shape[:2], device=x.device) * self.factor for _ in range(2))
        return perturb_moments(x, mean_noise, std_noise)

    def describe(self, graft: Graft) -> str:
        """Say where the units are and how often they act."""
        return f"perturbs moments {super().describe(graft)}"

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show an image in styles that are drawn around its own."""
        torch.manual_seed(view.seed)
        images, channels = view.images[:2], view.images.shape[1]
        drawn = [self.change(images)[0].clamp(0, 1) for _ in range(3)]
        panels = [Panel("the image", images[0]), *(Panel("another style", style) for style in drawn)]
        return Picture(
            [panels], f"styles drawn around the image's own, {channels} colours as if they were channels"
        )
