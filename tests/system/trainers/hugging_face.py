"""Image classifiers of transformers with random weights, so small that they train in no time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from models.toys import LABELS, images

SIDE = 32
HEADS = {"num_labels": 5, "image_size": SIDE}
CONFIGS: dict[str, Any] = {
    "resnet": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    ),
    "vit": ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        patch_size=8,
        **HEADS,
    ),
    "swin": SwinConfig(patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, **HEADS),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_labels=5),
}


def classifier(name: str) -> nn.Module:
    """One of them, the same every time."""
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(CONFIGS[name]).train()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return images(size=SIDE, seed=seed), LABELS
