"""The user's criterion in MixMo's loss: asked for its rows, or called as it is, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import fxgraft
from fxgraft import ConfigError
from methods.mixmo.mixing import last_pairing, patched
from models.small import CLASSES, batch

WEIGHT = torch.linspace(1, 20, CLASSES)
SOFT = torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)


def step(criterion: Any, y: Tensor | None = None, **options: Any) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Return the loss of a pass, and for each member its logits, labels and weights."""
    torch.manual_seed(0)
    model = patched(**options)
    x, labels = batch()
    y = labels if y is None else y
    out = model(x, target=y)
    last = last_pairing(model)
    parts = [(out[i], y[order], last.weights[:, i]) for i, order in enumerate(last.permutations)]
    return fxgraft.loss(model, out, y, criterion), parts


def ranked(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none").topk(3).values.mean()


def teaches(out: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    rows = F.kl_div(out.log_softmax(1), SOFT, reduction="none").sum(1)
    return rows if reduction == "none" else rows.mean()


class Ranked(nn.CrossEntropyLoss):
    """Says what it reduces by, and reduces by its own rule."""

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return ranked(out, y)


class Counts(nn.Module):
    """Has a state of its own, in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction, self.calls = "mean", 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return F.cross_entropy(out, y, reduction=self.reduction)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: F.cross_entropy(out, y, weight=WEIGHT),
        lambda out, y: F.cross_entropy(out, y, weight=torch.full((CLASSES,), 10.0)),
        lambda out, y: F.kl_div(out.log_softmax(1), SOFT, reduction="batchmean"),
        ranked,
        Ranked(),
        LabelSmoothingCrossEntropy(),
        SoftTargetCrossEntropy(),
        BinaryCrossEntropy(sum_classes=True),
    ],
)
def test_one_value_for_a_batch_cannot_be_weighed(criterion: Callable[..., Tensor]) -> None:
    y = SOFT if isinstance(criterion, SoftTargetCrossEntropy) else None
    with pytest.raises(ConfigError, match=r"gives one value for a batch(?s:.*)functools\.partial"):
        step(criterion, y)


@pytest.mark.parametrize(
    "criterion",
    [
        teaches,
        functools.partial(F.binary_cross_entropy_with_logits, weight=torch.arange(6.0).unsqueeze(1)),
        nn.BCEWithLogitsLoss(weight=torch.arange(6.0).unsqueeze(1)),
    ],
)
def test_data_of_the_batch_has_another_order_than_the_members(criterion: Callable[..., Tensor]) -> None:
    for mixing in ("cut", "sum"):
        with pytest.raises(ConfigError, match=r"another value where the rows(?s:.*)inside the labels"):
            step(criterion, SOFT, mixing=mixing)


@pytest.mark.parametrize(
    "criterion", [ranked, Ranked(), lambda out, y: F.cross_entropy(out, y, weight=WEIGHT)]
)
def test_equal_weights_need_no_rows(criterion: Callable[..., Tensor]) -> None:
    for options in ({"mixing": "sum"}, {"mixing": "sum", "members": 3}):
        loss, parts = step(criterion, **options)
        torch.testing.assert_close(loss, sum(criterion(out, y) for out, y, _ in parts))


def test_divergences_by_the_batch() -> None:
    rows: Callable[[Tensor, Tensor], Tensor] = lambda out, y: F.kl_div(out, y, reduction="none").sum(1)  # noqa: E731
    for criterion in (
        nn.KLDivLoss(reduction="batchmean"),
        functools.partial(F.kl_div, reduction="batchmean"),
    ):
        loss, parts = step(criterion, SOFT)
        torch.testing.assert_close(loss, sum((w * rows(out, y)).mean() for out, y, w in parts))


def test_what_reduces_nothing_gives_a_value_for_each_mixture() -> None:
    loss, parts = step(nn.CrossEntropyLoss(reduction="none", weight=WEIGHT))
    assert loss.shape == (6,)
    torch.testing.assert_close(
        loss, sum(w * F.cross_entropy(out, y, WEIGHT, reduction="none") for out, y, w in parts)
    )
    mean, _ = step(nn.CrossEntropyLoss(weight=WEIGHT))
    torch.testing.assert_close(mean, loss.mean())


def test_a_criterion_keeps_its_own_state() -> None:
    criterion = Counts()
    loss, parts = step(criterion)
    assert (criterion.calls, criterion.seen.item(), criterion.reduction) == (2, 2, "mean")
    torch.testing.assert_close(
        loss, sum((w * F.cross_entropy(out, y, reduction="none")).mean() for out, y, w in parts)
    )


def test_a_model_and_its_loss_compile_in_one_graph() -> None:
    torch.compiler.reset()
    model, (x, y) = patched(), batch()

    @torch.compile(fullgraph=True, backend="eager")
    def both(x: Tensor, y: Tensor) -> Tensor:
        return fxgraft.loss(model, model(x, target=y), y)

    both(x, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
