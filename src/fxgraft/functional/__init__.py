"""Tensor functions that several methods share: no model, no module, no state."""
