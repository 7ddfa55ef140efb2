"""Forwards that take a part in the computation of gradients: functions with a backward of their own, hooks, queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from models.toys import images

SIZE = (3, 8, 8)


class Reverse(torch.autograd.Function):
    """Identity whose gradient is turned round and scaled. Gives back the very tensor that it got."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return -ctx.factor * gradient, None


class Two(torch.autograd.Function):
    """Returns two values, whose gradients it does not add up as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1.0, x * 2.0

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Any:  # type: ignore[override]
        return one - 3 * other


def reverse(x: Tensor) -> Tensor:
    return Reverse.apply(x, 0.25)  # type: ignore[no-untyped-call, no-any-return]


def two(net: Any, x: Tensor) -> Tensor:
    one, other = Two.apply(net.conv(x))  # type: ignore[no-untyped-call]
    return one + other


class Net(nn.Module):
    """One residual block in the model's own forward."""

    def __init__(self, branch: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.branch = nn.Linear(8, 4), branch

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.branch(self, x)).relu().mean((2, 3)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(images()).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if "graft_" not in name}
    return {name: each for name, each in found.items() if each is not None}


@pytest.mark.parametrize(
    "branch",
    [lambda net, x: net.conv(reverse(x)), lambda net, x: Reverse.apply(net.conv(x), 2.0), two],
    ids=["before", "behind", "two values"],
)
@pytest.mark.parametrize(
    ("method", "options"), [("crossnorm", {"p": 0.0}), ("taps", {"layers": "add"}), ("selfnorm", {})]
)
def test_functions_keep_their_backward(branch: Any, method: str, options: dict[str, Any]) -> None:
    expected = gradients(Net(branch))
    apply = torch.autograd.Function.__dict__["apply"]
    model = fxgraft.patch(Net(branch), method, input_size=SIZE, **options)
    for name, each in gradients(model).items():
        torch.testing.assert_close(each, expected[name], msg=name)
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_functions_of_what_is_no_input_run_as_ever() -> None:
    def branch(net: Any, x: Tensor) -> Tensor:
        return net.conv(x) * Reverse.apply(torch.full((), 3.0), 2.0)  # type: ignore[no-untyped-call]

    model = fxgraft.patch(Net(branch), "taps", layers="add", input_size=SIZE)
    assert torch.equal(model(images()), Net(branch)(images()))


def with_hook(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    if y.requires_grad:
        y.register_hook(lambda g: g * 0.5)
    return y


def with_own_gradient(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0] if y.requires_grad else y


@pytest.mark.parametrize(
    "branch",
    [
        with_hook,
        with_own_gradient,
        lambda net, x: net.conv(x if x.is_leaf else 2 * x),
        lambda net, x: net.conv(x) * torch.rand(len(x), 1, 1, 1),
        lambda net, x: torch.vmap(lambda each: 2 * each)(net.conv(x)),
    ],
    ids=["hook", "gradient", "leaf", "random", "vmap"],
)
def test_what_a_graph_cannot_say_is_refused_when_the_model_is_patched(branch: Any) -> None:
    with pytest.raises(
        fxgraft.TraceError, match=rf"stopped at {__file__}(?s:.*)a module of its own, which stays closed"
    ):
        fxgraft.patch(Net(branch), "taps", layers="add", input_size=SIZE)


def test_it_works_as_a_module_of_its_own() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return with_hook(self, x)

    bare, model = Net(lambda net, x: net.part(x)), Net(lambda net, x: net.part(x))
    bare.part, model.part = Part(), Part()
    fxgraft.patch(model, "taps", layers="add", input_size=SIZE)
    expected = gradients(bare)
    for name, each in gradients(model).items():
        torch.testing.assert_close(each, expected[name], msg=name)


def test_data_that_a_forward_sets_is_named() -> None:
    def branch(net: Any, x: Tensor) -> Tensor:
        net.conv.weight.data = net.conv.weight.data.clamp(-0.1, 0.1)
        return net.conv(x)

    model = Net(branch)
    before = model.conv.weight.detach().clone()
    with pytest.raises(fxgraft.StructureError, match=r"sets the data of 'conv\.weight'(?s:.*)in place"):
        fxgraft.patch(model, "taps", layers="add", input_size=SIZE)
    assert torch.equal(model.conv.weight, before)
    assert model.conv.weight.device.type == "cpu"
