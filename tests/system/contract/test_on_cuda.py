"""The contract on a GPU: the bare model's bits, steps that wait for nothing, undo. Skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

import fxgraft
from system.contract.cases import REPRESENTATIVE, Cell, bare, batch, cells

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CELLS = cells(representative=REPRESENTATIVE, backbones=REPRESENTATIVE)


@pytest.mark.parametrize("cell", CELLS)
def test_the_bare_bits_in_evaluation_and_after_undo(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = copy.deepcopy(bare(cell.backbone)).eval().cuda()
    x = batch(cell.backbone)[0].cuda()
    expected = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = cell.patch(copy.deepcopy(bare(cell.backbone))).eval().cuda()
    here = cell.patch(copy.deepcopy(model))
    assert {each.device.type for each in here.state_dict().values()} == {"cuda"}
    if cell.expected.starts_as_bare:
        assert torch.equal(here(x), expected)
        assert torch.equal(moved(x), expected)
    fxgraft.unpatch(here)
    assert torch.equal(here(x), expected)
    assert all(torch.equal(before[name], value) for name, value in here.state_dict().items())


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_training_step_waits_for_nothing(cell: Cell, amp: bool) -> None:
    model = cell.patch(copy.deepcopy(bare(cell.backbone)).cuda()).train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 1e-3)
    x, y = (each.cuda() for each in batch(cell.backbone))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp), fxgraft.targets(y):
            out = model(x)
            loss = fxgraft.loss(model, out, y)
        loss.backward()
        optimizer.step()
        return loss

    step()  # plans, and fills the caches of cuDNN
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize("method", ["rsc", "crossnorm", "selfnorm", "diversification", "mixmo"])
def test_it_compiles_on_the_device(method: str) -> None:
    (cell,) = (each.values[0] for each in cells(backbones=("small",)) if each.values[0].method == method)
    model = cell.patch(cell.backbone.build().cuda()).train()
    x, y = (each.cuda() for each in batch(cell.backbone))
    compiled = torch.compile(model, fullgraph=True)
    with fxgraft.targets(y):
        out = compiled(x)
        loss = fxgraft.loss(model, out, y)
    loss.backward()
    assert torch.isfinite(loss)
    model.eval()
    assert torch.allclose(compiled(x), model(x), atol=1e-3)
