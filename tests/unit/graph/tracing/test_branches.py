"""Branches on shapes and dtypes are traced as the observed pass takes them, and held to that afterwards."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxgraft
from models.toys import CLASSES, LABELS, images

SIZE = (3, 8, 8)


class Checked(nn.Module):
    """Pads odd maps, checks dtype and channels, and spreads a shape, before and after the layer named ``site``."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.conv = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 1, 1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.site.weight.dtype:
            x = x.to(self.site.weight.dtype)
        if x.shape[1] != 3:
            raise ValueError("images have three channels")
        x = F.relu(self.site(x))
        if x.shape[-1] % 2 != 0:
            x = F.pad(x, (0, 1))
        shape = (*x.shape[:-3], -1, 4)
        x = x.flatten(2).transpose(1, 2).reshape(shape).transpose(1, 2).reshape(x.shape)
        return self.fc(self.conv(x).mean((2, 3)))


def patched(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return fxgraft.patch(model or Checked(), "rsc", layer="site", input_size=SIZE, batch_share=1.0, **options)


def test_the_rest_of_a_network_that_checks_shapes_is_followed() -> None:
    model, x = patched(), images(size=8)
    out = model(x, target=LABELS)
    assert not torch.equal(out, fxgraft.unpatch(model)(x))


def test_the_other_branch_is_refused_by_line() -> None:
    model = patched()
    model(images(size=10), target=LABELS)
    with pytest.raises(
        fxgraft.BypassError, match=r"another way(?s:.*)test_branches\.py:\d+\n(?s:.*)input_size="
    ):
        model(images(size=9), target=LABELS)
    assert model.eval()(images(size=9)).shape == (4, CLASSES)  # nothing acts in evaluation


def test_edited_forwards_hold_their_branches_in_both_modes() -> None:
    model = fxgraft.patch(Checked(), "taps", layers="relu", input_size=SIZE)
    for mode in (True, False):
        out, found = fxgraft.tapped(model.train(mode), images(size=8))
        assert found["relu"].shape == (4, 4, 8, 8)
        with pytest.raises(fxgraft.BypassError, match="another way for this input"):
            model(images(size=9))
    assert torch.equal(out, fxgraft.unpatch(model)(images(size=8)))


class OnValues(Checked):
    def forward(self, x: Tensor) -> Tensor:
        x = self.site(x)
        if isinstance(x, fx.Proxy) and x.mean() > 0:  # numbers, which no pass of fake tensors knows
            x = x + 1
        return self.fc(self.conv(x).mean((2, 3)))


def test_branches_on_numbers_are_refused_with_advice_that_helps() -> None:
    """The site is the output of a whole module already, so that is not the advice."""
    with pytest.raises(fxgraft.TraceError, match=r"another site does not help") as caught:
        patched(OnValues())
    assert "Choose the output of a whole module" not in str(caught.value)
    assert "module of its own" in str(caught.value)


@dataclass
class Result(OrderedDict):
    logits: Tensor
    extra: Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__(logits=self.logits)


class Returns(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.fc, self.kind = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES), kind

    def forward(self, x: Tensor) -> Any:
        x = self.fc(F.relu(self.conv(x)).mean((2, 3)))
        return self.kind(logits=x)


@pytest.mark.parametrize("kind", [OrderedDict, dict, Result])
def test_dictionaries_keep_their_class(kind: type) -> None:
    model = fxgraft.patch(Returns(kind), "rsc", layer="relu", input_size=SIZE)
    out = model(images(), target=LABELS)
    assert type(out) is kind
    assert fxgraft.loss(model, out, LABELS).requires_grad
