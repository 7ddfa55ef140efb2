"""CrossNorm (Tang, Gao, Zhu, Zhang, Li, Metaxas, ICCV 2021)."""

from fxgraft.patches.crossnorm.patch import CrossNorm

__all__ = ["CrossNorm"]
