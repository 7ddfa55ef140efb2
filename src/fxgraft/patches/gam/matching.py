"""Gaussian matching as a part of the target network: a shift and a scale per channel at each tap.

    x' = (x − μ_t) / σ_t · σ_s + μ_s

with the moments of source and target activations there (section 3 of the paper). The rest of the network and the
discriminators see x'. In a step of the game the moments are those of the two batches, or running averages. Everywhere
else, as in evaluation, they are the running averages: a deployed network has a fixed scale and shift.
Before the first step both domains count as one, and x' is x.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxgraft.extend import Absorber, Tap
from fxgraft.patches.gam import tensors as core


@dataclass
class Matching:
    """The request of a game's step to the taps, and their answer.

    Attributes:
        sources: activations of the source network, by tap.
        moved: the running moments after the step, by tap; written to the taps once the pass came through.
    """

    sources: dict[str, Tensor]
    moved: dict[str, Tensor] = field(default_factory=dict)


class SwitchedTap(Tap):
    """A tap that records only in passes inside ``graft.override(listen=True)``."""

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        run = self.current
        if run is None or not run.asked("listen"):
            return x
        run.check_images_alone(
            "Positions that are padding would be matched and told apart.", all_positions=True
        )
        return super().forward(x)


class MatchedTap(SwitchedTap):
    """Matches the target's channel moments to the source's, and records the result as `SwitchedTap` does.

    Args:
        key: the name its value is fetched by.
        detach: cut what is recorded off the graph.
        channels: C.
        running: whether steps of the game match by running averages too, instead of by the batches' moments.
        momentum: share of a step in the averages, once 1/momentum steps were averaged evenly.
        eps: added to variances.
    """

    dim: int
    absorber: Absorber | None
    steps: Tensor
    moments: Tensor

    def __init__(
        self,
        key: str,
        detach: bool,
        *,
        channels: int,
        running: bool,
        momentum: float,
        eps: float,
        like: Tensor,
    ) -> None:
        super().__init__(key, detach)
        self.running_only, self.momentum, self.eps = running, momentum, eps
        wide = torch.promote_types(like.dtype, torch.float32)
        self.register_buffer("steps", torch.zeros((), device=like.device))
        # Source and target, each with mean and variance.
        moments = torch.tensor([0.0, 1.0], device=like.device, dtype=wide).view(1, 2, 1)
        self.register_buffer("moments", moments.repeat(2, 1, channels))

    def forward(self, x: Any) -> Any:
        """Return ``x``, shaped as it is, matched."""
        run = self.current
        matching: Matching | None = None if run is None else run.asked("matching")
        return super().forward(self.fixed(x, self.moments) if matching is None else self.matched(x, matching))

    def fixed(self, x: Tensor, moments: Tensor) -> Tensor:
        """Match by running moments: one multiplication and one addition."""
        shape = [1] * x.ndim
        shape[self.dim] = -1
        scale, shift = (part.view(shape) for part in self.affine(moments))
        return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)

    def affine(self, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift of every channel, (C,) each, by running moments; by default the tap's."""
        source, target = (self.moments if moments is None else moments).unbind()
        scale = ((source[1] + self.eps) / (target[1] + self.eps)).sqrt()
        return scale, source[0] - target[0] * scale

    def matched(self, x: Tensor, matching: Matching) -> Tensor:
        """Match the activations of the target network in a step of the game."""
        source = matching.sources[self.key]
        weight = (1 / (self.steps + 1)).clamp_min(self.momentum).to(self.moments.dtype)
        moved = torch.stack(
            [
                core.update_moments(before, maps, weight, self.dim)
                for before, maps in zip(self.moments, (source, x), strict=True)
            ]
        )
        matching.moved[self.key] = moved
        if self.running_only:
            return self.fixed(x, moved)
        moments = core.channel_moments(source, self.dim, eps=self.eps)
        return core.gaussian_match(x, *moments, dim=self.dim, eps=self.eps)

    @torch.no_grad()
    def move(self, matching: Matching) -> None:
        """Take over the running moments after a step."""
        self.moments.copy_(matching.moved[self.key])
        self.steps.add_(1)

    @property
    def trained(self) -> bool:
        """Whether there was a step of the game, so that the scale and the shift are other than 1 and 0."""
        return bool(self.steps)
