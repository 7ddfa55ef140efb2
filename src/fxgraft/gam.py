"""What belongs to GAM alone: the losses of a step of one's own, and what `fxgraft.adapt` returns."""

from fxgraft.adaptation.loop import AdaptationHistory
from fxgraft.patches.gam.step import gam_losses

__all__ = ["AdaptationHistory", "gam_losses"]
