"""Representation Self-Challenging (Huang, Wang, Xing, Huang, ECCV 2020)."""

from fxgraft.patches.rsc.patch import RSC, record

__all__ = ["RSC", "record"]
