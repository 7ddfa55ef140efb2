"""CutMix as a method, to compare with: images mixed in front of an otherwise bare network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import fxgraft
from fxgraft import extend

IMAGES = "images"


@fxgraft.register("cutmix")
@dataclass(frozen=True, kw_only=True)
class CutMix(extend.Patch):
    """Paste a box of another image of the batch into an image, in training, and share the label out by area.

    Args:
        p: probability that an image is mixed, a coin for each.
    """

    title = "CutMix"
    paper = "Yun, Han, Oh, Chun, Choe, Yoo: CutMix. ICCV 2019"
    url = "https://arxiv.org/abs/1905.04899"
    where = "the images"
    cost = "training: one pass over the images; evaluation: none"
    train_only = True
    needs_labels = True
    pairs_labels = "mixes images again in every pass"

    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        extend.check_share(self, "p")

    def place(self, backbone: extend.Backbone, make: extend.Make) -> Iterator[extend.Placement]:
        """Put one unit in front of the model."""
        yield backbone.before(make(IMAGES, MixedImages, self), IMAGES, evaluation=False)

    def criterion(self, graft: extend.Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Judge a training pass by the labels that it mixed."""

        def mixed(out: Tensor, y: Any) -> Tensor:
            labels = graft.recall(out)
            return criterion(out, y if labels is None else labels.soft(out.shape[1]))

        return mixed


class MixedImages(extend.Unit):
    """Mixes the images of a training pass."""

    def __init__(self, config: CutMix) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """Return mixed images (B, C, H, W)."""
        run = self.current
        if run is None or not run.training:
            return x
        images, labels = fxgraft.mixmo.input_cutmix(x, run.labels(len(x)), p=self.config.p)
        run.remember(labels)
        return images
