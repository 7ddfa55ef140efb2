"""MixMo (Ramé, Sun, Cord, ICCV 2021), and MIMO (Havasi et al., ICLR 2021), its mixing by sums."""

from fxgraft.patches.mixmo.patch import MixMo

__all__ = ["MixMo"]
