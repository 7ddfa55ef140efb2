"""Networks of clips and volumes: the twin of an image network that sees an image as a volume of depth one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from models.toys import CLASSES


def as_volumes(model: nn.Module) -> nn.Module:
    """Make the same network over (B, C, 1, H, W): its convolutions, norms and pools get a depth, of one."""
    twin = copy.deepcopy(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            sizes = {
                name: (first, *getattr(layer, name))
                for name, first in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
            }
            channels = layer.in_channels, layer.out_channels
            new: Any = nn.Conv3d(*channels, groups=layer.groups, bias=layer.bias is not None, **sizes)
            state = {name: tensor.detach() for name, tensor in layer.named_parameters()}
            state["weight"] = state["weight"].unsqueeze(2)
            new.load_state_dict(state)
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm3d(layer.num_features)
            new.load_state_dict(layer.state_dict())
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            new = nn.AdaptiveAvgPool3d(1)
        else:
            continue
        twin.set_submodule(path, new.train(layer.training))
    return twin


class VideoNet(nn.Module):
    """Two strided convolutions over time and space, an average and a linear layer."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, channels, 3, stride=(1, 2, 2), padding=1)
        self.norm = nn.BatchNorm3d(channels)
        self.layer1 = nn.Sequential(nn.Conv3d(channels, 2 * channels, 3, padding=1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(2 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.norm(self.stem(x)).relu())
        return self.fc(self.pool(x).flatten(1))


def video_net() -> VideoNet:
    """The same network every time; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VideoNet()


def clips(batch: int = 4, frames: int = 4, size: int = 12, seed: int = 0) -> Tensor:
    """A batch of clips, the same one for the same seed."""
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))
