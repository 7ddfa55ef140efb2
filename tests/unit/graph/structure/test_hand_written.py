"""Default places on networks as users write them: functions between modules, heads of functions, and features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxgraft

SIZE = (3, 32, 32)


def where(model: nn.Module, method: str, size: tuple[int, ...] = SIZE, **options: Any) -> list[str]:
    return list(fxgraft.grafts(fxgraft.patch(model, method, input_size=size, **options))[0].units)


class Extractor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.fc = Extractor(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.f(x).mean((2, 3)))


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.weight = Extractor(), nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(self.f(x).mean((2, 3))), F.normalize(self.weight))


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class SumsInTheRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.one, self.two, self.fc = Branch(8), Branch(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(x))
        x = F.relu(x + self.one(x))
        x = F.relu(self.d(x))
        x = F.relu(x + self.two(x))
        return self.fc(x.mean((2, 3)))


def layer(inputs: int, width: int, pool: bool = False) -> nn.Module:
    parts = [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, *([nn.MaxPool2d(2)] if pool else []))


class ResNet9(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = layer(3, 8), layer(8, 16, pool=True)
        self.res1 = nn.Sequential(layer(16, 16), layer(16, 16))
        self.conv3, self.conv4 = layer(16, 32, pool=True), layer(32, 64, pool=True)
        self.res2 = nn.Sequential(layer(64, 64), layer(64, 64))
        self.classifier = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        x = self.res1(x) + x
        x = self.conv4(self.conv3(x))
        return self.classifier(self.res2(x) + x)


class Block(nn.Module):
    """Of a CIFAR ResNet; ``closed`` reads a size, which no trace follows."""

    def __init__(self, inputs: int, width: int, stride: int = 1, closed: bool = False) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.c2, self.b2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        plain = stride == 1 and inputs == width
        self.shortcut = nn.Sequential() if plain else nn.Conv2d(inputs, width, 1, stride)
        self.closed = closed

    def forward(self, x: Tensor) -> Tensor:
        if self.closed:
            len(x)
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.shortcut(x))


class CifarResNet(nn.Module):
    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16))
        self.layer3 = nn.Sequential(Block(16, 32, 2), Block(32, 32))
        self.layer4 = nn.Sequential(Block(32, 64, 2), Block(64, 64))
        self.linear = nn.Linear(64, 5) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


def of_convolutions() -> nn.Module:
    """Its classifier is a convolution in front of the average."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 5, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    ("model", "method", "expected"),
    [
        (Linear, "rsc", ["f"]),
        (Linear, "mixstyle", ["f.relu"]),
        (Linear, "dsu", ["f.c1", "f.relu", "f"]),
        (Cosine, "rsc", ["f"]),
        (SumsInTheRoot, "mixstyle", ["relu_1"]),
        (SumsInTheRoot, "dsu", ["c", "relu_1", "relu_3"]),
        (SumsInTheRoot, "rsc", ["relu_3"]),
        (ResNet9, "rsc", ["add_1"]),
        (ResNet9, "dsu", ["conv1.0", "conv1", "add", "conv3", "add_1"]),
        (CifarResNet, "rsc", ["layer4"]),
        (CifarResNet, "mixstyle", LAYERS[:2]),
        (CifarResNet, "dsu", ["conv1", "relu", *LAYERS]),
        (lambda: CifarResNet(nn.Identity()), "dsu", ["conv1", "relu", *LAYERS]),
        (of_convolutions, "rsc", ["3"]),
        (of_convolutions, "dsu", ["0", "1", "3"]),
    ],
)
def test_places(model: Callable[[], nn.Module], method: str, expected: list[str]) -> None:
    assert where(model(), method) == expected


@pytest.mark.parametrize(
    ("name", "head", "last"),
    [
        ("resnet18", "fc", "layer4"),
        ("regnet_y_400mf", "fc", "trunk_output"),
        ("shufflenet_v2_x0_5", "fc", "conv5"),
        ("swin_t", "head", "features"),
    ],
)
def test_a_backbone_without_its_classifier_has_the_same_stages(name: str, head: str, last: str) -> None:
    model = torchvision.models.get_model(name)
    whole = where(model, "dsu", (3, 64, 64))
    setattr(fxgraft.unpatch(model), head, nn.Identity())
    assert where(model, "dsu", (3, 64, 64)) == whole
    assert whole[-1] == last


def test_a_classifier_of_training_alone() -> None:
    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = timm.create_model("test_resnet", num_classes=0, global_pool="")
            self.neck, self.fc = nn.BatchNorm1d(96), nn.Linear(96, 5)

        def forward(self, x: Tensor) -> Tensor:
            features = self.neck(self.b(x).mean((2, 3)))
            return self.fc(features) if self.training else features

    assert where(Neck(), "dsu", (3, 64, 64))[-3:] == ["b.layer2", "b.layer3", "b"]


def test_in_front_of_the_first_stage_is_in_front_of_its_first_block() -> None:
    model = torchvision.models.mobilenet_v2()
    assert where(model, "dsu", (3, 64, 64))[:3] == ["features.0.0", "features.1", "features.3"]


def test_the_logit_of_the_label_is_not_what_is_muted() -> None:
    model = fxgraft.patch(of_convolutions(), "rsc", scope="channel", batch_share=1.0, input_size=SIZE).train()
    logits = model(torch.randn(4, *SIZE), target=torch.arange(4))
    assert bool((logits.diagonal() != 0).all())


@pytest.mark.parametrize("method", ["crossnorm", "selfnorm"])
def test_blocks_that_no_trace_follows_are_told(method: str) -> None:
    def built(closed: bool) -> nn.Module:
        blocks = [Block(8, 8, closed=closed) for _ in range(2)]
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    model = fxgraft.patch(built(closed=True), method, input_size=SIZE)
    assert "2 modules cannot be looked into, and may be residual blocks" in str(fxgraft.summary(model))
    model = fxgraft.patch(built(closed=False), method, input_size=SIZE)
    assert "2 units (post)" in str(fxgraft.summary(model))


def test_a_parameter_that_is_read_in_front_of_the_pooling_and_behind_it() -> None:
    class GeM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.p = (
                nn.Conv2d(3, 8, 3, 2, 1),
                nn.Linear(8, 5),
                nn.Parameter(torch.ones(1) * 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x)).clamp(min=1e-6).pow(self.p)
            return self.fc(F.avg_pool2d(x, (x.size(-2), x.size(-1))).pow(1 / self.p).flatten(1))

    model = fxgraft.patch(GeM(), "diversification", input_size=SIZE).train()
    assert "not exact: pow() between pooling and classifier" in str(fxgraft.summary(model))
    assert model(torch.randn(2, *SIZE)).shape == (2, 5)
