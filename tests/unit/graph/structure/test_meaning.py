"""What every operation does to the meaning of dimensions, on maps whose sizes tell nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import SiteError
from fxgraft.graph.dataflow.axes import CHANNEL, POSITION, Factor, regrouped
from fxgraft.graph.structure.layout import layout_of
from fxgraft.graph.tracing.model_trace import ModelTrace

N = 16  # channels, height and width of the map


class Then(nn.Module):
    """A map (B, 16, 16, 16) of image patches, and what a function makes of it."""

    def __init__(self, function: Callable[[Then, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.stem = nn.Conv2d(3, N, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, N))
        self.linear = nn.Linear(N, N)
        self.mixing = nn.Linear(N * N, N * N)
        self.conv = nn.Conv1d(N, N, 3, padding=1)
        self.attention = nn.MultiheadAttention(N, 4, batch_first=True)
        self.recurrent = nn.LSTM(N, N // 2, bidirectional=True, batch_first=True)
        self.last = nn.Identity()

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def with_token(self, x: Tensor) -> Tensor:
        return torch.cat((self.token.expand(x.shape[0], -1, -1), self.tokens(x)), 1)

    def heads(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens).unflatten(2, (4, 4)).transpose(1, 2)

    def scores(self, tokens: Tensor) -> Tensor:
        q, k = self.heads(tokens), self.heads(tokens)
        return (q @ k.transpose(2, 3)).softmax(-1)

    def attended(self, tokens: Tensor) -> Tensor:
        return (self.scores(tokens) @ self.heads(tokens)).transpose(1, 2).flatten(2)

    def windows(self, x: Tensor) -> Tensor:
        grid = x.permute(0, 2, 3, 1).unflatten(1, (4, 4)).unflatten(3, (4, 4))
        return grid.transpose(2, 3).reshape(-1, 16, N)

    def merged(self, windows: Tensor) -> Tensor:
        return windows.view(-1, 4, 4, 4, 4, N).transpose(2, 3).reshape(-1, N, N, N)

    def between_channels(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return (flat @ flat.transpose(1, 2)).softmax(-1) @ flat

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.stem(x))).sum()


def found(function: Callable[[Then, Tensor], Tensor], strict: bool = False) -> str:
    trace = ModelTrace(Then(function), (3, 4 * N, 4 * N))
    layout = layout_of(trace, trace.observation.output("last"), "last", strict)
    return "" if layout is None else str(layout)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x, "NCHW"),
        (lambda m, x: x.permute(0, 2, 3, 1), "NHWC"),
        (lambda m, x: m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "NCHW"),
        (lambda m, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3), "NCHW"),
        (lambda m, x: F.pixel_unshuffle(x, 2), "NCHW"),
        (lambda m, x: F.interpolate(x[:, :8, ::2], scale_factor=2), "NCHW"),
        (lambda m, x: x.mean((2, 3), keepdim=True), "NCHW"),
        (lambda m, x: x.mean((2, 3)), "NC"),
        (lambda m, x: x * x.mean((2, 3), keepdim=True).sigmoid(), "NCHW"),
        (lambda m, x: torch.roll(x, 3, 2) + torch.cat(x.split(4, 1)[::-1], 1), "NCHW"),
        (lambda m, x: m.tokens(x), "NLC"),
        (lambda m, x: x.flatten(2), "NCL"),
        (lambda m, x: m.conv(x.flatten(2)), "NCL"),
        (lambda m, x: m.with_token(x), "NLC, 1 prefix"),
        (lambda m, x: m.attended(m.with_token(x)) + m.with_token(x), "NLC, 1 prefix"),
        (lambda m, x: m.attention(*[m.with_token(x)] * 3)[0], "NLC, 1 prefix"),
        (lambda m, x: m.with_token(x)[:, 1:], "NLC"),
        (lambda m, x: m.with_token(x)[:, 1:].transpose(1, 2).unflatten(2, (N, N)), "NCHW"),
        (lambda m, x: torch.cat((m.tokens(x).mean(1, keepdim=True), m.tokens(x)), 1), "NLC, 1 prefix"),
        (lambda m, x: torch.cat((m.token.expand(2, 3, -1), m.with_token(x)), 1), "NLC, 4 prefix"),
        (lambda m, x: torch.cat((m.with_token(x)[:, :1] + 1, m.tokens(x)), 1), "NLC, 1 prefix"),
        (lambda m, x: m.mixing(m.tokens(x).transpose(1, 2)).transpose(1, 2), "NLC"),
        (lambda m, x: m.recurrent(m.tokens(x))[0], "NLC"),
        (lambda m, x: m.merged(m.attended(m.windows(x))), "NHWC"),
        (lambda m, x: m.between_channels(x), "NCL"),
        # No maps: windows among the images, attention weights, heads.
        (lambda m, x: m.windows(x), ""),
        (lambda m, x: m.scores(m.with_token(x)), ""),
        (lambda m, x: m.scores(m.with_token(x))[:, :, :1], ""),
        (lambda m, x: m.heads(m.tokens(x))[:, :1].flatten(0, 1), "NLC"),
        (lambda m, x: m.heads(m.tokens(x)).flatten(0, 1), ""),
        (lambda m, x: x.mean(1), ""),
    ],
)
def test_operations_keep_track_of_dimensions(
    function: Callable[[Then, Tensor], Tensor], expected: str
) -> None:
    assert found(function) == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.windows(x), "is not that of the images: something else was merged(?s:.*)Choose"),
        (lambda m, x: m.scores(m.tokens(x)), "isn.t a map: it compares places with each other(?s:.*)Choose"),
        (
            lambda m, x: torch.cat((m.tokens(x), m.token.expand(2, -1, -1)), 1),
            "tokens that aren't places stand elsewhere than in front(?s:.*)pass layout=",
        ),
        (lambda m, x: x.mean(1), "its dimensions are images, places, places(?s:.*)pass layout="),
    ],
)
def test_what_has_no_layout_says_why(function: Callable[[Then, Tensor], Tensor], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        found(function, strict=True)


def test_what_operations_leave_open_is_told_by_a_larger_image() -> None:
    def same(m: Then, x: Tensor) -> Tensor:
        return x.as_strided(x.shape, x.stride())

    assert (found(same), found(same, strict=True)) == ("", "NCHW")


def test_a_value_written_in_part_is_made_of_what_was_written() -> None:
    def written(m: Then, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        out[:, :8] = x[:, 8:]
        return out

    assert found(written) == "NCHW"


def test_dimensions_are_parted_elsewhere_than_they_were_joined() -> None:
    factors = [Factor(CHANNEL, 6), Factor(POSITION, 8), Factor(POSITION, 7)]
    kinds = [[(factor.kind, factor.size) for factor in axis] for axis in regrouped(factors, (2, 3, 7, 8))]
    assert kinds == [[(CHANNEL, 2)], [(CHANNEL, 3)], [(POSITION, 7)], [(POSITION, 8)]]


def test_a_unit_is_placed_by_meaning_not_by_sizes() -> None:
    """As many tokens as channels, and a class token in front: the mask leaves that alone."""
    model = nn.Sequential(Tokens(), nn.Linear(N, 5))
    fxgraft.patch(model, "rsc", layer="0.blocks", scope="spatial", batch_share=1.0, input_size=(3, 15, 15))
    with fxgraft.patches.rsc.record(model) as records:
        model.train()(torch.randn(2, 3, 15, 15), target=torch.tensor([0, 1]))
    assert records[0].mask.shape == (2, 1, 225)


class Tokens(nn.Module):
    """A class token and the patches, mixed, of which the class token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, N, 1)
        self.token = nn.Parameter(torch.randn(1, 1, N))
        self.blocks = nn.Sequential(nn.Linear(N, N))
        self.attention = nn.MultiheadAttention(N, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1))
        return (x + self.attention(x, x, x)[0])[:, 0]
