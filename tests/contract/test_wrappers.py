"""What wraps, averages or calls a patched model in another way than a training loop does."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, update_bn

import fxgraft
from contract.cases import METHODS, SMALL, Cell, batch, evaluated, replicas


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def patched(method: str) -> nn.Module:
    return Cell(method, SMALL).patch(SMALL.build()).train()


def moved(model: nn.Module, by: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by
    return model


def gradients(model: nn.Module, seed: int, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """Add those of one pass to what is there, and return a copy."""
    torch.manual_seed(seed)
    fxgraft.loss(model, model(x, target=y), y).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.works_with("gradient accumulation")
def test_gradients_accumulate(method: str) -> None:
    model = patched(method)
    x, y = batch(SMALL)
    alone = []
    for seed in (1, 2):
        model.zero_grad(set_to_none=True)
        alone.append(gradients(model, seed, x.roll(seed, 0), y.roll(seed)))
    model.zero_grad(set_to_none=True)
    gradients(model, 1, x.roll(1, 0), y.roll(1))
    together = gradients(model, 2, x.roll(2, 0), y.roll(2))
    for name, first in alone[0].items():
        if first is not None:
            torch.testing.assert_close(together[name], first + alone[1][name])
    assert any(first is not None for first in alone[0].values())


@pytest.mark.works_with("timm's `ModelEmaV3`")
def test_exponential_moving_average(method: str) -> None:
    model = patched(method)
    ema = ModelEmaV3(model, decay=0.75)
    start = copy.deepcopy(dict(model.named_parameters()))
    ema.update(moved(model, 1.0))
    for name, average in ema.module.named_parameters():
        torch.testing.assert_close(average, start[name] + 0.25)
    assert torch.equal(ema(batch(SMALL)[0]), evaluated(ema.module, batch(SMALL)[0]))
    fxgraft.unpatch(ema.module)
    assert type(ema.module) is type(SMALL.build())
    assert fxgraft.grafts(model)


@pytest.mark.works_with("SWA: `AveragedModel`, and `update_bn` on the merged model")
def test_stochastic_weight_averaging(method: str) -> None:
    model = patched(method)
    x, y = batch(SMALL)
    averaged = AveragedModel(model)
    start = copy.deepcopy(dict(model.named_parameters()))
    averaged.update_parameters(model)
    averaged.update_parameters(moved(model, 1.0))
    for name, average in averaged.module.named_parameters():
        torch.testing.assert_close(average, start[name] + 0.5)
    # Its training passes are without labels. What does not fold needs none.
    final = averaged if Cell(method, SMALL).expected.folds is False else fxgraft.merge(averaged.module)
    update_bn([(x, y)], final)
    assert evaluated(final, x).isfinite().all()


@pytest.mark.works_with("`torch.func.functional_call` and `grad`")
def test_called_with_other_weights(method: str) -> None:
    """Value and gradients are those of a model that has these weights."""
    model = patched(method)
    other = moved(copy.deepcopy(model), 0.01)
    x, y = batch(SMALL)
    weights = {name: p.detach() for name, p in other.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in other.named_buffers()}

    def objective(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(1)
        return fxgraft.loss(model, functional_call(model, (weights, buffers), (x,), {"target": y}), y)

    found = torch.func.grad(objective)(weights, buffers)
    wanted = gradients(other, 1, x, y)
    for name, gradient in found.items():
        expected = wanted[name]
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected)


@pytest.mark.works_with("`torch.func.vmap` over networks, evaluation")
def test_networks_side_by_side(method: str) -> None:
    models = [patched(method).eval() for _ in range(2)]
    moved(models[1], 0.01)
    x = batch(SMALL)[0]
    outs = vmap(lambda *state: functional_call(models[0], state, (x,)))(*stack_module_state(models))
    for out, model in zip(outs, models, strict=True):
        torch.testing.assert_close(out, evaluated(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.works_with("`torch.func.vmap` over networks, training")
def test_networks_trained_side_by_side(method: str) -> None:
    """Every network draws for itself, and learns."""
    models = [patched(method) for _ in range(2)]
    x, y = batch(SMALL)
    weights, buffers = stack_module_state(models)

    def objective(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return fxgraft.loss(models[0], functional_call(models[0], (weights, buffers), (x,), {"target": y}), y)

    gradients = vmap(torch.func.grad(objective), randomness="different")(weights, buffers)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert len(gradient) == 2
    assert any(not torch.equal(*gradient) for gradient in gradients.values())


@pytest.mark.works_with("`DataParallel`'s replicas, in threads")
def test_replicas(method: str, request: pytest.FixtureRequest) -> None:
    """Each runs on its part of the batch in a thread of its own, and gradients reach the model."""
    if method == "mixmo":
        reason = "refused in training: the outputs of replicas would be joined along the members"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True, raises=fxgraft.WrappedModelError))
    model = patched(method)
    x, y = batch(SMALL)
    parts = list(zip(x.chunk(2), y.chunk(2), strict=True))
    made = replicas(model, 2)
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            part, labels = parts[index]
            found[index] = made[index](part, target=labels)
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (part, labels) in enumerate(parts):
        if isinstance(found[index], Exception):
            raise found[index]
        assert found[index].shape == model(part, target=labels).shape
        found[index].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())
