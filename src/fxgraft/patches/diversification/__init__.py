"""Diversification block and gradient-boosting loss (Sun, Cholakkal, Khan, Khan, Shao, AAAI 2020)."""

from fxgraft.patches.diversification.loss import (
    GradientBoostingCrossEntropy,
    gradient_boosting_cross_entropy,
)
from fxgraft.patches.diversification.patch import (
    Diversification,
    DiversificationRecord,
    DiversificationUnit,
    WithMaps,
    maps,
    record,
)

__all__ = [
    "Diversification",
    "DiversificationRecord",
    "DiversificationUnit",
    "GradientBoostingCrossEntropy",
    "WithMaps",
    "gradient_boosting_cross_entropy",
    "maps",
    "record",
]
