"""Heads that look like a plain average and a linear layer, and compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import SiteError, StructureError

SIZE = (3, 16, 16)
SHUFFLE = [3, 0, 1, 2, 7, 4, 5, 6]


class Net(nn.Module):
    """A convolution, a pooling, and a linear layer that reads what ``between`` makes of the pooled vector."""

    def __init__(self, pool: Any = None, between: Any = None, width: int = 8) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Linear(width, 5)
        self.pool = pool or nn.AdaptiveAvgPool2d(1)
        self.between = between or (lambda x: x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.pool(self.act(self.conv(x)))))


def quiet(model: nn.Module) -> None:
    """Put on a diversification block that damps nothing: training then gives the bare logits."""
    fxgraft.patch(model, "diversification", alpha=1.0, input_size=SIZE)


def rsc(model: nn.Module, x: Tensor, hooked: bool) -> Tensor:
    """Return the logits of a pass with RSC; a hook behind its site makes it run the rest of the network."""
    handle = model.fc.register_forward_hook(lambda *_: None) if hooked else None
    fxgraft.patch(model, "rsc", scope="spatial", input_size=SIZE)
    torch.manual_seed(0)
    out = model.train()(x, target=torch.arange(len(x)) % 5)
    fxgraft.unpatch(model)
    if handle is not None:
        handle.remove()
    return out


WINDOWS = {
    "smaller than the map": lambda: nn.AvgPool2d(7),
    "padded": lambda: nn.AvgPool2d(9, 9, padding=1),
    "another divisor": lambda: nn.AvgPool2d(8, divisor_override=1),
    "a function": lambda: lambda x: F.avg_pool2d(x, 7),
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_window_that_weighs_positions_is_no_average(window: Any) -> None:
    torch.manual_seed(1)
    model, x = Net(window()), torch.randn(6, *SIZE)
    with pytest.raises(StructureError, match="which isn't a plain average over positions"):
        quiet(model)
    assert torch.equal(rsc(model, x, False), rsc(model, x, True))


def sides_of_the_map(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, x.shape[2:])


@pytest.mark.parametrize("pool", [nn.AvgPool2d(8), sides_of_the_map], ids=["fixed", "of the map"])
def test_a_window_of_the_whole_map_is_an_average(pool: Any) -> None:
    model, x = Net(pool), torch.randn(4, *SIZE)
    bare = model(x)
    quiet(model)
    assert torch.allclose(model(x), bare, atol=1e-6)


def test_a_window_is_whole_for_maps_of_one_size() -> None:
    larger = torch.randn(6, 3, 18, 18)
    model = Net(nn.AvgPool2d(8))
    quiet(model)
    with pytest.raises(
        SiteError, match=r"A map of 9×9 reaches the head(?s:.*)maps of 8×8 whole(?s:.*)Adaptive"
    ):
        model(larger)
    fxgraft.unpatch(model)
    assert torch.equal(rsc(model, larger, False), rsc(model, larger, True))


ORDERS = {
    "an index": (lambda x: x.flatten(1)[:, SHUFFLE], 8),
    "every second": (lambda x: x.flatten(1)[:, ::2], 4),
    "the last": (lambda x: x.flatten(1)[:, 3:], 5),
    "the same": (lambda x: x[:, :, 0, 0][:, None].squeeze(1), 8),
}


@pytest.mark.parametrize(("between", "width"), ORDERS.values(), ids=ORDERS)
def test_what_the_classifier_reads_keeps_its_order(between: Any, width: int) -> None:
    torch.manual_seed(1)
    model, x = Net(None, between, width), torch.randn(6, *SIZE)
    bare = model(x)
    quiet(model)
    assert torch.allclose(model(x), bare, atol=1e-6)
    fxgraft.unpatch(model)
    assert torch.allclose(rsc(model, x, False), rsc(model, x, True), atol=1e-6)


def test_channels_that_are_shuffled_by_their_shape() -> None:
    model, x = Net(None, lambda x: x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)), torch.randn(6, *SIZE)
    assert torch.allclose(rsc(model, x, False), rsc(model, x, True), atol=1e-6)
    with pytest.raises(StructureError, match="it reads a whole map"):
        quiet(model)


STEPS = {
    "rows, then columns": lambda x: x.mean(-1).mean(-1),
    "quarters": lambda x: F.adaptive_avg_pool2d(x, 2).mean((2, 3)),
    "channels last": lambda x: x.permute(0, 2, 3, 1).mean(1).mean(1),
}


@pytest.mark.parametrize("pool", STEPS.values(), ids=STEPS)
def test_an_average_in_steps_leaves_the_map_in_front_of_it(pool: Any) -> None:
    model = Net(pool, lambda x: x)
    (site,) = fxgraft.grafts(fxgraft.patch(model, "rsc", input_size=SIZE))[0].units
    assert site in ("act", "permute")
    with pytest.raises(StructureError, match=r"averages in steps(?s:.*)Average in one step"):
        quiet(model)


def test_a_classifier_that_is_called_twice_is_named_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(x.flip(-1))

    with pytest.raises(
        StructureError, match=r"Both calls its classifier 'net.fc' 2 times(?s:.*)Patch the part"
    ):
        quiet(Both())
