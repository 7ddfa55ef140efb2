"""Deep activation matching (Huang, Huang, Krähenbühl, ECCV 2018)."""

from fxgraft.patches.gam.patch import GAM
from fxgraft.patches.gam.step import discriminators, source

__all__ = ["GAM", "discriminators", "source"]
