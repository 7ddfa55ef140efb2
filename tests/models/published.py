"""Small networks of the structure that the releases train: as deep as theirs, of a few channels, with pooling to one.

The places where a method acts are written into the forward as ``self.at(place, x)``. In a bare network that is ``x``;
a reference has units there, see `Placed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Placed(nn.Module):
    """A block with places for units."""

    unit: Callable[[str, Tensor], Tensor] | None = None

    def at(self, place: str, x: Tensor) -> Tensor:
        """What the unit makes of the value at a place of the block."""
        return x if self.unit is None else self.unit(place, x)


def places(model: nn.Module) -> Iterator[Placed]:
    """The blocks of a network with places for units, in running order."""
    yield from (each for each in model.modules() if isinstance(each, Placed))


class PreActivated(Placed):
    """A block of a wide residual network: norms in front, no activation behind the sum."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut = None if inner == outer else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            x = self.relu1(self.bn1(x))
        out = self.at("pre", x)
        if self.shortcut is None:
            out = self.relu1(self.bn1(out))
        out = self.conv2(self.relu2(self.bn2(self.conv1(out))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return self.at("post", torch.add(x, self.at("residual", out)))


class WideResNet(nn.Module):
    """Three groups of pre-activated blocks; WRN-40 has six in each."""

    def __init__(self, classes: int, blocks: int = 6, width: int = 2) -> None:
        super().__init__()
        widths = (2, 2 * width, 3 * width, 4 * width)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            *(
                PreActivated(widths[g if b == 0 else g + 1], widths[g + 1], 2 if g > 0 and b == 0 else 1)
                for g in range(3)
                for b in range(blocks)
            )
        )
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn1(self.blocks(self.conv1(x)))).mean((2, 3)))


class Bottleneck(Placed):
    """Three convolutions, a projected shortcut where the size changes, a ReLU behind the sum.

    ``overwrites``: what acts at "pre" takes the place of the block's input, so that a projection sees it, too.
    ``instance``: an InstanceNorm between the sum and the ReLU.
    """

    def __init__(
        self,
        inner: int,
        outer: int,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        instance: bool = False,
    ) -> None:
        super().__init__()
        middle = max(4, outer // 2)
        self.conv1 = nn.Conv2d(inner, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.instance = nn.InstanceNorm2d(outer, affine=True) if instance else None
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inner != outer:
            self.downsample = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.at("pre_with_projection", x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.at("residual", self.bn3(self.conv3(out)))
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out = self.at("post", out + shortcut)
        out = out if self.instance is None else self.instance(out)
        return self.at("output", self.relu(out))


class ResNeXt(nn.Module):
    """Three groups of bottlenecks with grouped convolutions; ResNeXt-29 has three in each."""

    def __init__(self, classes: int, cardinality: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        widths = (4, 8, 8, 16)
        self.blocks = nn.Sequential(
            *(
                Bottleneck(
                    widths[g if b == 0 else g + 1], widths[g + 1], 2 if g > 0 and b == 0 else 1, cardinality
                )
                for g in range(3)
                for b in range(3)
            )
        )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.fc(self.blocks(x).mean((2, 3)))


class ResNet(nn.Module):
    """Sixteen bottlenecks, as ResNet-50 has; with InstanceNorm as IBN-b has it, or dilated and with maps as output."""

    def __init__(self, classes: int, ibn: bool = False, maps: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.InstanceNorm2d(4, affine=True) if ibn else nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.maps = maps
        inner, blocks = 4, []
        for group, (count, outer) in enumerate(zip((3, 4, 6, 3), (4, 8, 8, 12), strict=True)):
            for b in range(count):
                dilation = 2 ** (group - 1) if maps and group > 1 else 1
                stride = 2 if b == 0 and group > 0 and dilation == 1 else 1
                instance = ibn and group < 2 and b == count - 1
                blocks.append(Bottleneck(inner, outer, stride, 1, dilation, instance))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inner, classes) if not maps else nn.Conv2d(inner, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        if self.maps:
            return F.interpolate(self.fc(x), scale_factor=8, mode="bilinear", align_corners=False)
        return self.fc(x.mean((2, 3)))


class DenseLayer(Placed):
    """Norm, ReLU and one convolution, or two, whose channels are concatenated with the layer's input."""

    def __init__(self, inner: int, growth: int, bottleneck: bool = False) -> None:
        super().__init__()
        middle = 2 * growth if bottleneck else growth
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), nn.Conv2d(inner, middle, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle) if bottleneck else None
        self.conv2 = nn.Conv2d(middle, growth, 3, 1, 1, bias=False) if bottleneck else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("conv1_pre", x)
        out = self.at("conv1_post", self.conv1(F.relu(self.bn1(x))))
        if self.bn2 is not None and self.conv2 is not None:
            out = self.at("conv2_post", self.conv2(F.relu(self.bn2(out))))
        return torch.cat((x, out), 1)


class Transition(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """Three groups of dense layers with transitions; DenseNet-40 has twelve in each."""

    def __init__(self, classes: int, layers: int = 12, growth: int = 2, bottleneck: bool = False) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, 2 * growth, 3, 1, 1, bias=False)]
        channels = 2 * growth
        for group in range(3):
            for _ in range(layers):
                parts.append(DenseLayer(channels, growth, bottleneck))
                channels += growth
            parts += [Transition(channels)] if group < 2 else []
        self.features = nn.Sequential(*parts)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn1(self.features(x))).mean((2, 3)))


class GELU(nn.Module):
    """The activation as the release of AllConv writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(1.702 * x) * x


class ConvNormAct(Placed):
    def __init__(self, inner: int, outer: int, size: int, padding: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inner, outer, size, padding=padding), nn.BatchNorm2d(outer)
        self.act = GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.at("conv", self.conv(x))))


class AllConv(nn.Module):
    """Nine convolutions, two of them 1×1, with pooling and dropout between."""

    def __init__(self, classes: int) -> None:
        super().__init__()

        def pooled() -> list[nn.Module]:
            return [nn.MaxPool2d(2), nn.Dropout(0.5)]

        self.features = nn.Sequential(
            *(ConvNormAct(i, 4, 3, 1) for i in (3, 4, 4)),
            *pooled(),
            *(ConvNormAct(i, 6, 3, 1) for i in (4, 6, 6)),
            *pooled(),
            ConvNormAct(6, 6, 3, 0),
            ConvNormAct(6, 6, 1, 1),
            ConvNormAct(6, 6, 1, 1),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
