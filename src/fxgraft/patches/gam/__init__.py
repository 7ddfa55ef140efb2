"""Deep activation matching (Huang, Huang, Krähenbühl, ECCV 2018)."""

from fxgraft.patches.gam.discriminator import ByTap, Discriminator
from fxgraft.patches.gam.patch import GAM
from fxgraft.patches.gam.step import GAMStep, discriminators, gam_losses, source

__all__ = ["GAM", "ByTap", "Discriminator", "GAMStep", "discriminators", "gam_losses", "source"]
