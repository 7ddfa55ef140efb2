"""MixStyle and EFDMix: the style of a map is mixed with that of another image of the batch.

With mean μ and deviation σ of each channel of a map, μ' and σ' those of its partner, and one λ ~ Beta(α, α) per image,

    y = (λσ + (1 − λ)σ') · (x − μ) / σ + λμ + (1 − λ)μ'                                      (MixStyle)
    y = x + (1 − λ) · (the partner's sorted values, each where x has the value of its rank − x)     (EFDMix)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    TargetError,
    Training,
    View,
    check_count,
    check_positive,
    draws,
    modulated,
    presets_by_name,
    register,
)


def mix_moments(x: Tensor, partner: Tensor, ratio: Tensor) -> Tensor:
    """Mix the channel means and deviations of maps with their partners', both as constants.

    Args:
        x: (B, C, *S), floating point.
        partner: (B,) the number of the image that each takes statistics of.
        ratio: (B,) share of an image's own statistics.
    """

    def coefficients(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = mean.detach(), (var.detach() + 1e-6).sqrt()
        own = ratio.to(mean.dtype).unsqueeze(1)
        scale = own + (1 - own) * std[partner] / std
        return scale, own * mean + (1 - own) * mean[partner] - mean * scale

    return modulated(x, coefficients)


def mix_histograms(x: Tensor, partner: Tensor, ratio: Tensor) -> Tensor:
    """Mix the values of every channel with its partner's, rank by rank; gradients flow to both maps.

    Args:
        x: (B, C, *S), floating point.
        partner: (B,) the number of the image that each takes values of.
        ratio: (B,) share of an image's own values.
    """
    values, order = x.flatten(2).sort(stable=True, dim=-1)  # equal values keep their order, on every device
    matched = torch.zeros_like(values).scatter(-1, order, values[partner]).view(x.shape)
    return x + (matched - x.detach()) * (1 - ratio.to(x.dtype)).view(-1, *(1,) * (x.ndim - 1))


PACS = dict[str, Any](network="ResNet-18 from ImageNet", data="PACS, 224 px", optimiser="SGD 0.001, cosine")
OFFICE = dict[str, Any](PACS, data="Office-Home, 224 px", note="the script names both stages=2 and stages=3")
REID = dict[str, Any](network="ResNet-50 from ImageNet", data="Market-1501", schedule="×0.1 at epoch 20")
MIXES = {"moments": mix_moments, "histogram": mix_histograms}
ACROSS, EXACT = {"mix": "crossdomain"}, {"match": "histogram"}
ZHOU, ZHANG = "KaiyangZhou/mixstyle-release", "YBZh/EFDM, DomainGeneralization"
PRESETS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("pacs", f"{ZHOU}, imcls/scripts/run_mixstyle.sh", {"stages": 3}, PACS),
    ("pacs_domains", f"{ZHOU}, imcls/scripts/run_mixstyle.sh", {"stages": 3, **ACROSS}, PACS),
    ("office_home", f"{ZHOU}, office_home_dg_random.yaml", {}, {**OFFICE, "epochs": 50, "batch": 64}),
    ("office_home_domains", f"{ZHOU}, office_home_dg_crossdomain.yaml", ACROSS, {**OFFICE, "epochs": 150}),
    ("reid", f"{ZHOU}, reid/cfgs/cfg_r50.yaml", {}, {**REID, "optimiser": "SGD 0.05", "epochs": 60, "batch": 32}),
    ("efdmix_pacs", f"{ZHANG}/imcls/scripts/res18.sh", {"stages": 3, **ACROSS, **EXACT}, PACS),
    ("efdmix_pacs_single", f"{ZHANG}/imcls/scripts/res18.sh, one source", {"stages": 3, **EXACT}, PACS),
)  # fmt: skip


@register("mixstyle")
@dataclass(frozen=True, kw_only=True)
class MixStyle(MapPatch):
    """MixStyle and EFDMix: mix the channel statistics of maps within the batch.

    Zhou, Yang, Qiao, Xiang, ICLR 2021; with ``match="histogram"`` EFDMix of Zhang, Li, Li, Jia, Zhang, CVPR 2022. In
    training, each unit with probability ``p`` mixes the style of every image with that of another one; labels stay.
    Evaluation is the bare model's. Without ``layers`` the units are behind the first of the last four stages
    (``layer1`` and ``layer2`` of a ResNet), or of four shares of the blocks of a plain ViT.

    ``mix="crossdomain"`` reads the domain of each image from the call, ``model(x, target=y, domains=d)``: partners are
    drawn evenly from the images of other domains. An image without any stays as it is, and so does a batch of one.

    Args:
        stages: how many stages have a unit, where ``layers`` does not say it; never the last one.
        alpha: parameter of the Beta distribution of the mixing ratio; small ones draw ratios close to 0 and 1.
        mix: the partner of an image: any image of the batch ("random"), or one of another domain ("crossdomain").
        match: what is mixed: means and deviations, as constants ("moments"), or all values by rank ("histogram").

    Raises:
        ConfigError: an option outside its range.
        SiteError: no such layer, or one without maps or tokens.
        TargetError: in a pass, domains are missing or not one whole number per image.
    """

    title, url = "MixStyle", "https://arxiv.org/abs/2104.02008"
    paper = (
        "Zhou, Yang, Qiao, Xiang: Domain Generalization with MixStyle. ICLR 2021; EFDMix: Zhang, Li, Li, Jia, Zhang: "
        "Exact Feature Distribution Matching for Arbitrary Style Transfer and Domain Generalization. CVPR 2022"
    )
    idea = (
        "In training, early maps get a mixture of the styles of two images, so that the network meets styles that no "
        "domain has."
    )
    equation = (
        "y = σ_mix · (x − μ) / σ + μ_mix, with σ_mix = λσ + (1 − λ)σ', μ_mix alike, λ ~ Beta(α, α); "
        "EFDMix: y = x + (1 − λ) · (the partner's value of the same rank − x)"
    )
    where = "behind the first two of the last four stages; behind a quarter and half of the blocks of a ViT"
    cost = "training: one pass over a map for its statistics and one to change it (a sort for EFDMix); evaluation: none"
    works_with = "any backbone with maps or tokens; all other methods; checkpointing, but for domains"
    hurts = "where the style tells the classes apart; behind the last stage; batches of one"
    call_options = ("domains",)
    presets = presets_by_name(
        *(
            Preset(name=n, options=o, source=f"release, github.com/{source}", training=Training(**training))
            for n, source, o, training in PRESETS
        )
    )

    stages: int = 2
    alpha: float = 0.1
    mix: Literal["random", "crossdomain"] = "random"
    match: Literal["moments", "histogram"] = "moments"

    def __post_init__(self, layer: SiteSpec | None) -> None:
        super().__post_init__(layer)
        check_count(self, "stages")
        check_positive(self, "alpha")

    def default_sites(self, backbone: Backbone) -> list[Site]:
        """Return the first of the last four stages, without the very last."""
        stages = backbone.main_stages()
        return stages[: min(self.stages, max(1, len(stages) - 1))]

    def change(self, x: Tensor, run: PassView) -> Tensor:
        """Mix the styles of maps (B, C, *positions) with those of partners."""
        partner = draws.permutation(len(x), x.device) if self.mix == "random" else self._across(x, run)
        return MIXES[self.match](x, partner, draws.ratios(len(x), self.alpha, x.device))

    def _across(self, x: Tensor, run: PassView) -> Tensor:
        """Draw the number of an image of another domain for each; its own where there is none."""
        try:
            domains = torch.as_tensor(run.options.get("domains"), device=x.device)
        except (TypeError, ValueError, RuntimeError):  # nothing, names, or lists of several lengths
            domains = torch.empty(0, 0)
        if domains.shape != x.shape[:1]:
            raise TargetError(
                f"{run.graft!r} mixes across domains; the call gave shape {tuple(domains.shape)} for {len(x)} images.\n"
                'Pass one number per image: model(x, target=y, domains=d), or use mix="random".'
            )
        if domains.is_floating_point():  # NaN would be of another domain than itself
            raise TargetError(
                f"{run.graft!r} mixes across domains, and was given {domains.dtype} for them.\n"
                "A domain is a whole number.\nPass domains=d.long()."
            )
        scores = torch.rand(len(x), len(x), dtype=torch.float32, device=x.device)
        return scores.where(domains[:, None] != domains, torch.eye(len(x), device=x.device) - 2).argmax(1)

    def describe(self, graft: Graft) -> str:
        """Say what is mixed, where, and how often."""
        return f"mixes {self.match} ({self.mix}) {super().describe(graft)}"

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show two images in each other's style, by shares of their own."""
        images, partner, mix = view.images[:2], torch.tensor([1, 0]), MIXES[self.match]
        shown = {own: mix(images, partner, torch.full((2,), own)).clamp(0, 1) for own in (1.0, 0.5, 0.0)}
        rows = [[Panel(f"{own:.0%} of its own style", x[i]) for own, x in shown.items()] for i in (0, 1)]
        return Picture(rows, f"two images whose {self.match} are mixed, as if it were done to pixels")
