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
from fxgraft.patches.mixmo.calibration import fit_temperature
from fxgraft.patches.mixmo.ensemble_metrics import EnsembleMetrics, disagreement, ensemble_entropy


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("temperature", [None, "fit"])
def test_rows_that_are_left_out_and_narrow_labels(dtype: torch.dtype, temperature):
    logits, target = torch.randn(2, 30, 4) * 2, torch.randint(4, (30,))
    whole, parts = (
        EnsembleMetrics(4, 2, temperature=temperature),
        EnsembleMetrics(4, 2, temperature=temperature),
    )
    whole.update(logits[:, ::2], target[::2])
    if not dtype.is_signed:
        parts.update(logits[:, ::2], target[::2].to(dtype))
    else:
        marked = target.to(dtype)
        marked[1::2] = -100
        parts.update(logits, marked)
        parts.update(logits, torch.full_like(marked, -100))
    found = {name: value.item() for name, value in parts.compute().items()}
    assert found == pytest.approx({name: value.item() for name, value in whole.compute().items()}, abs=1e-6)
    torch.testing.assert_close(
        fit_temperature(logits[0], target.to(dtype)), fit_temperature(logits[0], target)
    )


@pytest.mark.parametrize("wrong", [-1, 4, 255])
def test_labels_that_are_no_class(wrong: int):
    with pytest.raises(TargetError, match=rf"from {min(wrong, 0)} to {max(wrong, 0)}(?s:.*)relabel"):
        EnsembleMetrics(4, 2).update(torch.zeros(2, 2, 4), torch.tensor([0, wrong]))
    metrics = EnsembleMetrics(4, 2)
    metrics.update(torch.zeros(2, 2, 4), torch.tensor([-100, -100]))
    with pytest.raises(ConfigError, match="nothing to compute"):
        metrics.compute()


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


@pytest.mark.parametrize(
    "wrong", [{"members": 0}, {"num_classes": 0}, {"n_bins": 0}, {"n_bins": 2.5}, {"num_classes": "7"}]
)
def test_sizes_out_of_range(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match="whole numbers of members, bins and classes, 1 or more"):
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


# Temperatures.


def too_sure(*temperatures: float) -> tuple[Tensor, Tensor]:
    """Members that are right in three of four samples, and too sure by these factors: fitted, all say 3/4."""
    guess, target = torch.arange(8) % 2, torch.tensor([0, 1, 0, 1, 0, 1, 1, 0])
    sides = torch.stack((1.0 - guess, 1.0 * guess), 1)
    return torch.stack([t * math.log(3) * sides for t in temperatures]), target


@pytest.mark.parametrize("factor", [0.05, 0.5, 1.0, 2.5, 80.0])
def test_a_known_temperature_is_found(factor: float):
    logits, target = too_sure(factor)
    found = fit_temperature(logits[0].double(), target)
    assert found.item() == pytest.approx(factor, rel=1e-6)
    assert found.dtype == torch.float64
    torch.testing.assert_close(fit_temperature(logits[0].log_softmax(1), target), found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_scaled_metrics_of_fitted_temperatures(average: Any):
    logits, target = too_sure(2.5, 0.5)
    fitted = EnsembleMetrics(2, 2, average=average, temperature="fit")
    for rows in (slice(0, 3), slice(3, 8)):
        fitted.update(logits[:, rows], target[rows])
    chance = sum(1 / (1 + 3**-t) for t in (2.5, 0.5)) / 2
    together = 1.5 if average == "logits" else math.log(chance / (1 - chance)) / math.log(3)
    expected = {"member_0": 2.5, "member_1": 0.5, "ensemble": together}
    assert fitted.temperatures() == pytest.approx(expected, rel=1e-5)
    given = EnsembleMetrics(2, 2, average=average, temperature=fitted.temperatures())
    given.update(logits, target)
    plain = EnsembleMetrics(2, 2, average=average)
    plain.update(logits, target)
    found, before = fitted.compute(), plain.compute()
    assert {name: value.item() for name, value in given.compute().items()} == pytest.approx(
        {name: value.item() for name, value in found.items()}
    )
    assert {name: found[name].item() for name in before} == pytest.approx(
        {name: value.item() for name, value in before.items()}
    )
    for name, temperature in expected.items():
        assert found[f"{name}/temperature"].item() == pytest.approx(temperature, rel=1e-5)
        assert found[f"{name}/nll_scaled"].item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-5)
        assert found[f"{name}/ece_scaled"].item() == pytest.approx(0, abs=1e-5)
        assert before[f"{name}/ece"] > 0.03
    fitted.reset()
    with pytest.raises(ConfigError, match="nothing to compute"):
        fitted.temperatures()


@given(st.integers(2, 6), st.integers(4, 40), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_no_other_temperature_is_better(classes: int, samples: int, seed: int):
    torch.manual_seed(seed)
    logits, target = 3 * torch.randn(samples, classes).double(), torch.randint(classes, (samples,))
    found = fit_temperature(logits, target)
    best = F.cross_entropy(logits / found, target)
    for other in torch.logspace(-2, 2, 41).double():
        assert F.cross_entropy(logits / other, target) >= best - 1e-12
    assert torch.equal(fit_temperature(logits, target), found)


def test_temperatures_end_where_nothing_is_to_be_weighed():
    logits, target = torch.eye(3).double(), torch.arange(3)
    assert fit_temperature(logits, target).item() == pytest.approx(0.01)
    assert fit_temperature(-logits, target).item() == pytest.approx(100)


def test_one_temperature_for_all_and_its_formula():
    logits, target = 2 * torch.randn(2, 50, 4), torch.randint(4, (50,))
    metrics = EnsembleMetrics(4, 2, average="probabilities", temperature=2.0)
    metrics.update(logits, target)
    found = metrics.compute()
    together = logits.softmax(2).mean(0).log() / 2
    for name, each in (("member_1", logits[1] / 2), ("ensemble", together)):
        assert found[f"{name}/nll_scaled"].item() == pytest.approx(F.cross_entropy(each, target).item())
        assert found[f"{name}/ece_scaled"].item() == pytest.approx(
            calibration_error(each.softmax(1), target, 15), abs=1e-5
        )
    assert metrics.temperatures() == {"member_0": 2.0, "member_1": 2.0, "ensemble": 2.0}


def test_what_is_no_tensor_is_refused():
    metrics, logits, target = EnsembleMetrics(4, 2), torch.zeros(2, 8, 4), torch.zeros(8).long()
    for wrong in ((logits.numpy(), target), (logits, target.tolist())):
        with pytest.raises(TargetError, match=r"counted of tensors(?s:.*)torch\.as_tensor"):
            metrics.update(*wrong)


@pytest.mark.parametrize(
    "temperature",
    [0, -1.0, math.inf, math.nan, True, "fitted", {"ensemble": 1.0}, {"member_0": 1.0, "ensemble": 0}],
)
def test_temperatures_that_cannot_be(temperature: Any):
    with pytest.raises(ConfigError, match=r"one for each of member_0, ensemble(.|\n)*temperatures\(\)"):
        EnsembleMetrics(4, 1, temperature=temperature)
    with pytest.raises(ConfigError, match="have no temperatures"):
        EnsembleMetrics(4, 1).temperatures()


@pytest.mark.parametrize("measure", [disagreement, ensemble_entropy])
@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 3, 4, 5)])
def test_logits_without_members(measure: Any, shape: tuple[int, ...]):
    with pytest.raises(TargetError, match=r"by their logits \(M, B, K\)"):
        measure(torch.randn(shape))


def test_no_such_average():
    with pytest.raises(ConfigError, match="average must be 'logits' or 'probabilities', got 'mean'"):
        ensemble_entropy(torch.randn(2, 4, 5), "mean")
