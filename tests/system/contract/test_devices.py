"""What a GPU would see, without one: the model on fake CUDA tensors, which have a device and no data.

An operation that mixes devices raises there, and so does whatever would wait for the device: reading a number, a list
or a decision out of a tensor. Backward passes are not shown.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

import fxgraft
from fxgraft.patches import draws
from system.contract.cases import REPRESENTATIVE, SMALL, Cell, bare, batch, cells

ON_THE_CPU = ("coin", "choice", "subset", "numbers")
"""Draws that are numbers of the CPU's generator in eager mode, and stall no device."""


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    for name in ON_THE_CPU:
        monkeypatch.setattr(draws, name, drawn(getattr(draws, name)))
    # It has no fake kernel on a device, and computes shapes alone.
    monkeypatch.setattr(torch, "_sample_dirichlet", lambda alpha, *_: torch.rand_like(alpha))
    # The gradient that a method looks at in the middle of a pass: autograd asks for a driver.
    monkeypatch.setattr(torch.autograd, "grad", lambda _, leaf, **__: (torch.empty_like(leaf),))
    with FakeTensorMode() as made:
        yield made


def drawn(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw with data, as outside of a fake mode; a schedule's number on the CPU is one half."""

    @functools.wraps(draw)
    def real(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return draw(*(0.5 if isinstance(each, Tensor) else each for each in args), **options)

    return real


def on_a_gpu(model: nn.Module) -> nn.Module:
    """Replace all tensors of a model, shared ones once."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            each = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            learned = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(each, tensor.requires_grad) if learned else each
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(each) for name, each in tensors.items() if each is not None})
    return model


@pytest.mark.works_with("fake CUDA tensors: one device, no waiting for it")
@pytest.mark.parametrize(
    ("cell", "training"),
    [
        pytest.param(*each.values, training, marks=each.marks, id=f"{each.id}-{mode}")
        for each in cells(representative=("small",), backbones=REPRESENTATIVE)
        for training, mode in ((True, "training"), (False, "evaluation"))
        if training or each.values[0].backbone is SMALL
    ],
)
def test_nothing_mixes_devices_or_waits_for_one(
    cell: Cell, training: bool, request: pytest.FixtureRequest
) -> None:
    model = cell.patch(copy.deepcopy(bare(cell.backbone))).train(training)
    x, y = batch(cell.backbone)
    request.getfixturevalue("mode")
    on_a_gpu(model)
    x, y = (torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in (x, y))
    out = model(x, target=y)
    assert out.device.type == "cuda"
    assert fxgraft.loss(model, out, y).device.type == "cuda" or not training
    # Other tensors with labels that nobody can look at: they are compared on the device, and outputs known by graphs.
    soft = torch.empty(len(y), out.shape[-1], device="cuda")
    for given in (y.clone(), y.int(), soft) if training else ():
        model(x, target=y)
        fxgraft.losses(model, out.float(), given, judged)


def judged(out: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    rows = out.flatten(1).mean(1)
    return rows if reduction == "none" else rows.mean()


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3)


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("module", "error"), [(Mixing(), RuntimeError), (Waiting(), DataDependentOutputException)]
)
def test_a_fault_is_noticed(module: nn.Module, error: type[Exception], mode: FakeTensorMode) -> None:
    with pytest.raises(error):
        module(torch.empty(3, device="cuda"))
