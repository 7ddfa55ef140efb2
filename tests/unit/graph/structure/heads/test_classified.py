"""What counts as logits: what a classifier gives. Features of a part are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import fxgraft
from models.toys import LABELS, images, net

SIZE = (3, 32, 32)


class Norm(nn.Module):
    """Tokens' norm and a class token, as vision transformers without a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).flatten(2).transpose(1, 2)).mean(1)


class Embedding(nn.Module):
    """Ends in a layer with weights, as projections and convolutions of channels do, in front of a classifier."""

    def __init__(self, end: str, classes: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.project = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.embed, self.end = nn.Linear(8, 16), end
        if classes is not None:
            self.num_classes = classes

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x).relu()
        if self.end == "conv":
            return self.project(z).mean((2, 3))
        z = self.embed(z.mean((2, 3)))
        return z.tanh() if self.end == "tanh" else z


class Classified(nn.Module):
    def __init__(self, end: str) -> None:
        super().__init__()
        self.encoder, self.head = Embedding(end), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def headless() -> nn.Module:
    model = net()
    model.fc = nn.Identity()
    return model


def torchvision_headless() -> nn.Module:
    model = resnet18()
    model.fc = nn.Identity()
    return model


FEATURES: dict[str, Any] = {
    "timm": (lambda: timm.create_model("test_resnet", num_classes=0), "layer4"),
    "timm tokens": (lambda: timm.create_model("test_vit", num_classes=0, dynamic_img_size=True), "blocks.0"),
    "timm convnext": (lambda: timm.create_model("test_convnext", num_classes=0), "stages.3"),
    "torchvision": (torchvision_headless, "layer4"),
    "own": (headless, "stage2"),
    "norm": (Norm, "conv"),
    "a projection": (lambda: Embedding("linear", classes=0), "conv"),
    "a convolution": (lambda: Embedding("conv", classes=0), "conv"),
    "a bounded projection": (lambda: Embedding("tanh"), "conv"),
}


@pytest.mark.parametrize("case", FEATURES)
def test_features_are_refused(case: str) -> None:
    make, layer = FEATURES[case]
    model = make()
    kind = type(model)
    message = r"returns features(?s:.*)Patch the whole model(?s:.*)output="
    with pytest.raises(fxgraft.StructureError, match=message):
        fxgraft.patch(model, "rsc", layer=layer, input_size=SIZE)
    with pytest.raises(fxgraft.StructureError, match=message):
        fxgraft.patch(model, "crossnorm", layers=layer, consistency=True, input_size=SIZE)
    assert type(model) is kind


@pytest.mark.parametrize("end", ["linear", "conv"])
def test_a_part_that_looks_like_a_classifier_is_refused_where_the_loss_is_for_another(end: str) -> None:
    model = Classified(end)
    fxgraft.patch(model.encoder, "rsc", layer="conv", input_size=SIZE)
    with fxgraft.targets(LABELS):
        out = model(images(size=32))
    with pytest.raises(
        fxgraft.StructureError, match=r"part 'encoder' took the labels(?s:.*)\(4, 16\)(?s:.*)\(4, 4\)"
    ):
        fxgraft.loss(model, out, LABELS)
    part = Classified(end).encoder
    fxgraft.patch(part, "rsc", layer="conv", input_size=SIZE)
    assert fxgraft.loss(part, part(images(size=32), target=LABELS), LABELS).isfinite()


def test_a_part_is_refused_and_the_whole_is_not() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = headless()
            self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x))

    model = Whole()
    with pytest.raises(fxgraft.StructureError, match=r"returns features \(2, 16\)"):
        fxgraft.patch(model.encoder, "rsc", layer="stage2", input_size=SIZE)
    fxgraft.patch(model, "rsc", layer="encoder.stage2", input_size=SIZE)
    assert model(images(), target=LABELS).shape == (4, 4)


class Ends(nn.Module):
    """A body and some end."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.body, self.end = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return (self.a(x) + self.b(x)) / 2


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.normalize(x.mean((2, 3)), dim=1)
        return 16 * (x @ nn.functional.normalize(self.weight, dim=1).t())


LOGITS: dict[str, Any] = {
    "two heads": Two,
    "cosine": Cosine,
    "class maps": lambda: nn.Sequential(nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "segmentation": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.Upsample(scale_factor=2)),
    "probabilities": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.Softmax(1)
    ),
}


@pytest.mark.parametrize("end", LOGITS)
def test_what_a_classifier_gives_is_taken(end: str) -> None:
    fxgraft.patch(Ends(LOGITS[end]()), "rsc", layer="body", input_size=SIZE)


def test_what_declares_its_classes_is_taken_by_its_word() -> None:
    end = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Ends(end)
    with pytest.raises(fxgraft.StructureError, match=r"set model\.num_classes = 4"):
        fxgraft.patch(model, "rsc", layer="body", input_size=SIZE)
    model.num_classes = 4
    fxgraft.patch(model, "rsc", layer="body", input_size=SIZE)
