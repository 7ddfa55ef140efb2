"""Metrics of ensembles against formulas written out, over several batches, and without torchmetrics."""

import builtins
import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxgraft.errors import ConfigError, TargetError
from fxgraft.patches.mixmo.ensemble import EnsembleMetrics, disagreement, ensemble_entropy


def calibration_error(probabilities: Tensor, target: Tensor, bins: int) -> float:
    """Σ over bins of the share of samples times |accuracy − confidence|; a bin is (a, b]."""
    confidence, guess = probabilities.max(1)
    which = (confidence * bins).ceil().long().clamp(min=1) - 1
    error = 0.0
    for each in range(bins):
        inside = which == each
        if inside.any():
            right = (guess[inside] == target[inside]).double().mean()
            error += inside.double().mean().item() * abs(right - confidence[inside].double().mean()).item()
    return error


def expected_of(member_logits: Tensor, target: Tensor, average: str, bins: int) -> dict[str, float]:
    """All metrics in float64."""
    logits = member_logits.double()
    chances = [each.softmax(1) for each in logits]
    together = logits.mean(0).softmax(1) if average == "logits" else torch.stack(chances).mean(0)
    names = [*(f"member_{i}" for i in range(len(logits))), "ensemble"]
    out = {}
    for name, p in zip(names, [*chances, together], strict=True):
        out[f"{name}/accuracy"] = (p.argmax(1) == target).double().mean().item()
        out[f"{name}/nll"] = F.nll_loss(p.log(), target).item()
        out[f"{name}/ece"] = calibration_error(p, target, bins)
    out["ensemble/entropy"] = -(together * together.log()).sum(1).mean().item()
    votes = logits.argmax(2)
    pairs = [(i, j) for i in range(len(logits)) for j in range(i)]
    out["disagreement"] = sum((votes[i] != votes[j]).double().mean().item() for i, j in pairs) / max(
        len(pairs), 1
    )
    return out


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("bins", [15, 5])
def test_metrics_over_batches(members: int, average: Any, bins: int):
    logits, target = torch.randn(members, 50, 4) * 2, torch.randint(4, (50,))
    metrics = EnsembleMetrics(4, members, average=average, n_bins=bins)
    for _ in range(2):  # again after a reset
        for rows in (slice(0, 7), slice(7, 30), slice(30, 50)):
            metrics.update(logits[:, rows], target[rows])
        found = {name: value.item() for name, value in metrics.compute().items()}
        assert found == pytest.approx(expected_of(logits, target, average, bins), abs=1e-5)
        metrics.reset()
        with pytest.raises(ConfigError, match="nothing to compute"):
            metrics.compute()


def test_the_two_averages_differ():
    logits, target = torch.randn(2, 50, 4) * 3, torch.randint(4, (50,))
    nll = []
    for average in ("logits", "probabilities"):
        metrics = EnsembleMetrics(4, 2, average=average)  # type: ignore[arg-type]
        metrics.update(logits, target)
        nll.append(metrics.compute()["ensemble/nll"].item())
    assert abs(nll[0] - nll[1]) > 0.05


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_certain_members(average: Any):
    """Probabilities of exactly 1 must not be taken for logits, nor 0 · log 0 for NaN."""
    logits = torch.zeros(3, 8, 4)
    logits[..., 1] = 500.0
    target = torch.tensor([1] * 6 + [0] * 2)
    metrics = EnsembleMetrics(4, 3, average=average)
    metrics.update(logits, target)
    found = metrics.compute()
    for name in ("member_0", "ensemble"):
        assert found[f"{name}/accuracy"] == 0.75
        assert found[f"{name}/ece"].item() == pytest.approx(0.25)
        assert found[f"{name}/nll"].item() == pytest.approx(500 / 4)
    assert found["ensemble/entropy"] == 0
    assert found["disagreement"] == 0


def test_rounding_does_not_lift_a_probability_above_one():
    """The mean of seven certain members can round to 1 + 1e-7, which torchmetrics would take for a logit."""
    logits = torch.zeros(7, 1000, 3)
    logits[..., 0] = torch.rand(7, 1000) * 40
    metrics = EnsembleMetrics(3, 7, average="probabilities")
    target = torch.zeros(1000, dtype=torch.long)
    metrics.update(logits, target)
    expected = expected_of(logits, target, "probabilities", 15)
    assert metrics.compute()["ensemble/ece"].item() == pytest.approx(expected["ensemble/ece"], abs=1e-5)
    assert (ensemble_entropy(logits, "probabilities") >= 0).all()


@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_entropy_and_disagreement(members: int, batch: int, classes: int, seed: int):
    logits = torch.randn(members, batch, classes, generator=torch.Generator().manual_seed(seed)) * 3
    for average in ("logits", "probabilities"):
        entropy = ensemble_entropy(logits, average)  # type: ignore[arg-type]
        assert entropy.shape == (batch,)
        assert (entropy >= 0).all()
        assert (entropy <= math.log(classes) + 1e-5).all()
    assert 0 <= disagreement(logits) <= 1
    assert disagreement(logits[:1]) == 0
    assert disagreement(torch.cat((logits, logits[:1])).flip(0)) == disagreement(
        torch.cat((logits, logits[:1]))
    )


def test_disagreement_by_hand():
    votes = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [0, 2, 0, 0]])
    pairs = (2 + 2 + 3) / 4 / 3
    assert disagreement(F.one_hot(votes, 3).float()).item() == pytest.approx(pairs)
    assert disagreement(F.one_hot(votes[:2], 3).float()) == 0.5


def test_entropy_by_hand():
    assert ensemble_entropy(torch.zeros(2, 1, 4)).item() == pytest.approx(math.log(4))
    opposed = torch.tensor([[[40.0, -40.0]], [[-40.0, 40.0]]])
    for average in ("logits", "probabilities"):
        assert ensemble_entropy(opposed, average).item() == pytest.approx(math.log(2))  # type: ignore[arg-type]


def test_half_precision_is_measured_in_single():
    logits, target = (torch.randn(2, 30, 4) * 2).bfloat16(), torch.randint(4, (30,))
    metrics = EnsembleMetrics(4, 2)
    metrics.update(logits, target)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(expected_of(logits, target, "logits", 15), abs=1e-5)


def test_metrics_leave_no_trace_in_a_model():
    logits, target = torch.randn(2, 6, 4, requires_grad=True), torch.randint(4, (6,))
    metrics = EnsembleMetrics(4, 2)
    metrics.update(logits, target)
    assert metrics.state_dict() == {}
    assert list(metrics.parameters()) == []
    assert not any(value.requires_grad for value in metrics.compute().values())
    twin = copy.deepcopy(metrics)
    twin.update(-logits, target)
    assert twin.compute()["ensemble/nll"] != metrics.compute()["ensemble/nll"]


def test_metrics_move_with_their_holder():
    holder = torch.nn.Sequential(EnsembleMetrics(4, 2)).to("meta")
    holder[0].update(torch.randn(2, 6, 4, device="meta"), torch.zeros(6, dtype=torch.long, device="meta"))
    assert all(m.device.type == "meta" for m in holder.modules() if hasattr(m, "update_count"))


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.zeros(3, 5, 4), torch.zeros(5).long()),
        (torch.zeros(2, 5, 3), torch.zeros(5).long()),
        (torch.zeros(2, 5, 4), torch.zeros(4).long()),
        (torch.zeros(2, 5, 4), torch.zeros(5, 4)),
        (torch.zeros(2, 5, 4), torch.zeros(5)),
        (torch.zeros(5, 4), torch.zeros(5).long()),
    ],
)
def test_other_shapes_are_refused(logits: Tensor, target: Tensor):
    metrics = EnsembleMetrics(4, 2)
    with pytest.raises(TargetError, match=r"take logits \(M, B, K\) = \(2, B, 4\)"):
        metrics.update(logits, target)
    with pytest.raises(ConfigError, match="nothing to compute"):
        metrics.compute()


@pytest.mark.parametrize("wrong", [{"members": 0}, {"num_classes": 1}, {"n_bins": 0}])
def test_sizes_out_of_range(wrong: dict[str, int]):
    with pytest.raises(ConfigError, match="1 or more members and bins and 2 or more classes"):
        EnsembleMetrics(**{"num_classes": 4, "members": 2, **wrong})  # type: ignore[arg-type]


def test_an_unknown_average():
    with pytest.raises(ConfigError, match="average must be 'logits' or 'probabilities', got 'votes'"):
        EnsembleMetrics(4, 2, average="votes")  # type: ignore[arg-type]


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "torchmetrics":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r'pip install "fxgraft\[metrics\]"'):
        EnsembleMetrics(4, 2)
    assert disagreement(torch.zeros(2, 3, 4)) == 0
    assert ensemble_entropy(torch.zeros(2, 3, 4)).shape == (3,)
