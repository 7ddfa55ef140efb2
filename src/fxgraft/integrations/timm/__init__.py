"""Grafts in training scripts of timm that know nothing of fxgraft."""
