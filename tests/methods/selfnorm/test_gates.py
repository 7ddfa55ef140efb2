"""The arithmetic of SelfNorm against the authors' code, gradients and running statistics included."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fxgraft.patches.selfnorm import Gate, gate_input, selfnorm
from golden_data import GoldenCase, load_golden

CASES = [*load_golden("selfnorm_onegate"), *load_golden("selfnorm_twogate")]


def gate(case: GoldenCase, which: str, dtype: torch.dtype) -> Gate:
    inputs = case.inputs_as(dtype)
    weight = inputs[f"{which}_fc_weight"]
    made = Gate(weight.shape[0], "authors").to(dtype).train(case.settings["train"])
    state = {"mean_weight": weight[:, 0, 0], "std_weight": weight[:, 0, 1]}
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"norm.{name}"] = inputs[f"{which}_bn_{name}"]
    made.load_state_dict({**made.state_dict(), **state})
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_authors_numbers(case: GoldenCase, dtype: torch.dtype, channels_last: bool):
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 3e-5}
    inputs = case.inputs_as(dtype)
    x = inputs["x"]
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    gates = {which: gate(case, which, dtype) for which in ("g", "f") if f"{which}_fc_weight" in inputs}
    y = selfnorm(x, gates["g"], gates.get("f"))
    (y * inputs["cot"]).sum().backward()

    def same(found: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(found, case.outputs[name].to(found.dtype), **close)

    same(y, "y")
    same(x.grad, "grad_x")
    for which, made in gates.items():
        fc = torch.stack((made.mean_weight.grad, made.std_weight.grad), dim=-1).unsqueeze(1)
        same(fc, f"grad_{which}_fc_weight")
        same(made.norm.weight.grad, f"grad_{which}_bn_weight")
        same(made.norm.bias.grad, f"grad_{which}_bn_bias")
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            same(getattr(made.norm, name), f"after_{which}_bn_{name}")


def test_two_gates_scale_mean_and_deviation():
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64) + 2
    g, f = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    y = selfnorm(x, lambda mean, std: g, lambda mean, std: f)
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)) * f)
    torch.testing.assert_close(y.std((2, 3)), x.std((2, 3)) * g)


@pytest.mark.parametrize("two", [False, True])
def test_gradient(two: bool):
    x = torch.randn(3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def run(
        x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
    ) -> torch.Tensor:
        f = (lambda m, s: gate_input(m, s, c, d).sigmoid()) if two else None
        return selfnorm(x, lambda m, s: gate_input(m, s, a, b).sigmoid(), f)

    assert gradcheck(run, (x, *weights))
    assert gradgradcheck(run, (x, *weights))


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_identity_gates_change_no_bit_and_train(two: bool, training: bool):
    x = (torch.randn(4, 3, 5, 5) * 10).requires_grad_()
    gates = [Gate(3, "identity").train(training) for _ in range(1 + two)]
    y = selfnorm(x, *gates)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert gates[0].norm.bias.grad.abs().max() > 0


def test_a_batch_of_one_uses_the_running_statistics():
    one = Gate(3)
    mean, std = torch.randn(1, 3), torch.rand(1, 3)
    assert torch.equal(one.train()(mean, std), one.eval()(mean, std))


@pytest.mark.parametrize("shape", [(3, 2, 1, 1), (1, 2, 4, 4), (2, 2, 1, 1)])
def test_single_positions_and_batches_stay_finite(shape: tuple[int, ...]):
    x = torch.randn(shape, requires_grad=True)
    y = selfnorm(x, Gate(2), Gate(2))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
