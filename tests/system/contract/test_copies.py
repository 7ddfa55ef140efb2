"""Copies of a patched model, and the stock model that it folds into."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import fxgraft
from system.contract.cases import (
    METHODS,
    REPRESENTATIVE,
    SMALL,
    Cell,
    bare,
    batch,
    cells,
    evaluated,
    fresh,
    same,
    seeded,
    stack,
)

FEW = ("small",)


def folding(cell: Cell) -> bool:
    """What replaces no layer folds by coming off or not at all, on every backbone alike: the few show it."""
    return cell.works and (cell.expected.replaces or cell.backbone.name in REPRESENTATIVE)


@pytest.fixture(scope="module", params=cells(folding, representative=FEW))
def grafted(request: pytest.FixtureRequest) -> tuple[Cell, nn.Module]:
    """A patched model, whose own parameters have moved away from where they started."""
    cell: Cell = request.param
    model = cell.patch(fresh(cell.backbone))
    return cell, moved(model)


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "graft_" in name:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def memory(model: nn.Module) -> set[int]:
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def check(model: nn.Module, twin: nn.Module, plain: nn.Module, x: Tensor, y: Tensor) -> None:
    """A copy does what the original does, shares nothing with it, and comes off by itself."""
    assert type(twin) is type(model)
    assert [(g.name, type(g.patch)) for g in fxgraft.grafts(twin)] == [
        (g.name, type(g.patch)) for g in fxgraft.grafts(model)
    ]
    assert not memory(model) & memory(twin)
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    units = [{id(u) for g in fxgraft.grafts(each) for u in g.units.values()} for each in (model, twin)]
    assert not units[0] & units[1]
    assert seeded(twin, x, y, True).differences(seeded(model, x, y, True)) == []
    fxgraft.unpatch(twin)
    assert type(twin) is type(plain)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert fxgraft.grafts(model)


@pytest.mark.works_with("pickling, to worker processes")
@pytest.mark.parametrize("cell", cells(representative=FEW, backbones=REPRESENTATIVE))
def test_pickled(cell: Cell) -> None:
    model = moved(cell.patch(fresh(cell.backbone)))
    twin = pickle.loads(pickle.dumps(model))
    check(model, twin, bare(cell.backbone), *batch(cell.backbone))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _recipe(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        return fxgraft.load(SMALL.build(), fxgraft.save(model, folder))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": _saved,
    "fxgraft.save": _recipe,
    "ema": lambda model: ModelEmaV3(model).module,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stack_copied_in_other_ways(way: str) -> None:
    wanted = [m for m in METHODS if way != "fxgraft.save" or fxgraft.methods()[m].saves]
    model = SMALL.build()
    stack(model, SMALL, wanted)
    fxgraft.set_progress(model, 0.5)
    check(moved(model), WAYS[way](model), SMALL.build(), *batch(SMALL))


def test_merged(grafted: tuple[Cell, nn.Module]) -> None:
    """What was trained folds into a stock model that predicts the same, or an error says that it cannot."""
    cell, model = grafted
    method = fxgraft.methods()[cell.method]
    x = batch(cell.backbone)[0]
    with folds(cell, method.train_only):
        merged = fxgraft.merge(model)
        predicted = evaluated(model, x)
        assert type(merged) is type(bare(cell.backbone))
        stock = cell.backbone.build()
        stock.load_state_dict(merged.state_dict(), strict=True)
        if method.train_only:
            assert same(evaluated(stock, x), predicted)
        else:
            torch.testing.assert_close(evaluated(stock, x), predicted, rtol=1e-5, atol=1e-5)
    assert len(fxgraft.grafts(model)) == 1


@contextmanager
def folds(cell: Cell, train_only: bool) -> Iterator[None]:
    if cell.expected.folds is False:
        with pytest.raises(fxgraft.MergeError, match=f"{cell.method!r}"):
            yield
        return
    try:
        yield
    except fxgraft.MergeError:
        # What acts in training alone has nothing to fold; of others it has to be known.
        if train_only or cell.expected.folds:
            raise
