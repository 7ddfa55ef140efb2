"""One-dimensional networks: a signal (B, C, L) is a map of height one, and has the same statistics and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import SiteError

LENGTH = 12


class Block(nn.Module):
    def __init__(self, conv: type[nn.Module], norm: type[nn.Module], kernel: Any, padding: Any) -> None:
        super().__init__()
        self.conv = conv(8, 8, kernel, padding=padding)
        self.norm = norm(8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.norm(self.conv(x)))


def network(dimensions: int, norm: bool = True) -> nn.Sequential:
    """The same network for signals (1) or for maps of height one (2)."""
    torch.manual_seed(0)
    one = dimensions == 1
    conv, batch = (nn.Conv1d, nn.BatchNorm1d) if one else (nn.Conv2d, nn.BatchNorm2d)
    pool = nn.AdaptiveAvgPool1d(1) if one else nn.AdaptiveAvgPool2d(1)
    kernel, padding = (3, 1) if one else ((1, 3), (0, 1))
    model = nn.Sequential()
    model.stem = conv(3, 8, kernel, padding=padding)
    model.blocks = nn.Sequential(
        *(Block(conv, batch if norm else nn.Identity, kernel, padding) for _ in range(2))
    )
    model.pool, model.flat, model.head = pool, nn.Flatten(), nn.Linear(8, 4)
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "rsc": {"scope": "spatial", "batch_share": 1.0},
    "crossnorm": {"p": 1.0},
    "selfnorm": {"init": "authors"},
}


@pytest.mark.parametrize("layers", [None, "blocks.0", -1])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_signal_is_a_map_of_height_one(method: str, layers: object) -> None:
    x, y = torch.randn(6, 3, LENGTH), torch.arange(6) % 4
    outs, models = [], []
    for dimensions in (1, 2):
        model = network(dimensions)
        image = x if dimensions == 1 else x.unsqueeze(2)
        given = {} if layers is None else {"layers": layers}
        fxgraft.patch(model, method, input_size=tuple(image.shape[1:]), **OPTIONS[method], **given)
        torch.manual_seed(1)
        outs.append(model.train()(image, target=y))
        models.append(model)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.numel() == two.numel()  # as many gates as channels
    assert torch.allclose(outs[0], outs[1], atol=1e-5)
    bare = network(1).train()(x)
    assert not torch.allclose(outs[0], bare, atol=1e-3)


def test_the_layout_of_a_signal_follows_from_its_layers() -> None:
    listed = {site.name: site.layout for site in fxgraft.sites(network(1), input_size=(3, LENGTH))}
    assert listed["stem"] == listed["blocks.0.norm"] == listed["blocks.1"] == listed["blocks.0.add"] == "NCL"
    assert listed["flat"] == "NC"
    tokens = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GRU(8, 8, batch_first=True))
    listed = {site.name: site.layout for site in fxgraft.sites(tokens, input_size=(LENGTH, 3))}
    assert listed["0"] == listed["1"] == "NLC"


def test_where_no_layer_tells_it_is_asked() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(3 * LENGTH, 4))
    with pytest.raises(
        SiteError, match=r"layout of '0', of shape \(2, 3, 12\), cannot be told(?s:.*)pass layout="
    ):
        fxgraft.patch(model, "rsc", layer="0", input_size=(3, LENGTH))
    fxgraft.patch(model, "rsc", layer="0", input_size=(3, LENGTH), layout="NCL")
