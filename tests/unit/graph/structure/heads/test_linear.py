"""Linear layers with other tensors than their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn

from fxgraft.errors import StructureError
from fxgraft.graph.structure.heads.linear import apply_layer, effective, is_linear, write_effective

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), (2, 4, 9, 9)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 8, 8)),
    "same": (lambda: Conv2dSame(4, 6, 3, 2, dilation=2), (2, 4, 9, 7)),
    "standardised": (lambda: ScaledStdConv2d(4, 6, 3, 2, gamma=1.7), (2, 4, 9, 9)),
    "standardised, same": (lambda: ScaledStdConv2dSame(4, 6, 3, 2, dilation=2, bias=False), (2, 4, 9, 7)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[request.param]
    layer = make()
    for each in layer.parameters():
        nn.init.normal_(each)
    return layer, torch.randn(shape)


def own(layer: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in layer.named_parameters()}


def test_a_layer_runs_with_other_tensors(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    expected, tensors = layer(x), own(layer)
    for each in layer.parameters():
        nn.init.zeros_(each)
    assert torch.equal(apply_layer(layer, x, *effective(layer, tensors)), expected)
    assert is_linear(layer)


def test_the_mean_of_two_layers_is_one(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    layer, x = layer.double(), x.double()
    outputs, parts = [], []
    for _ in range(2):
        for each in layer.parameters():
            nn.init.normal_(each)
        outputs.append(layer(x).detach())
        parts.append(effective(layer, own(layer)))
    (weight, bias), (other, other_bias) = parts
    both = None if bias is None or other_bias is None else (bias + other_bias) / 2
    length = own(layer)["weight"].flatten(1).std(1)
    write_effective(layer, (weight + other) / 2, both)
    torch.testing.assert_close(layer(x), sum(outputs) / 2)
    if "gain" in own(layer):
        torch.testing.assert_close(own(layer)["weight"].flatten(1).std(1), length)


def test_writing_what_it_has_changes_no_bit(case: tuple[nn.Module, Tensor]) -> None:
    layer, _ = case
    before = own(layer)
    write_effective(layer, *effective(layer, before))
    assert all(torch.equal(before[name], each) for name, each in own(layer).items())


def test_a_channel_whose_copies_cancel() -> None:
    layer, x = ScaledStdConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        layer.weight[1] = 4.0  # constant, so that nothing is left of it
    weight, bias = effective(layer)
    weight = weight.clone()
    weight[2] = 0
    write_effective(layer, weight, bias)
    assert all(each.isfinite().all() for each in layer.parameters())
    torch.testing.assert_close(effective(layer)[0], weight)
    assert bias is not None
    torch.testing.assert_close(layer(x)[:, 2], bias[2].expand(2, 8, 8))


def test_other_layers() -> None:
    assert not any(map(is_linear, (StdConv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.ReLU())))
    with pytest.raises(StructureError, match="A ReLU isn't a linear layer"):
        apply_layer(nn.ReLU(), torch.ones(1), torch.ones(1), None)
