"""Transformers as they are written by hand: sums in a loop around lists of layers, and einops for all shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import pack, rearrange, reduce, repeat, unpack
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

import fxgraft

SIZE = (3, 32, 32)
LABELS = torch.tensor([0, 1, 2, 3])
ENDS = ["encoder.add_1", "encoder.add_3", "encoder.add_5"]


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(each, "b n (h d) -> b h n d", h=2) for each in self.qkv(self.norm(x)).chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out(rearrange(scores @ v, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    def __init__(self, dim: int, depth: int, norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Attention(dim), FeedForward(dim)]) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.norm(x)


class Transformer(nn.Module):
    """Made of tokens of 8×8 pixels; ``extra`` are a class token in front or registers behind."""

    def __init__(
        self, pool: str = "mean", extra: str = "", depth: int = 3, norm: bool = True, dim: int = 16
    ) -> None:
        super().__init__()
        self.pool, self.extra = pool, extra
        self.embed = nn.Sequential(
            Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8), nn.Linear(192, dim), nn.LayerNorm(dim)
        )
        self.token, self.dropout = nn.Parameter(torch.randn(1, 1, dim)), nn.Dropout(0.0)
        self.encoder = Encoder(dim, depth, norm)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, _, few = *x.shape, 1
        x = self.embed(x)
        if self.extra:
            token = repeat(self.token, "1 1 d -> b n d", b=b, n=few)
            x, sizes = pack([token, x] if self.extra == "class" else [x, token], "b * d")
        x = self.encoder(self.dropout(x))
        if self.extra == "registers":
            x, _ = unpack(x, sizes, "b * d")
        return self.head(x[:, 0] if self.pool == "class" else reduce(x, "b n d -> b d", "mean"))


class Pyramid(nn.Module):
    """Two encoders, and fewer places behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 16, 4, 4), Rearrange("b c h w -> b (h w) c"))
        self.token, self.first, self.second = (
            nn.Parameter(torch.randn(1, 1, 16)),
            Encoder(16, 2, False),
            Encoder(16, 2, True),
        )
        self.shrink, self.head = nn.Conv2d(16, 16, 2, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.first(self.embed(x)), "b (h w) c -> b c h w", h=8)
        x = rearrange(self.shrink(x), "b c h w -> b (h w) c")
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.second(x)[:, 0])


def reducing() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(),
        Reduce("b c h w -> b c 1 1", "mean"), Rearrange("... 1 1 -> ..."), nn.Linear(16, 5),
    )  # fmt: skip


def where(model: nn.Module, method: str, **options: Any) -> list[str]:
    """Patch a model, run a step, take the graft off, and say where it was."""
    x = torch.randn(4, *SIZE)
    plain, names = model.eval()(x), list(model.state_dict())
    fxgraft.patch(model.train(), method, input_size=SIZE, **options)
    places = list(fxgraft.grafts(model)[0].units)
    model(x, target=LABELS).sum().backward()
    fxgraft.unpatch(model)
    assert torch.equal(model.eval()(x), plain)
    assert list(model.state_dict()) == names
    return places


@pytest.mark.parametrize(
    ("model", "method", "expected"),
    [
        (Transformer, "mixstyle", ENDS[:2]),
        (Transformer, "dsu", ["embed.1", "embed", *ENDS]),
        (Transformer, "rsc", ["encoder"]),
        (lambda: Transformer("class", "class"), "mixstyle", ENDS[:2]),
        (lambda: Transformer("class", "class"), "rsc", ENDS[1:2]),  # behind the last one a class token is read alone
        (lambda: Transformer("class", "class", norm=False), "rsc", ENDS[1:2]),
        (lambda: Transformer("mean", "registers"), "rsc", ["getitem_6"]),
        (Pyramid, "mixstyle", ["first"]),
        (Pyramid, "rsc", ["second.add_1"]),
        (reducing, "rsc", ["3"]),
    ],
)  # fmt: skip
def test_places(model: Any, method: str, expected: list[str]) -> None:
    assert where(model(), method) == expected


def test_stages_are_the_blocks() -> None:
    model = Transformer()
    for number, name in enumerate(ENDS):
        assert where(model, "taps", layers=number) == [name]
    assert where(model, "taps", layers=-1) == ENDS[-1:]


def test_all_sums_are_residual_joins() -> None:
    assert where(Transformer(), "crossnorm", active=None) == [
        f"encoder.add{end}" for end in ("", "_1", "_2", "_3", "_4", "_5")
    ]


def test_blocks_whose_positions_are_not_seen_are_told() -> None:
    model = Transformer("mean", "registers")
    with pytest.raises(
        fxgraft.StructureError, match=r"'encoder\.add_1' gives a value of shape \(2, 17, 16\)(?s:.*)'embed'"
    ):
        fxgraft.patch(model, "mixstyle", input_size=SIZE)
    with pytest.raises(fxgraft.SiteError, match=r"The layout of 'encoder\.add'"):
        fxgraft.patch(model, "crossnorm", input_size=SIZE)


@pytest.mark.parametrize("model", [Transformer, reducing])
def test_an_average_of_einops_is_one(model: Any) -> None:
    network, x = model(), torch.randn(4, *SIZE)
    before = network.eval()(x)
    fxgraft.patch(network.train(), "diversification", alpha=1.0, input_size=SIZE)  # damps nothing
    assert "not exact" not in str(fxgraft.summary(network))
    torch.testing.assert_close(network(x), before)


def test_a_maximum_of_einops_is_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), Reduce("b c h w -> b c", "max"), nn.Linear(16, 5))
    with pytest.raises(fxgraft.StructureError, match="isn't a plain average over positions"):
        fxgraft.patch(model, "diversification", input_size=SIZE)
