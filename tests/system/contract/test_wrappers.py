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
from system.contract.cases import METHODS, SMALL, Cell, batch, evaluated, replicas


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def patched(method: str, **options: Any) -> nn.Module:
    cell = Cell(method, SMALL)
    return cell.patch(SMALL.build(), cell.options(**options)).train()


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


def test_the_loss_of_a_pass_with_other_weights_that_runs_again() -> None:
    """Outside of the call the model has its own weights: the term would be that of another network."""
    model = patched("crossnorm", consistency=True, p=1.0, active=None)
    other = moved(copy.deepcopy(model), 0.01)
    x, y = batch(SMALL)
    weights = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    with pytest.raises(
        fxgraft.ConfigError, match=r"made with other weights(?s:.*)functional_call\(step, \.\.\.\)"
    ):
        fxgraft.loss(
            model, functional_call(model, {n: p * 1 for n, p in weights.items()}, (x,), {"target": y}), y
        )

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return fxgraft.loss(self.model, self.model(x, target=y), y)

    torch.manual_seed(1)
    tensors = {f"model.{name}": p * 1 for name, p in weights.items()}
    found = torch.autograd.grad(functional_call(Step(), tensors, (x, y)), list(weights.values()))
    for gradient, expected in zip(found, gradients(other, 1, x, y).values(), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_batches_side_by_side() -> None:
    """Labels that `vmap` deals out are checked as all labels are."""
    for method in ("rsc", "mixmo"):
        model = patched(method)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
        x, y = batch(SMALL)
        call = vmap(lambda x, y, model=model: model(x, target=y), randomness="different")
        x, y = x.unflatten(0, (2, 2)), y.unflatten(0, (2, 2))
        assert call(x, y).isfinite().all()
        with pytest.raises(fxgraft.TargetError, match="class indices from 0 to 99"):
            call(x, y * 33)


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
