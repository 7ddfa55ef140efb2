"""Modules that keep what a pass computed: looking at a model leaves nothing of its own behind."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import fxgraft


class Keeps(nn.Module):
    """Computes a bias once in evaluation, in every way in which modules keep things."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.register_buffer("grid", None)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.weight * 2
        if self.grid is None:
            self.grid = torch.ones(6) * self.weight.detach()
        self.seen.append(len(x))
        self.last = x
        return x + self.cache["bias"].view(-1, 1, 1) + self.grid.view(-1, 1, 1)


def test_nothing_fake_is_kept():
    keeps = Keeps()
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), keeps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    cache, seen = keeps.cache, keeps.seen
    fxgraft.patch(model.eval(), "diversification", input_size=(3, 16, 16))
    fxgraft.sites(model)
    assert keeps.cache is cache
    assert keeps.seen is seen
    assert (cache, seen, keeps.last, keeps.grid) == ({}, [], None, None)
    assert type(model(torch.randn(2, 3, 16, 16))) is Tensor
    assert seen == [2]


def test_attention_biases_of_timm_are_computed_anew():
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_m0", num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224)
    fxgraft.patch(model, "rsc")
    with torch.no_grad():
        out = model(x)
        assert type(out) is Tensor
        assert torch.equal(out, fxgraft.unpatch(model)(x))
