"""Tensor functions that several methods share: no model, no module, no state."""

from fxgraft.functional.divergence import jensen_shannon as jensen_shannon

__all__ = ["jensen_shannon"]
