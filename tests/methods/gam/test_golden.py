"""The arithmetic of activation matching against reference numbers, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxgraft.patches.gam.discriminator import Discriminator
from fxgraft.patches.gam.tensors import (
    channel_moments,
    discriminator_loss,
    gaussian_match,
    mapping_loss,
    weight_drift,
)
from golden_data import GoldenCase, load_golden

GOLDEN = load_golden("dam_derived")
GAUSS = [GOLDEN["gauss0"], GOLDEN["gauss1"]]
ADVERSARIES = [GOLDEN["adv0"], GOLDEN["adv1"]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
CONVENTIONS = [(ddof, eps) for ddof in (0, 1) for eps in ("0", "1e-5")]


def same(found: Tensor, case: GoldenCase, name: str) -> None:
    close = (1e-12, 1e-12) if found.dtype == torch.float64 else (2e-5, 2e-6)
    expected = case.outputs[name].to(found.dtype)
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found, expected, rtol=close[0], atol=close[1] * max(1, float(expected.abs().max()))
    )


@DTYPES
@pytest.mark.parametrize(("ddof", "eps"), CONVENTIONS)
@pytest.mark.parametrize("case", GAUSS, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_gaussian_matching(case: GoldenCase, ddof: int, eps: str, dtype: torch.dtype, last: bool):
    inputs = case.inputs_as(dtype)
    options = {"dim": -1 if last else 1, "unbiased": ddof == 1, "eps": float(eps)}
    s, t, cot = (x.movedim(1, -1) if last else x for x in (inputs["s"], inputs["t"], inputs["cot"]))
    mean, std = channel_moments(s, **options)
    same(mean, case, "mean_s")
    same(std, case, f"std_s_ddof{ddof}_eps{eps}")
    mean_t, std_t = channel_moments(t, **options)
    same(mean_t, case, "mean_t")
    same(std_t, case, f"std_t_ddof{ddof}_eps{eps}")
    for kind, detach in (("full", False), ("detached", True)):
        t = t.detach().clone().requires_grad_()
        y = gaussian_match(t, mean, std, detach=detach, **options)
        same(y.movedim(-1, 1) if last else y, case, f"y_ddof{ddof}_eps{eps}")
        if eps == "1e-5":
            (y * cot).sum().backward()
            same(t.grad.movedim(-1, 1) if last else t.grad, case, f"grad_t_{kind}_ddof{ddof}_eps1e-5")


@DTYPES
@pytest.mark.parametrize("case", ADVERSARIES, ids=str)
def test_losses_of_the_release(case: GoldenCase, dtype: torch.dtype):
    inputs = case.inputs_as(dtype)
    totals = [torch.zeros((), dtype=dtype), torch.zeros((), dtype=dtype)]
    for layer, scale in zip(case.settings["layers"], case.settings["scales"], strict=True):
        domains = [inputs[f"{layer}_logits_{d}"] for d in "st"]
        for index, kind in enumerate(("adv", "map")):
            s, t = (x.clone().requires_grad_() for x in domains)
            loss = discriminator_loss(s, t) if kind == "adv" else mapping_loss(t, s, invert="both")
            same(loss, case, f"{layer}_{kind}_unscaled")
            (scale * loss).backward()
            same(torch.cat((s.grad, t.grad)), case, f"{layer}_grad_{kind}")
            totals[index] += scale * loss.detach()
    same(totals[0], case, "adv_total")
    same(totals[1], case, "map_total_no_l2")
    tensors = range(case.settings["n_tensors"])
    source = [inputs[f"w{i}_s"] for i in tensors]
    target = [inputs[f"w{i}_t"].requires_grad_() for i in tensors]
    drift = weight_drift(source, target)
    same(drift, case, "drift")
    same(totals[1] + drift.detach(), case, "map_total")
    drift.backward()
    for i, weight in enumerate(target):
        same(weight.grad, case, f"w{i}_grad_t")
    alone = torch.stack([weight_drift([s], [t]) for s, t in zip(source, target, strict=True)])
    same(alone.detach(), case, "drift_per_tensor")


@DTYPES
@pytest.mark.parametrize("positions", [0, 1, 2])
@pytest.mark.parametrize("name", ["relu", "leaky"])
def test_discriminators(name: str, positions: int, dtype: torch.dtype):
    case = GOLDEN[f"disc_{name}"]
    inputs = case.inputs_as(dtype)
    weights = [inputs[f"W{i}"] for i in range(case.settings["n_layers"])]
    made = Discriminator(weights[0].shape[0], 2, positions, hidden=8, activation=name)  # type: ignore[arg-type]
    made.layers[1] = type(made.layers[1])(8, 6, *[1] * bool(positions))
    made.layers[2] = type(made.layers[2])(6, 2, *[1] * bool(positions))
    made.to(dtype)
    with torch.no_grad():
        for i, weight in enumerate(weights):
            made.layers[i].weight.copy_(weight.T.reshape(made.layers[i].weight.shape))
            made.layers[i].bias.copy_(inputs[f"b{i}"])
    x = inputs["x"].requires_grad_()
    # Every row at a position of its own: each is decided by itself.
    shaped = x.T.reshape(1, x.shape[1], -1, *[1] * (positions - 1)) if positions else x
    logits = made(shaped)
    logits = logits.reshape(2, -1).T if positions else logits
    same(logits, case, "logits")
    (logits * inputs["cot"]).sum().backward()
    same(x.grad, case, "grad_x")
