"""Gradient-boosting cross-entropy: against the reference numbers, cross-entropy, and the formula."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fxgraft
from fxgraft.errors import ConfigError, TargetError
from fxgraft.patches.diversification.loss import GradientBoostingCrossEntropy, gradient_boosting_cross_entropy
from golden_data import load_golden

CASES = [pytest.param(case, id=str(case)) for case in load_golden("gbloss")]


def scores(batch: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(classes, (batch,), generator=g)


def by_sorting(logits: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
    """The formula, one sample at a time."""
    values = []
    for row, label in zip(logits, target.tolist(), strict=True):
        wrong = torch.cat((row[:label], row[label + 1 :])).sort(descending=True).values[:k]
        values.append(torch.cat((row[label : label + 1], wrong)).logsumexp(0) - row[label])
    return torch.stack(values)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_those_of_the_reference(case, dtype):
    inputs = case.inputs_as(dtype)
    logits = inputs["logits"].requires_grad_()
    loss = GradientBoostingCrossEntropy(case.settings["k"])(logits, inputs["y"])
    loss.backward()
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-14, "rtol": 1e-14}
    torch.testing.assert_close(loss, case.expected("loss", dtype).to(dtype).reshape(()), **close)
    torch.testing.assert_close(logits.grad, case.expected("grad", dtype).to(dtype), **close)


@given(st.integers(1, 6), st.integers(2, 30), st.integers(1, 40), st.integers(0, 2**16))
def test_the_formula_for_any_k(batch, classes, k, seed):
    logits, target = scores(batch, classes, seed)
    loss = gradient_boosting_cross_entropy(logits, target, k=k, reduction="none")
    torch.testing.assert_close(loss, by_sorting(logits, target, min(k, classes - 1)))


@pytest.mark.parametrize("extra", [0, 1, 100])
def test_from_all_wrong_classes_on_it_is_cross_entropy_bit_for_bit(extra):
    logits, target = scores(5, 12)
    weight = torch.rand(12, dtype=torch.float64)
    options = {"weight": weight, "ignore_index": 3, "label_smoothing": 0.1}
    ours = gradient_boosting_cross_entropy(logits, target, k=11 + extra, **options)
    assert torch.equal(ours, F.cross_entropy(logits, target, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_options_are_those_of_cross_entropy_over_the_chosen_classes(reduction, smoothing, weighted):
    # With the k + 1 classes that count moved to the front of a smaller problem, cross-entropy is the answer.
    k, classes = 3, 9
    logits, _ = scores(6, classes)
    target = logits.detach().argmax(1)
    target[1] = -100
    chosen = logits.detach().topk(k + 1, dim=1).indices
    small = logits.gather(1, chosen)
    weight = torch.rand(classes, dtype=torch.float64) + 0.5 if weighted else None
    ours = gradient_boosting_cross_entropy(
        logits, target, k=k, weight=weight, reduction=reduction, label_smoothing=smoothing
    )
    rows = [
        F.cross_entropy(
            small[i : i + 1],
            torch.zeros(1, dtype=torch.long),
            None if weight is None else weight[chosen[i]],
            reduction="none",
            label_smoothing=smoothing,
        )[0]
        * (target[i] >= 0)
        for i in range(6)
    ]
    share = (target >= 0).double() if weight is None else weight[target.clamp(min=0)] * (target >= 0)
    expected = torch.stack(rows)
    if reduction == "sum":
        expected = expected.sum()
    elif reduction == "mean":
        expected = expected.sum() / share.sum()
    torch.testing.assert_close(ours, expected)


def test_ignored_entries_get_no_gradient():
    logits, target = scores(4, 40)
    target[2] = 255
    gradient_boosting_cross_entropy(logits, target, k=5, ignore_index=255).backward()
    assert not logits.grad[2].any()
    assert logits.grad[[0, 1, 3]].any(1).all()


def test_only_the_label_and_the_k_highest_get_a_gradient():
    logits, target = scores(4, 40)
    gradient_boosting_cross_entropy(logits, target, k=5).backward()
    assert (logits.grad != 0).sum(1).tolist() == [6] * 4
    assert (logits.grad.gather(1, target[:, None]) < 0).all()


def test_dense_predictions_and_single_samples():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, 3, 4, generator=g)
    target = torch.randint(20, (2, 3, 4), generator=g)
    rows = logits.movedim(1, -1).reshape(-1, 20)
    none = gradient_boosting_cross_entropy(logits, target, k=4, reduction="none")
    assert none.shape == target.shape
    torch.testing.assert_close(none.flatten(), by_sorting(rows, target.flatten(), 4))
    single = gradient_boosting_cross_entropy(rows[0], target.flatten()[0], k=4)
    torch.testing.assert_close(single, none.flatten()[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    logits, target = scores(6, 50)
    half = logits.detach().to(dtype).requires_grad_()
    loss = gradient_boosting_cross_entropy(half, target)
    torch.testing.assert_close(loss, gradient_boosting_cross_entropy(half.detach().float(), target))
    loss.backward()
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()


def test_compiles_in_one_graph():
    logits, target = scores(6, 50)
    loss = GradientBoostingCrossEntropy(7)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))


def test_the_module_keeps_its_weight_as_a_buffer():
    weight = torch.rand(20)
    loss = GradientBoostingCrossEntropy(3, weight=weight, label_smoothing=0.1)
    assert list(loss.state_dict()) == ["weight"]
    assert torch.equal(copy.deepcopy(loss).weight, weight)
    assert "k=3" in repr(loss)
    assert fxgraft.GradientBoostingCrossEntropy is GradientBoostingCrossEntropy


def test_soft_targets_are_refused():
    with pytest.raises(TargetError, match=r"soft targets of shape \(2, 5\)[\s\S]*mixup"):
        gradient_boosting_cross_entropy(torch.randn(2, 5), torch.rand(2, 5), k=2)


@pytest.mark.parametrize(
    ("target", "options", "error", "match"),
    [
        (
            [0, 9],
            {},
            TargetError,
            r"the label 9, and there are 5 classes(?s:.*)0 to 4, or ignore_index \(-100\)",
        ),
        ([0, -1], {}, TargetError, "the label -1, and"),
        (
            [0, 1],
            {"weight": torch.ones(6)},
            ConfigError,
            r"weight has the shape \(6,\), and there are 5 classes",
        ),
        ([0, 1], {"weight": torch.ones(3)}, ConfigError, r"weight has the shape \(3,\)"),
    ],
)
def test_labels_and_weights_are_those_of_the_classes(target, options, error, match):
    with pytest.raises(error, match=match):
        gradient_boosting_cross_entropy(torch.randn(2, 5), torch.tensor(target), k=2, **options)


def test_labels_may_be_bytes():
    logits, target = scores(6, 20)
    loss = gradient_boosting_cross_entropy(logits, target.to(torch.uint8), k=3)
    assert torch.equal(loss, gradient_boosting_cross_entropy(logits, target, k=3))


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_k_must_be_a_whole_number_from_one(k):
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        GradientBoostingCrossEntropy(k)
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        gradient_boosting_cross_entropy(torch.randn(2, 5), torch.zeros(2, dtype=torch.long), k=k)


def test_other_options_are_checked():
    with pytest.raises(ConfigError, match="label_smoothing must be a share"):
        GradientBoostingCrossEntropy(label_smoothing=1.5)
    with pytest.raises(ConfigError, match="reduction must be"):
        GradientBoostingCrossEntropy(reduction="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 2, 15])
@pytest.mark.parametrize(
    ("logits", "labels"),
    [((2, 7, 4, 6), (2, 6, 4)), ((2, 7, 4, 6), (2, 1, 4, 6)), ((4, 7), (4, 1)), ((4, 7), (3,)), ((7,), (1,))],
)
def test_labels_of_another_shape(logits: tuple[int, ...], labels: tuple[int, ...], k: int) -> None:
    with pytest.raises(TargetError, match=r"labels of shape .* for logits of shape(?s:.*)y\.squeeze\(1\)"):
        gradient_boosting_cross_entropy(torch.randn(logits), torch.zeros(labels, dtype=torch.int64), k=k)


@pytest.mark.parametrize("k", [2, 15])
def test_labels_of_no_class_whatever_k_is(k: int) -> None:
    with pytest.raises(TargetError, match="was given the label 12, and there are 10 classes"):
        gradient_boosting_cross_entropy(torch.randn(2, 10), torch.tensor([3, 12]), k=k)
    ignored = gradient_boosting_cross_entropy(torch.ones(2, 10), torch.tensor([3, -100]), k=k)
    torch.testing.assert_close(ignored, torch.tensor(1.0 + min(k, 9)).log())


def test_one_sample_of_one_logit_is_a_question() -> None:
    expected = F.binary_cross_entropy_with_logits(torch.tensor([2.0, 1.0]), torch.zeros(2), reduction="none")
    none = gradient_boosting_cross_entropy(torch.tensor([2.0]), torch.tensor(0), reduction="none")
    torch.testing.assert_close(none, expected[0])
    rows = torch.vmap(gradient_boosting_cross_entropy)(torch.tensor([[2.0], [1.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("k", [2, 15])
@pytest.mark.parametrize("classes", [1, 5])
def test_weights_of_another_type_than_logits(k: int, classes: int) -> None:
    logits, weight = torch.randn(4, classes), torch.rand(max(classes, 2))
    labels = torch.tensor([0, 1, 1, 0])
    value = gradient_boosting_cross_entropy(logits.bfloat16(), labels, k=k, weight=weight)
    expected = gradient_boosting_cross_entropy(logits, labels, k=k, weight=weight)
    torch.testing.assert_close(value.float(), expected, atol=0.03, rtol=0.03)


def test_what_is_not_a_tensor() -> None:
    with pytest.raises(TargetError, match="labels as a tensor, and was given a list"):
        gradient_boosting_cross_entropy(torch.randn(2, 5), [0, 1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight is a tensor"):
        gradient_boosting_cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), weight=[1.0] * 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight is a tensor"):
        GradientBoostingCrossEntropy(weight=[1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="label_smoothing must be a share"):
        GradientBoostingCrossEntropy(label_smoothing="a")  # type: ignore[arg-type]
