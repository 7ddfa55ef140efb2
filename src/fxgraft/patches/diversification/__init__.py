"""Diversification block and gradient-boosting loss (Sun, Cholakkal, Khan, Khan, Shao, AAAI 2020)."""

from fxgraft.patches.diversification.patch import Diversification, maps, record

__all__ = ["Diversification", "maps", "record"]
