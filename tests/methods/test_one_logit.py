"""Losses and metrics of one logit, and of several labels for each image."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from models.toys import images, net

SIZE = (3, 8, 8)
YES = torch.tensor([0, 1, 1, 0])
BCE = F.binary_cross_entropy_with_logits


def one(classes: int = 1) -> nn.Module:
    model = net()
    torch.manual_seed(1)
    model.fc = nn.Linear(16, classes)
    return model


def binary(out: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return BCE(out.flatten(), y.float().flatten(), reduction=reduction)


def numbers(out: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.mse_loss(out.flatten(), y.flatten(), reduction=reduction)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The gradient-boosting loss.


@pytest.mark.parametrize("k", [1, 15])
@pytest.mark.parametrize("form", [lambda y: y, lambda y: y.float(), lambda y: y.float().unsqueeze(1)])
def test_boosting_of_one_logit_is_binary_cross_entropy(form: Any, k: int) -> None:
    s = logits(4, 1).requires_grad_()
    ours = fxgraft.gradient_boosting_cross_entropy(s, form(YES), k=k)
    torch.testing.assert_close(ours, BCE(s[:, 0], YES.float()))
    ours.backward()
    torch.testing.assert_close(s.grad[:, 0], (s.detach()[:, 0].sigmoid() - YES) / 4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_boosting_of_one_logit_takes_the_options_of_cross_entropy(reduction: Any) -> None:
    s, y = logits(4, 1, 5, 5), torch.randint(2, (4, 5, 5))
    y[0] = 255
    options: dict[str, Any] = {
        "reduction": reduction, "ignore_index": 255, "label_smoothing": 0.1, "weight": torch.tensor([1.0, 3.0])
    }  # fmt: skip
    two = torch.cat((torch.zeros_like(s), s), 1)
    torch.testing.assert_close(
        fxgraft.gradient_boosting_cross_entropy(s, y, **options), F.cross_entropy(two, y, **options)
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(4), "levels from 0 to 3"),
        (torch.linspace(0, 9, 4), "numbers from 0 to 9(?s:.*)regression"),
    ],
)
def test_boosting_refuses_what_is_no_answer(labels: Tensor, message: str) -> None:
    with pytest.raises(fxgraft.TargetError, match=message):
        fxgraft.gradient_boosting_cross_entropy(logits(4, 1), labels)


def test_boosting_refuses_several_labels() -> None:
    with pytest.raises(
        fxgraft.TargetError, match=r"several labels for one image(?s:.*)binary_cross_entropy_with_logits"
    ):
        fxgraft.gradient_boosting_cross_entropy(logits(4, 3), torch.ones(4, 3))


# CrossNorm's consistency.


def bernoulli(*all_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of Bernoulli distributions, written out."""
    p = torch.stack([each.sigmoid() for each in all_logits])
    m = p.mean(0)
    divergence = p * (p / m).log() + (1 - p) * ((1 - p) / (1 - m)).log()
    return divergence.mean()


def test_the_divergence_of_one_logit_is_that_of_bernoulli_distributions() -> None:
    three = [logits(6, 1, seed=i) for i in range(3)]
    torch.testing.assert_close(fxgraft.functional.jensen_shannon(*three), bernoulli(*three))
    assert fxgraft.functional.jensen_shannon(three[0], three[0]).abs() < 1e-7
    maps = [logits(2, 1, 4, 4, seed=i) for i in range(2)]
    torch.testing.assert_close(fxgraft.functional.jensen_shannon(*maps), bernoulli(*maps))


def test_the_divergence_of_several_labels_is_the_mean_over_them() -> None:
    three = [logits(6, 5, seed=i) for i in range(3)]
    ours = fxgraft.functional.jensen_shannon(*three, probability="sigmoid")
    torch.testing.assert_close(ours, bernoulli(*three))
    assert not torch.allclose(ours, fxgraft.functional.jensen_shannon(*three))
    with pytest.raises(fxgraft.ConfigError, match="softmax of a single logit is 1"):
        fxgraft.functional.jensen_shannon(logits(2, 1), logits(2, 1), probability="softmax")


def test_consistency_of_one_logit_is_a_term_of_the_loss() -> None:
    model = fxgraft.patch(one(), "crossnorm", p=1.0, consistency=True, input_size=SIZE)

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        return BCE(out[:, 0], y.float())

    out = model(images(), target=YES)
    parts = fxgraft.losses(model, out, YES, criterion)
    assert parts["crossnorm.consistency"] > 1e-6
    torch.testing.assert_close(parts["criterion"], criterion(out, YES))
    with pytest.raises(
        fxgraft.TargetError, match=r"'crossnorm' was given numbers from 0 to 9(?s:.*)regression"
    ):
        fxgraft.losses(model, model(images()), torch.linspace(0, 9, 4), lambda o, y: F.mse_loss(o[:, 0], y))


def test_consistency_of_several_labels() -> None:
    model = fxgraft.patch(
        one(3), "crossnorm", p=1.0, consistency=True, probability="sigmoid", input_size=SIZE
    )
    y = torch.ones(4, 3)
    assert fxgraft.losses(model, model(images()), y, BCE)["crossnorm.consistency"] > 0


# MixMo.


@pytest.mark.parametrize(
    ("criterion", "labels"),
    [
        (BCE, YES.float().unsqueeze(1)),
        (nn.BCEWithLogitsLoss(), YES.float().unsqueeze(1)),
        (binary, YES),
        (numbers, torch.linspace(-3, 9, 4)),
    ],
)
def test_members_of_one_logit_have_the_criterion_row_by_row(criterion: Any, labels: Tensor) -> None:
    model = fxgraft.patch(one(), "mixmo", input_size=SIZE)
    (graft,) = fxgraft.grafts(model)
    out = model(images(), target=labels)
    ours = fxgraft.loss(model, out, labels, criterion)
    pairing = graft.recall(out)
    by_hand = torch.zeros(())
    for member, order in enumerate(pairing.permutations):
        for row in range(4):
            value = criterion(out[member, row : row + 1], labels[order][row : row + 1])
            by_hand = by_hand + pairing.weights[row, member] * value / 4
    torch.testing.assert_close(ours, by_hand)
    ours.backward()


def test_members_of_several_labels_have_the_mean_over_them() -> None:
    model = fxgraft.patch(one(3), "mixmo", members=1, input_size=SIZE)
    y = torch.ones(4, 3)
    out = model(images(), target=y)
    torch.testing.assert_close(fxgraft.loss(model, out, y, BCE), BCE(out[0], y))


@pytest.mark.parametrize(
    "criterion",
    [F.cross_entropy, nn.CrossEntropyLoss(), functools.partial(F.cross_entropy, label_smoothing=0.1)],
)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mixmo", {}),
        ("rsc", {}),
        ("crossnorm", {"p": 1.0, "consistency": True}),
        ("diversification", {}),
        ("diversification", {"loss": "gradient_boosting", "loss_start": 0.5}),
    ],
)
def test_the_cross_entropy_of_one_logit_is_refused(
    method: str, options: dict[str, Any], criterion: Any
) -> None:
    model = fxgraft.patch(one(), method, input_size=SIZE, **options)
    with pytest.raises(fxgraft.ConfigError, match="cross-entropy of one logit, which is 0"):
        fxgraft.loss(model, model(images(), target=YES), YES, criterion)


def test_the_cross_entropy_of_one_logit_that_was_squeezed_is_refused() -> None:
    model = fxgraft.patch(Squeezed(True), "rsc", layer="body.stage2", input_size=SIZE)
    with pytest.raises(fxgraft.ConfigError, match="cross-entropy of one logit, which is 0"):
        fxgraft.loss(model, model(images(), target=YES), YES.float())


def test_several_labels_for_one_logit_are_refused() -> None:
    model = fxgraft.patch(one(), "mixmo", input_size=SIZE)
    with pytest.raises(fxgraft.TargetError, match=r"labels of shape \(4, 2\) for one logit per image"):
        model(images(), target=torch.ones(4, 2))


def test_other_grafts_see_mixed_answers() -> None:
    model = fxgraft.patch(one(), "mixmo", input_size=SIZE)
    fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE, batch_share=1.0)
    x, mixed = fxgraft.mixmo.input_cutmix(images(), YES)
    for labels in (YES, mixed):
        out = model(x, target=labels)
        assert fxgraft.loss(model, out, labels, binary).isfinite()


# Metrics.


def test_metrics_of_one_logit_are_those_of_two_classes() -> None:
    pytest.importorskip("torchmetrics")
    s = logits(2, 40, 1)
    y = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))
    two = torch.cat((torch.zeros_like(s), s), -1)
    torch.testing.assert_close(fxgraft.mixmo.disagreement(s), ((s[0] > 0) != (s[1] > 0)).float().mean())
    p = s.mean(0)[:, 0].sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(fxgraft.mixmo.ensemble_entropy(s), entropy)
    assert fxgraft.mixmo.ensemble_entropy(torch.zeros(2, 1, 1)).item() == pytest.approx(math.log(2))
    for temperature in (None, 2.0, "fit"):
        ours = fxgraft.mixmo.EnsembleMetrics(1, 2, temperature=temperature)
        theirs = fxgraft.mixmo.EnsembleMetrics(2, 2, temperature=temperature)
        ours.update(s, y.float().unsqueeze(1))
        theirs.update(two, y)
        expected = theirs.compute()
        assert ours.compute().keys() == expected.keys()
        for name, value in ours.compute().items():
            torch.testing.assert_close(value, expected[name], msg=name)


def test_metrics_refuse_what_is_neither_right_nor_wrong() -> None:
    pytest.importorskip("torchmetrics")
    with pytest.raises(
        fxgraft.TargetError, match=r"single logit is measured with labels 0 and 1(?s:.*)Round"
    ):
        fxgraft.mixmo.EnsembleMetrics(1, 2).update(logits(2, 4, 1), torch.linspace(0, 1, 4))
    with pytest.raises(fxgraft.TargetError, match="Measure several labels one by one"):
        fxgraft.mixmo.EnsembleMetrics(3, 2).update(logits(2, 4, 3), torch.ones(4, 3))


def test_members_of_one_logit_by_name() -> None:
    model = fxgraft.patch(one(), "mixmo", input_size=SIZE).eval()
    found = fxgraft.mixmo.member_logits(model, images())
    assert found.logits.shape == (2, 4, 1)
    assert (found.entropy > 0).all()


class Squeezed(nn.Module):
    """Gives its one logit as (B,), as many binary classifiers do."""

    def __init__(self, squeezed: bool) -> None:
        super().__init__()
        self.body, self.squeezed = one(), squeezed

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return out.squeeze(1) if self.squeezed else out


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rsc", {"layer": "body.stage2", "batch_share": 0.5}),
        ("rsc", {"layer": "body.stage1", "batch_share": 0.5}),
        ("crossnorm", {"p": 1.0, "consistency": True}),
    ],
)
def test_a_logit_that_was_squeezed_is_one_logit(method: str, options: dict[str, Any]) -> None:
    found = []
    for squeezed in (True, False):
        model = fxgraft.patch(Squeezed(squeezed), method, input_size=SIZE, **options)
        torch.manual_seed(2)
        out = model(images(), target=YES)
        found.append([out.flatten(), fxgraft.loss(model, out, YES, binary)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_consistency_refuses_labels_that_are_no_distribution_unless_it_is_said_what_they_are() -> None:
    several = torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]])
    for labels, criterion in ((several, BCE), (torch.linspace(-3, 9, 12).view(4, 3), F.mse_loss)):
        model = fxgraft.patch(one(3), "crossnorm", p=1.0, consistency=True, input_size=SIZE)
        with pytest.raises(
            fxgraft.TargetError, match=r"aren.t a distribution over the classes(?s:.*)probability=\"sigmoid\""
        ):
            fxgraft.loss(model, model(images()), labels, criterion)


def test_members_of_a_logit_that_was_squeezed_are_asked_for_with_their_dimension() -> None:
    with pytest.raises(fxgraft.StructureError, match=r"Return the one logit as \(B, 1\)"):
        fxgraft.patch(Squeezed(True), "mixmo", input_size=SIZE)
