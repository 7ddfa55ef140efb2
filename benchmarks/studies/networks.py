"""The networks of the studies: ImageNet weights out of a package, and small networks for small images."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.io.packaged_weights import packaged_model


def lite0(num_classes: int | None, **options: Any) -> nn.Module:
    """Build timm's EfficientNet-Lite0 with ImageNet weights, and a new classifier if asked; for images in [-1, 1].

    Args:
        num_classes: outputs of the new classifier; None keeps the one of ImageNet's 1000 classes.
        options: of ``timm.create_model``, such as ``output_stride=16``.

    Raises:
        ConfigError: the package is not installed, or holds other weights.
    """
    model = packaged_model(**options)
    if num_classes is not None:
        model.reset_classifier(num_classes)  # pyright: ignore[reportCallIssue]
    return model


_maps: dict[bytes, Tensor] = {}


class FrozenMaps(nn.Module):
    """The last map of a frozen network, computed once for each image in a process.

    Args:
        network: with `forward_features`; stays in evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenMaps:
        """Keep the network as it was trained."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (B, C, h, w) of images (B, 3, H, W), kept in half precision; maps are returned as they are."""
        if x.shape[1] != 3:
            return x
        if x.is_meta or type(x) is not Tensor:  # shapes alone are asked for
            return self.network.forward_features(x)  # type: ignore[operator]
        keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in x.cpu()]
        new = [index for index, key in enumerate(keys) if key not in _maps]
        if new:
            with torch.no_grad():
                found = self.network.forward_features(x[new])  # type: ignore[operator]
            _maps.update(zip([keys[index] for index in new], found.half().cpu(), strict=True))
        return torch.stack([_maps[key] for key in keys]).to(x)


class FrozenLite0(nn.Module):
    """A new classifier on the maps of a frozen EfficientNet-Lite0 at stride 16."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        network = lite0(num_classes, output_stride=16)
        self.pretrained_cfg = network.pretrained_cfg
        self.maps = FrozenMaps(network)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 3, H, W)."""
        return self.fc(self.pool(self.maps(x)).flatten(1))


class LeNet(nn.Module):
    """The LeNet of the releases of activation matching, on the first channel of images (B, 3, 28, 28).

    Args:
        num_classes: outputs.
        norms: BatchNorm behind each convolution, which the release does not have.
    """

    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

    def __init__(self, num_classes: int, norms: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.norm1 = nn.BatchNorm2d(20) if norms else nn.Identity()
        self.norm2 = nn.BatchNorm2d(50) if norms else nn.Identity()
        self.pool, self.act = nn.MaxPool2d(2), nn.ReLU()
        self.fc3 = nn.Sequential(nn.Linear(800, 500), nn.ReLU())
        self.fc4 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        x = self.pool(self.act(self.norm1(self.conv1(x[:, :1]))))
        x = self.pool(self.act(self.norm2(self.conv2(x))))
        return self.fc4(self.fc3(x.flatten(1)))


class Block(nn.Module):
    """Two convolutions behind their norms and activations, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        ahead = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(ahead)
        return self.conv2(self.act2(self.bn2(self.conv1(ahead)))) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width for images of 32 pixels (Zagoruyko and Komodakis, BMVC 2016).

    Args:
        num_classes: outputs.
        depth: 6 n + 4, with n blocks in each of three stages.
        width: factor on 16, 32 and 64 channels.
        stride: of the stem; the paper's is 1.
    """

    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

    def __init__(self, num_classes: int, depth: int = 10, width: int = 1, stride: int = 1) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        channels = [16, *(width * each for each in (16, 32, 64))]
        self.conv1 = nn.Conv2d(3, 16, 3, stride, 1, bias=False)
        stages = []
        for inputs, outputs, first in zip(channels, channels[1:], (1, 2, 2), strict=False):
            rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(Block(inputs, outputs, first), *rest))
        self.layer1, self.layer2, self.layer3 = stages
        self.norm, self.act = nn.BatchNorm2d(channels[-1]), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 3, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.pool(self.act(self.norm(x))).flatten(1))
