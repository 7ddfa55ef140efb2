"""Wide residual networks for 32-pixel images (Zagoruyko and Komodakis, BMVC 2016), with a stem of stride 1."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions behind their norms and activations, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        ahead = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(ahead)
        return self.conv2(self.act2(self.bn2(self.conv1(ahead)))) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width.

    Args:
        depth: 6 n + 4, with n blocks in each of three stages.
        width: factor on 16, 32 and 64 channels.
        classes: outputs.
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        channels = [16, *(width * each for each in (16, 32, 64))]
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        stages = [
            nn.Sequential(
                *(
                    Block(
                        channels[stage] if first else channels[stage + 1],
                        channels[stage + 1],
                        stride if first else 1,
                    )
                    for first in (True, *[False] * (blocks - 1))
                )
            )
            for stage, stride in enumerate((1, 2, 2))
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.norm = nn.BatchNorm2d(channels[-1])
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, 3, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.pool(self.act(self.norm(x))).flatten(1))
