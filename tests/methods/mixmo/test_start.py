"""How MixMo starts: evaluation as the bare network, members apart, one member alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.mixmo.patch import Encoders, Heads
from methods.mixmo.mixing import patched, unit
from models.small import CLASSES, batch, net


class Tokens(nn.Module):
    """A linear stem on patches of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(48, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(F.unfold(x, 4, stride=4).transpose(1, 2)).relu().mean(1))


STEMS: dict[str, Any] = {
    "convolution": net,
    "half": lambda: net().bfloat16(),
    "tokens": Tokens,
    "vit": lambda: timm.create_model("test_vit", num_classes=CLASSES, img_size=24, patch_size=8),
}


@pytest.mark.parametrize("spread", [0, 0.1, 1])
@pytest.mark.parametrize("members", [1, 2, *(pytest.param(n, marks=pytest.mark.sweep) for n in (3, 4))])
@pytest.mark.parametrize("stem", STEMS)
def test_evaluation_starts_as_the_bare_network(stem: str, members: int, spread: float) -> None:
    bare = STEMS[stem]().eval()
    model = patched(copy.deepcopy(bare), members=members, spread=spread).eval()
    x = batch()[0].to(next(bare.parameters()).dtype)
    expected = bare(x)
    assert torch.equal(model(x), expected)
    logits = model(x, members=True)
    alike = members == 1 or spread == 0
    assert torch.equal(logits, expected.expand(members, -1, -1)) == alike
    if stem != "half":
        torch.testing.assert_close(logits.mean(0), expected, rtol=1e-4, atol=1e-5)
    plain = fxgraft.merge(model)
    assert all(torch.equal(value, bare.state_dict()[key]) for key, value in plain.state_dict().items())


def test_members_start_apart_by_offsets_that_cancel() -> None:
    torch.manual_seed(0)
    model = patched(members=5, spread=0.2)
    for kind, layer in ((Encoders, model.layer1[0]), (Heads, model.fc)):
        own = unit(model, kind)
        assert [name for name, _ in own.named_buffers()] == ["offset_0", "offset_1"]
        acting = [weight for weight, _ in own.spread_out(layer)]
        assert all(torch.equal(weight, layer.weight) for weight, _ in own.tensors(layer))
        assert torch.equal(acting[4], layer.weight)
        for offset, plus, minus in ((own.offset_0, *acting[:2]), (own.offset_1, *acting[2:4])):
            assert torch.equal(plus, layer.weight + offset)
            assert torch.equal(minus, layer.weight - offset)
            assert (offset.norm() / layer.weight.norm()).item() == pytest.approx(0.2, rel=0.25)
        assert not torch.equal(own.offset_0, own.offset_1)
    for options in ({"spread": 0}, {"init": "random"}, {"members": 1}):
        assert not list(unit(patched(**options), Encoders).buffers())


def test_members_apart_learn_as_if_their_tensors_were_those() -> None:
    """The offset is a start: the gradient of a tensor is that of the weight that it acts with."""
    model, other = patched(members=3, spread=0.3), patched(members=3, spread=0)
    with torch.no_grad():
        for kind in (Encoders, Heads):
            layer = model.get_submodule(unit(model, kind).path)
            acting = unit(model, kind).spread_out(layer)
            twin = unit(other, kind)
            for (weight, _), (tensor, _) in zip(
                acting, twin.tensors(other.get_submodule(twin.path)), strict=True
            ):
                tensor.copy_(weight)
    x, y = batch()
    outs = []
    for each in (model, other):
        torch.manual_seed(1)
        outs.append(each(x, target=y))
        fxgraft.loss(each, outs[-1], y).backward()
    assert torch.equal(*outs)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_random_members_have_the_deviation_of_the_stock_ones() -> None:
    torch.manual_seed(0)
    model = patched(members=3, init="random")
    stem, head = unit(model, Encoders), unit(model, Heads)
    for stock, drawn in (
        (model.layer1[0].weight, [stem.weight_1, stem.weight_2]),
        (model.fc.weight, [head.weight_1, head.weight_2]),
    ):
        for each in drawn:
            assert not torch.equal(each, stock)
            assert each.std().item() == pytest.approx(stock.std().item(), rel=0.2)
        assert not torch.equal(*drawn)
    x, _ = batch()
    weights = [model.layer1[0].weight, stem.weight_1, stem.weight_2]
    biases = [model.layer1[0].bias, stem.bias_1, stem.bias_2]
    expected = F.conv2d(x, torch.stack(weights).sum(0), torch.stack(biases).sum(0), 2, 1)
    torch.testing.assert_close(model.layer1[0].eval()(x), expected)


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_one_member_trains_as_the_bare_network(init: Any) -> None:
    bare, model = net(dropout=0.3), patched(net(dropout=0.3), members=1, init=init)
    x, y = batch()
    torch.manual_seed(3)
    expected = bare(x)
    F.cross_entropy(expected, y).backward()
    torch.manual_seed(3)
    out = model(x, target=y)
    fxgraft.loss(model, out, y).backward()
    assert torch.equal(out, expected.unsqueeze(0))
    assert list(model.state_dict()) == list(bare.state_dict())
    for mine, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
