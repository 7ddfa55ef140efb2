"""Random backbones, batches and stacks of RSC for the property tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fxgraft
from models.other_models import ChannelsLast, Dense, Tokens

CLASSES = 4
TIMM = {
    "test_resnet": ("layer2", "layer4", "layer4.0.act1", "global_pool"),
    "test_vit": ("blocks.0", "blocks.3", "patch_embed", "blocks.2.mlp"),
    "test_efficientnet": ("blocks.0", "conv_stem", "blocks.3", "global_pool"),
    "test_convnext": ("stages.0", "stages.3", "stages.2.blocks.0", "norm_pre"),
}


class Block(nn.Module):
    """One convolution with norm and activation, residual or not, in place or not."""

    def __init__(self, width: int, norm: str, residual: bool, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = {"batch": nn.BatchNorm2d(width), "group": nn.GroupNorm(2, width), "none": nn.Identity()}[
            norm
        ]
        self.act = nn.ReLU(inplace=inplace)
        self.residual = residual
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        if self.residual and self.inplace:
            out += x
        elif self.residual:
            out = x + out
        return self.act(out)


class Random(nn.Module):
    """A stem, blocks, and one of three heads; dropout draws in training."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.head_kind = recipe.head
        self.stem = nn.Conv2d(3, recipe.width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            Block(recipe.width, recipe.norm, residual, recipe.inplace) for residual in recipe.residual
        )
        self.drop = nn.Dropout(0.2)
        self.pool = nn.AdaptiveAvgPool2d(2 if recipe.head == "grid" else 1)
        features = recipe.width * (4 if recipe.head == "grid" else 1)
        hidden = nn.Linear(features, features)
        self.hidden = nn.Sequential(hidden, nn.GELU()) if recipe.head == "mlp" else nn.Identity()
        self.fc = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.drop(self.hidden(self.pool(x).flatten(1))))


@dataclass(frozen=True)
class Recipe:
    """A backbone as data, so that the same one can be built twice.

    Attributes:
        name: a timm model, or '' for a random network of the other fields.
        kind: "maps" for `Random`; "dense", "tokens", "class token" or "channels last" for a network of `other_models`.
    """

    name: str = ""
    kind: str = "maps"
    width: int = 4
    residual: tuple[bool, ...] = (True,)
    norm: str = "batch"
    inplace: bool = False
    head: str = "linear"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    size: tuple[int, int] = (16, 16)

    def build(self) -> nn.Module:
        """The model, in training mode, the same one each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(self.name, num_classes=CLASSES) if self.name else self._random()
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(dtype=self.dtype).to(memory_format=layout)

    def _random(self) -> nn.Module:
        if self.kind == "maps":
            return Random(self)
        depth = len(self.residual)
        if self.kind in ("tokens", "class token"):
            return Tokens(self.width, depth, CLASSES, self.kind == "class token")
        return {"dense": Dense, "channels last": ChannelsLast}[self.kind](self.width, depth, CLASSES)

    def batch(self, images: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images in the recipe's dtype and layout, and labels."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(images, 3, *self.size, generator=g, dtype=torch.float64).to(self.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout), torch.randint(CLASSES, (images,), generator=g)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names to patch at, from early to late."""
        if self.name:
            return TIMM[self.name]
        if self.kind != "maps":
            return ("stem", *(f"blocks.{i}" for i in range(len(self.residual))), "norm")
        inner = [f"blocks.{i}{part}" for i in range(len(self.residual)) for part in ("", ".norm", ".conv")]
        # A pooled grid of a fixed size does not tell its layout.
        return ("stem", *inner, *([] if self.head == "grid" else ["pool"]))


KINDS = ("maps", "dense", "tokens", "class token", "channels last")


@st.composite
def recipes(draw: st.DrawFn, timm_share: int = 4, kinds: tuple[str, ...] = ("maps",)) -> Recipe:
    """Random networks of some kinds, and a tiny timm model once in `timm_share`."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    channels_last = draw(st.booleans())
    if timm_share and draw(st.integers(1, timm_share)) == timm_share:
        name = draw(st.sampled_from(sorted(TIMM)))
        size = (160, 160) if name == "test_vit" else (96, 64)
        return Recipe(name, dtype=dtype, channels_last=channels_last, size=size)
    return Recipe(
        kind=draw(st.sampled_from(kinds)),
        width=2 * draw(st.integers(1, 4)),
        residual=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=3))),
        norm=draw(st.sampled_from(["batch", "group", "none"])),
        inplace=draw(st.booleans()),
        head=draw(st.sampled_from(["linear", "mlp", "grid"])),
        dtype=dtype,
        channels_last=channels_last,
        size=(draw(st.integers(8, 20)), draw(st.integers(8, 20))),
    )


def _shares() -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0])


def options(site: st.SearchStrategy[str], scopes: tuple[str, ...] = ("both", "spatial", "channel")) -> Any:
    """Random settings of RSC at a site."""
    return st.fixed_dictionaries(
        {
            "layer": site,
            "scope": st.sampled_from(scopes),
            "strategy": st.sampled_from(["top_gradient", "top_activation", "random"]),
            "spatial_drop": _shares(),
            "channel_drop": _shares(),
            "batch_share": _shares(),
        }
    )


@st.composite
def stacks(draw: st.DrawFn, recipe: Recipe) -> list[dict[str, Any]]:
    """One to three settings of RSC, at different sites."""
    chosen = draw(st.lists(st.sampled_from(recipe.sites), min_size=1, max_size=3, unique=True))
    return [draw(options(st.just(site))) for site in chosen]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, list[dict[str, Any]]]:
    """A backbone and a stack for it."""
    recipe = draw(recipes())
    return recipe, draw(stacks(recipe))


def stacked(model: nn.Module, recipe: Recipe, stack: list[dict[str, Any]]) -> nn.Module:
    """Put a stack on a model, under the names g0, g1, ..."""
    for index, each in enumerate(stack):
        fxgraft.patch(model, "rsc", name=f"g{index}", input_size=(3, *recipe.size), **each)
    return model


def gradients(model: nn.Module) -> list[Tensor | None]:
    """The gradients of all parameters, copied."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(actual: Any, expected: Any) -> bool:
    """Whether two nests of tensors are equal to the bit, in shape, dtype and memory format."""
    if isinstance(expected, Tensor):
        return (
            actual.dtype == expected.dtype
            and actual.shape == expected.shape
            and actual.stride() == expected.stride()
            and torch.equal(actual, expected)
        )
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    return actual == expected
