"""Keywords that a layer does not use are handed on as its forward does; those that it knows are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from models.toys import images

SIZE = (3, 8, 8)


def helper(x: Tensor, gain: float = 1.0, **_: Any) -> Tensor:
    return x * gain


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.conv(x) + kwargs.get("shift", 0.0)


class Layer(nn.Module):
    """Hands its keywords on to a child, and knows some of them itself; one only where it checkpoints."""

    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor, plain: bool = True, **kwargs: Any) -> Tensor:
        if self.gradient_checkpointing:
            return self.inner(x, use_cache=kwargs["use_cache"])
        out = x + helper(self.inner(x, **kwargs), **kwargs)
        return out * 2 if kwargs.get("twice") else out


class Drops(Layer):
    """Has no use for its keywords."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.inner(x)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.fc = nn.Conv2d(3, 8, 1), layer, nn.Linear(8, 4)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fc(self.layer(self.stem(x), **kwargs).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "keywords"),
    [
        (Layer, {"use_cache": False, "shift": 3.0}),
        (Layer, {"shift": torch.tensor(2.0), "other": None}),
        (Drops, {"use_cache": True, "other": [1, 2]}),
    ],
    ids=str,
)
def test_what_a_layer_does_not_use(layer: type[nn.Module], keywords: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    model = Model(layer())
    bare = model.train(training)(images(), **keywords)
    fxgraft.patch(model, "selfnorm", position="residual", input_size=SIZE)
    assert "1 units (residual)" in str(fxgraft.summary(model))
    out = model(images(), **keywords)
    assert torch.isfinite(out).all()
    if not training:
        torch.testing.assert_close(out, bare)
        torch.testing.assert_close(model(images()), fxgraft.unpatch(model)(images()))


@pytest.mark.parametrize("keyword", ["twice", "gain"])
def test_what_a_layer_knows(keyword: str) -> None:
    model = fxgraft.patch(Model(Layer()), "selfnorm", position="residual", input_size=SIZE)
    with pytest.raises(
        fxgraft.BypassError, match=rf"another structure than when it was patched \(with '{keyword}'\)"
    ):
        model.eval()(images(), **{keyword: 2.0})
