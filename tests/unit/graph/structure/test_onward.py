"""Units whose positions no prediction reads are left out, however the tokens go on; all others reach the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn

import fxgraft
from fxgraft.graph.structure.heads.outputs import take_logits

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 4}


class Block(nn.Module):
    """An MLP in a residual block, with the class token's part handled in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.mix = nn.Linear(17, 17)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.mlp(x).mT).mT
        if self.how == "concatenated":
            return x + torch.cat((self.mlp(x[:, :1]), x[:, 1:]), 1)
        if self.how == "stacked":
            return x + torch.stack((self.mlp(x), self.mlp(x.tanh())), -1).mean(-1)
        if self.how == "rolled":
            return x + self.mlp(torch.cat((x[:, 1:], x[:, :1]), 1))
        return torch.cat((x[:, :1] + self.mlp(x[:, :1]), x[:, 1:]), 1)


class Tokens(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(*(Block(how) for _ in range(2)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = self.blocks(torch.cat((self.place.expand(x.shape[0], -1, -1), x), 1))
        return self.head(x[:, 0])


class Streams(nn.Module):
    """Two streams of residual blocks, of which the head reads one in the end."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = x + self.one(x), y + self.other(y)
            return x + y, y

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.last = nn.Conv2d(3, 4, 1), self.Pair(), self.Pair()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x, y = self.last(*self.first(x, x.tanh()))
        return self.head(y.mean((2, 3)))


@dataclass
class Fields:
    tokens: Tensor
    pooled: Tensor | None = None


class Pair(NamedTuple):
    tokens: Tensor
    first: Tensor


class Handing(nn.Module):
    """Tokens that go through a structure of a kind of its own before a class token is read."""

    class Encoder(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.blocks = Tokens("apart").blocks
            self.pooler = First()
            self.how = how

        def forward(self, x: Tensor) -> Any:
            x = self.blocks(x)
            if self.how == "dataclass":
                return Fields(x, pooled=self.pooler(x))
            if self.how == "named tuple":
                return Pair(first=self.pooler(x), tokens=x)
            if self.how == "dictionary":
                return {"tokens": x, "pooled": self.pooler(x)}
            return (x, (self.pooler(x), x))

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.encoder, self.read = self.Encoder(how), Reading(how)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        out = self.encoder(torch.cat((self.place.expand(x.shape[0], -1, -1), x), 1))
        return self.read(out.pooled if self.encoder.how == "dataclass" else out)


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class Reading(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.head, self.how = nn.Linear(8, 4), how

    def forward(self, x: Any) -> Tensor:
        if self.how == "named tuple":
            return self.head(x.first)
        if self.how == "dictionary":
            return self.head(x["pooled"])
        return self.head((x[:1] + x[1])[1] if self.how == "tuples" else x)


HANDING = ("dataclass", "named tuple", "dictionary", "tuples")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY |= {"image_size": 32, "patch_size": 8, "num_labels": 4}
PYRAMID = {"image_size": 64, "depths": [1, 1, 1, 2], "hidden_sizes": [8, 16, 16, 32], "num_labels": 4}
PYRAMID |= {"num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "parallel blocks": (lambda: VisionTransformer(**SIZE, depth=2, block_fn=ParallelThingsBlock), 2),
    "class attention": (lambda: Xcit(**SIZE, depth=1, cls_attn_layers=2), 5),
    "class attention in front": (lambda: timm.create_model("test_vit", num_classes=4, img_size=32), 10),
    "concatenated": (lambda: Tokens("concatenated"), 2),
    "stacked": (lambda: Tokens("stacked"), 2),
    "rolled": (lambda: Tokens("rolled"), 3),
    "apart": (lambda: Tokens("apart"), 1),
    "streams": (Streams, 2),
    **{each: (lambda each=each: Handing(each), 1) for each in HANDING},
    # Two layers of two joins each; behind those of the last one a class token alone is read.
    "ViT": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)), 2),
    "DeiT": (lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**TINY)), 2),
    "DeiT, two heads": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**TINY)),
        2,
    ),
    "MSN": (lambda: transformers.ViTMSNForImageClassification(transformers.ViTMSNConfig(**TINY)), 2),
    "BEiT, class token": (
        lambda: transformers.BeitForImageClassification(
            transformers.BeitConfig(**TINY, use_mean_pooling=False)
        ),
        2,
    ),
    "BEiT, average": (lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**TINY)), 4),
    "Dinov2, both": (lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TINY)), 4),
    "PVT": (lambda: transformers.PvtForImageClassification(transformers.PvtConfig(**PYRAMID)), 8),
    # The last stage has a single position, and the first three compare all of theirs with a single one.
    "PVT v2, average": (
        lambda: transformers.PvtV2ForImageClassification(transformers.PvtV2Config(**PYRAMID)),
        6,
    ),
    "CvT": (
        lambda: transformers.CvtForImageClassification(
            transformers.CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], num_labels=4)
        ),
        10,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_gate_reaches_the_logits_and_no_more_are_left_out(name: str) -> None:
    torch.manual_seed(0)
    make, count = NETWORKS[name]
    model = make()
    with torch.no_grad():  # some branches start at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = (3, 16, 16) if isinstance(model, (Tokens, Handing)) else (3, 32, 32)
    if name in ("CvT", "PVT"):
        size = (3, 64, 64)
    fxgraft.patch(model, "selfnorm", input_size=size)
    (graft,) = fxgraft.grafts(model)
    assert len(graft.units) == count
    take_logits(model.train()(torch.randn(4, *size))).square().sum().backward()
    reached = {key: bool(unit.g.norm.bias.grad.any()) for key, unit in graft.units.items()}
    assert all(reached.values()), reached
