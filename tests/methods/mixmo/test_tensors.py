"""MixMo's arithmetic: ratios, mixing and its gradients, weights, pairs, losses of any criterion, mixed labels."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from fxgraft.errors import ConfigError, TargetError
from fxgraft.patches.diversification.loss import GradientBoostingCrossEntropy, gradient_boosting_cross_entropy
from fxgraft.patches.mixmo.masks import MIXINGS, draw_masks
from fxgraft.patches.mixmo.tensors import (
    MixedLabels,
    balance,
    cut_probability,
    dirichlet,
    input_cutmix,
    member_losses,
    mix,
    permutations,
    visible_shares,
)

BINARY = ("cut", "cow", "patchup_hard", "horizontal", "vertical", "channel", "stack_channel")


@given(st.floats(0.05, 50), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_ratios_sum_to_one(alpha: float, batch: int, members: int, seed: int):
    torch.manual_seed(seed)
    kappa = dirichlet(alpha, batch, members)
    assert kappa.shape == (batch, members)
    assert (kappa >= 0).all()
    torch.testing.assert_close(kappa.sum(1), torch.ones(batch))
    torch.manual_seed(seed)
    assert torch.equal(dirichlet(alpha, batch, members), kappa)


@pytest.mark.parametrize(("alpha", "members"), [(2.0, 2), (0.5, 2), (2.0, 3)])
def test_ratios_follow_dirichlet(alpha: float, members: int):
    kappa = dirichlet(alpha, 20000, members)
    mean = 1 / members
    deviation = math.sqrt(mean * (1 - mean) / (alpha * members + 1))
    assert kappa.mean(0).tolist() == pytest.approx([mean] * members, abs=0.01)
    assert kappa.std(0).tolist() == pytest.approx([deviation] * members, abs=0.01)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_must_be_positive(alpha: float):
    with pytest.raises(ConfigError, match=r'alpha must be above 0 and finite(.|\n)*mixing="sum"'):
        dirichlet(alpha, 4, 2)


@given(
    st.sampled_from(BINARY),
    st.integers(2, 4),
    st.sampled_from([None, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_an_encoder_is_reached_only_from_its_own_region(mixing, members, gain, dtype, seed):
    torch.manual_seed(seed)
    masks, _ = draw_masks(mixing, dirichlet(2.0, 3, members), 4, 7, 9)
    encodings = [torch.randn(3, 4, 7, 9).to(dtype).requires_grad_() for _ in range(members)]
    mixed = mix(encodings, masks, gain)
    cotangent = torch.rand(3, 4, 7, 9).to(dtype) + 1
    gradients = torch.autograd.grad(mixed, encodings, cotangent)
    for gradient, mask in zip(gradients, masks, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient != 0, (mask > 0).expand_as(gradient))


def test_the_gradient_stops_at_the_edge_of_the_region_in_the_encoders_too():
    """A kernel learns from the positions of its own region, as if the others had not been computed."""
    masks, _ = draw_masks("cut", torch.tensor([[0.5, 0.5]] * 4), 5, 8, 8)
    images = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    kernels = [torch.randn(5, 3, 3, 3, requires_grad=True) for _ in range(2)]
    cotangent = torch.randn(4, 5, 8, 8)
    mixed = mix([F.conv2d(x, w, padding=1) for x, w in zip(images, kernels, strict=True)], masks)
    gradients = torch.autograd.grad(mixed, kernels, cotangent)
    for gradient, image, mask in zip(gradients, images, masks, strict=True):
        expected = torch.nn.grad.conv2d_weight(image, gradient.shape, 2 * mask * cotangent, padding=1)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("gain", [None, 1.0, 0.5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_memory_order_are_kept(members: int, gain: float | None, layout, dtype: torch.dtype):
    masks, _ = draw_masks("linear", dirichlet(2.0, 3, members), 4, 6, 6)
    encodings = [torch.randn(3, 4, 6, 6).to(dtype).contiguous(memory_format=layout) for _ in range(members)]
    before = [encoding.clone() for encoding in encodings]
    mixed = mix(encodings, masks, gain)
    assert mixed.dtype == dtype
    assert mixed.stride() == encodings[0].stride()
    expected = (members if gain is None else gain) * sum(
        m.double() * e.double() for m, e in zip(masks, encodings, strict=True)
    )
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(mixed.double(), expected, rtol=tolerance, atol=tolerance)
    assert all(map(torch.equal, encodings, before))


@pytest.mark.parametrize("gain", [None, 1.0])
@pytest.mark.parametrize("members", [2, 3])
def test_a_float64_mixture_is_exact_for_masks_of_either_dtype(members: int, gain: float | None):
    masks, _ = draw_masks("linear", dirichlet(2.0, 3, members), 4, 6, 6)
    encodings = [torch.randn(3, 4, 6, 6, dtype=torch.float64) for _ in range(members)]
    factor = members if gain is None else gain
    # Two members without a factor need one mask only, and take its complement.
    used = [masks[0].double(), 1 - masks[0].double()] if (members, gain) == (2, 1.0) else masks.double()
    expected = factor * sum(m * e for m, e in zip(used, encodings, strict=True))
    torch.testing.assert_close(mix(encodings, masks, gain), expected, rtol=1e-14, atol=1e-14)


def test_a_single_member_is_left_alone():
    encoding = torch.randn(2, 3, 4, 4)
    masks, _ = draw_masks("cut", torch.ones(2, 1), 3, 4, 4)
    assert mix([encoding], masks) is encoding
    assert torch.equal(mix([encoding], masks, 2.0), 2 * encoding)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(0.5, 20),
)
@settings(max_examples=60, deadline=None)
def test_weights_sum_to_the_members(rows: list[list[float]], r: float):
    shares = torch.tensor(rows, dtype=torch.float64) + 1e-3
    shares = shares / shares.sum(1, keepdim=True)
    weights = balance(shares, r)
    torch.testing.assert_close(weights.sum(1), torch.full((len(rows),), 3.0, dtype=torch.float64))
    assert torch.equal(weights.argmax(1), shares.argmax(1)) or (shares.diff().abs() < 1e-9).any()


def test_weights_at_the_limits():
    shares = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    assert torch.equal(balance(shares, math.inf), torch.ones(3, 2))
    torch.testing.assert_close(balance(shares, 1), 2 * shares)
    assert torch.equal(balance(shares, 3)[0], torch.tensor([2.0, 0.0]))
    for r in (0, -3, math.nan):
        with pytest.raises(ConfigError, match="r must be above 0"):
            balance(shares, r)


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_every_member_sees_the_repeated_batch(batch, members, repetitions, kept, seed):
    torch.manual_seed(seed)
    pairs = permutations(batch, members, repetitions, kept=kept)
    assert torch.equal(pairs[0], torch.arange(batch).repeat(repetitions))
    assert pairs.shape == (members, batch * repetitions)
    assert torch.equal(pairs.sort(1).values, pairs[:1].sort(1).values.expand_as(pairs))
    fixed = int(kept * batch * repetitions)
    assert torch.equal(pairs[:, :fixed], pairs[:1, :fixed].expand(members, -1))
    torch.manual_seed(seed)
    assert torch.equal(permutations(batch, members, repetitions, kept=kept), pairs)


def test_pairs_are_uniform_and_members_independent():
    pairs = torch.stack([permutations(4, 3) for _ in range(3000)])
    for member in (1, 2):
        counts = torch.stack([torch.bincount(pairs[:, member, row], minlength=4) for row in range(4)])
        assert (counts / 750 - 1).abs().max() < 0.15
    assert (pairs[:, 1] == pairs[:, 2]).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("wrong", [{"repetitions": 0}, {"kept": -0.1}, {"kept": 1.5}])
def test_pairs_that_cannot_be_made(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="repeated 1 or more times"):
        permutations(4, 2, **wrong)


def test_the_probability_of_cutting_falls_at_the_end():
    assert [cut_probability(0.5, at) for at in (0, 0.5, 11 / 12)] == pytest.approx([0.5] * 3)
    assert cut_probability(0.5, 23 / 24) == pytest.approx(0.25)
    assert cut_probability(0.5, 1) == 0
    assert cut_probability(1.0, 0.75, decay=0.5) == pytest.approx(0.5)
    assert cut_probability(0.5, 1, decay=0) == 0.5


def plain(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.0])

# A criterion, and what it makes of one row.
CRITERIA: dict[str, tuple[Callable, Callable]] = {
    "function": (F.cross_entropy, F.cross_entropy),
    "partial": (functools.partial(F.cross_entropy, label_smoothing=0.1), plain),
    "partial_mean": (functools.partial(F.cross_entropy, label_smoothing=0.1, reduction="mean"), plain),
    "module": (nn.CrossEntropyLoss(label_smoothing=0.1), plain),
    "weighted": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        lambda logits, target: F.cross_entropy(logits, target, WEIGHT, reduction="sum"),
    ),
    "boosting": (GradientBoostingCrossEntropy(k=2), functools.partial(gradient_boosting_cross_entropy, k=2)),
    "boosting_function": (
        functools.partial(gradient_boosting_cross_entropy, k=2),
        functools.partial(gradient_boosting_cross_entropy, k=2),
    ),
    "timm_bce": (BinaryCrossEntropy(), BinaryCrossEntropy()),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("members", [2, 3])
def test_losses_weigh_every_row(name: str, members: int):
    criterion, one = CRITERIA[name]
    logits = torch.randn(members, 5, 4, requires_grad=True)
    targets = [torch.randint(4, (5,)) for _ in range(members)]
    weights = balance(dirichlet(2.0, 5, members))
    losses = member_losses(criterion, logits, targets, weights)
    expected = torch.stack(
        [
            sum(weights[b, i] * one(logits[i, b : b + 1], targets[i][b : b + 1]) for b in range(5)) / 5
            for i in range(members)
        ]
    )
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("criterion", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_soft_targets(criterion: Callable):
    logits, soft = torch.randn(2, 5, 4), torch.rand(2, 5, 4).softmax(-1)
    weights = balance(dirichlet(2.0, 5, 2))
    losses = member_losses(criterion, logits, list(soft), weights)
    rows = -(soft * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses, (rows * weights.t()).mean(1))


def test_indices_for_one_member_and_soft_targets_for_another():
    logits, labels, soft = torch.randn(2, 5, 4), torch.randint(4, (5,)), torch.rand(5, 4).softmax(-1)
    losses = member_losses(F.cross_entropy, logits, [labels, soft], torch.ones(5, 2))
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0], labels))
    torch.testing.assert_close(losses[1], F.cross_entropy(logits[1], soft))


def test_a_sum_stays_a_sum():
    logits, labels, weights = torch.randn(2, 5, 4), torch.randint(4, (2, 5)), balance(dirichlet(2.0, 5, 2))
    mean = member_losses(F.cross_entropy, logits, list(labels), weights)
    for total in (nn.CrossEntropyLoss(reduction="sum"), functools.partial(F.cross_entropy, reduction="sum")):
        torch.testing.assert_close(member_losses(total, logits, list(labels), weights), 5 * mean)
    elements = nn.BCEWithLogitsLoss(reduction="sum")
    soft = torch.rand(2, 5, 4)
    losses = member_losses(elements, logits, list(soft), torch.ones(5, 2))
    torch.testing.assert_close(losses[0], elements(logits[0], soft[0]))


def test_ignored_rows_count_in_the_batch_only():
    logits, labels = torch.randn(2, 4, 3), torch.tensor([0, -100, 2, 1])
    losses = member_losses(nn.CrossEntropyLoss(), logits, [labels, labels], torch.ones(4, 2))
    for i in range(2):
        torch.testing.assert_close(losses[i], F.cross_entropy(logits[i], labels) * 3 / 4)


def test_the_criterion_is_left_as_it_was():
    criterion = nn.CrossEntropyLoss(weight=WEIGHT.clone())
    before = dict(vars(criterion))
    member_losses(criterion, torch.randn(2, 5, 4), [torch.randint(4, (5,))] * 2, torch.ones(5, 2))
    assert vars(criterion) == before
    assert criterion.reduction == "mean"


@pytest.mark.parametrize("criterion", [F.cross_entropy, nn.CrossEntropyLoss(weight=WEIGHT), plain])
def test_a_single_member_has_the_plain_loss(criterion: Callable):
    logits, labels = torch.randn(1, 5, 4), torch.tensor([0, 1, -100, 3, 2])
    losses = member_losses(criterion, logits, [labels], torch.ones(5, 1))
    assert torch.equal(losses, criterion(logits[0], labels).unsqueeze(0))


def labels_of(batch: int = 4, size: int = 8) -> MixedLabels:
    mask = torch.zeros(batch, 1, size, size)
    for row in range(batch):
        mask[row, :, :, : row + 1] = 1
    return MixedLabels(torch.arange(batch) % 3, (torch.arange(batch) + 1) % 3, mask)


def test_mixed_labels_as_soft_targets():
    labels = labels_of()
    expected = torch.zeros(4, 3)
    for row in range(4):
        expected[row, row % 3] = (row + 1) / 8
        expected[row, (row + 1) % 3] = 1 - (row + 1) / 8
    assert torch.equal(labels.soft(3), expected)
    order = torch.tensor([2, 0, 0])
    assert len(labels[order]) == 3
    assert torch.equal(labels[order].soft(3), expected[order])
    assert torch.equal(labels.to("cpu").soft(3), expected)
    same = MixedLabels(labels.first, labels.first, labels.mask)
    assert torch.equal(same.soft(3), F.one_hot(labels.first, 3).float())


@pytest.mark.parametrize("size", [8, 4, 2])
def test_labels_follow_what_is_visible(size: int):
    left = torch.zeros(4, 1, size, size)
    left[..., : size // 2] = 1
    shares = visible_shares(labels_of().mask, left)
    torch.testing.assert_close(shares, torch.tensor([1, 2, 3, 4]) / 4)
    shares = visible_shares(labels_of().mask, 1 - left)
    assert torch.equal(shares, torch.zeros(4))
    assert torch.equal(labels_of().soft(3, 1 - left), F.one_hot(labels_of().second, 3).float())


@pytest.mark.parametrize("mixing", MIXINGS)
def test_visible_shares_of_all_members_at_once(mixing):
    mixed = (torch.rand(3, 4, 1, 8, 8) > 0.5).float()
    masks, _ = draw_masks(mixing, dirichlet(2.0, 4, 3), 5, 4, 4)
    shares = visible_shares(mixed, masks)
    assert shares.shape == (3, 4)
    if mixing in (
        "linear",
        "sum",
        "channel",
        "stack_channel",
    ):  # constant over space: nothing to correct, unless all is hidden
        seen = masks.mean((2, 3, 4)) > 0
        torch.testing.assert_close(shares[seen], mixed.mean((2, 3, 4))[seen], rtol=1e-4, atol=1e-5)
    for member in range(3):
        torch.testing.assert_close(shares[member], visible_shares(mixed[member], masks[member]))


@given(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9), st.floats(0.2, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_input_cutmix_takes_each_pixel_from_one_image(batch, height, width, alpha, seed):
    x, y = torch.rand(batch, 3, height, width), torch.randint(5, (batch,))
    torch.manual_seed(seed)
    mixed, labels = input_cutmix(x, y, alpha)
    own = (mixed == x).all(1, keepdim=True)
    assert torch.equal(own | (labels.mask == 0), torch.ones_like(own))
    assert torch.equal(mixed * labels.mask, x * labels.mask)
    assert torch.equal(labels.first, y)
    # What is not its own comes from one other image, whose label is the second.
    for row in range(batch):
        fits = [
            torch.equal(mixed[row] * (1 - labels.mask[row]), other * (1 - labels.mask[row]))
            and bool(label == labels.second[row])
            for other, label in zip(x, y, strict=True)
        ]
        assert any(fits)
    assert (labels.mask.mean((1, 2, 3)) >= 0.5).all()
    torch.testing.assert_close(labels.soft(5).sum(1), torch.ones(batch))
    torch.manual_seed(seed)
    assert torch.equal(input_cutmix(x, y, alpha)[0], mixed)


def test_input_cutmix_mixes():
    _, labels = input_cutmix(torch.rand(64, 3, 16, 16), torch.arange(64))
    shares = labels.mask.mean((1, 2, 3))
    assert 0.6 < shares.mean() < 0.95
    assert shares.unique().numel() > 10
    assert (labels.second != labels.first).float().mean() > 0.8
    assert sorted(labels.second.tolist()) == list(range(64))


@pytest.mark.parametrize("mixing", ["cut", "linear", "channel", "patchup_soft"])
def test_the_first_image_of_a_pair_has_the_larger_part_of_what_is_seen(mixing):
    x, y = torch.rand(64, 3, 16, 16), torch.arange(64)
    masks, _ = draw_masks(mixing, dirichlet(2.0, 64, 2), 4, 8, 8)
    torch.manual_seed(1)
    mixed, labels = input_cutmix(x, y, visible=masks[1])
    torch.manual_seed(1)
    whole = input_cutmix(x, y)[1]
    seen = masks[1].mean((1, 2, 3)) > 0
    shares = visible_shares(labels.mask, masks[1])
    assert (shares[seen] >= 0.5 - 1e-6).all()
    assert torch.equal(mixed * labels.mask, x * labels.mask)
    # The pairs and boxes are those of the whole image: some change places, and no label gets another share.
    assert torch.equal(labels.second, whole.second)
    swapped = (labels.mask != whole.mask).flatten(1).any(1)
    assert torch.equal(labels.mask[swapped], 1 - whole.mask[swapped])
    before = visible_shares(whole.mask, masks[1])
    assert (before[swapped & seen] <= 0.5 + 1e-6).all()
    torch.testing.assert_close(shares[seen].maximum(1 - shares[seen]), before[seen].maximum(1 - before[seen]))
    assert (swapped & seen).any() == (mixing in ("cut", "patchup_soft"))


def test_input_cutmix_needs_indices_and_a_positive_alpha():
    x = torch.rand(4, 3, 8, 8)
    for y in (torch.rand(4, 5), torch.zeros(3, dtype=torch.long), torch.rand(4)):
        with pytest.raises(TargetError, match="Input CutMix pairs class indices"):
            input_cutmix(x, y)
    with pytest.raises(ConfigError, match="alpha must be above 0"):
        input_cutmix(x, torch.zeros(4, dtype=torch.long), 0.0)


def test_the_probability_by_epochs_is_that_of_the_release() -> None:
    """p · min(1, 12 · (1 − e / E)) with epochs e that count from 1: one number in an epoch, 0 in the last."""
    for epochs in (12, 300, 1200):
        for done in range(epochs):
            wanted = 0.5 * min(1.0, 12 * (1 - (done + 1) / epochs))
            for fraction in (done / epochs, (done + 0.99) / epochs):
                assert cut_probability(0.5, fraction, 1 / 12, epochs) == pytest.approx(wanted, abs=1e-12)
        assert cut_probability(0.5, (epochs - 1) / epochs, 1 / 12, epochs) == 0.0
        assert cut_probability(0.5, 1.0, 1 / 12, epochs) == 0.0


def test_input_cutmix_tosses_a_coin_for_each_image() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(400, 1, 8, 8), torch.arange(400)
    mixed, labels = input_cutmix(x, y, p=0.5)
    alone = (labels.mask == 1).flatten(1).all(1)
    assert 150 < int(alone.sum()) < 260  # half of them, and those whose box is empty
    assert torch.equal(mixed[alone], x[alone])
    assert torch.equal(labels.soft(400)[alone], torch.eye(400)[alone])
    assert torch.equal(input_cutmix(x, y, p=0.0)[0], x)
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\], got 1.5"):
        input_cutmix(x, y, p=1.5)
