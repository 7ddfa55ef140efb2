"""The tensor functions of RSC against the authors' numbers, their own definitions, and each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxgraft.errors import ConfigError
from fxgraft.functional.rsc import (
    apply_selection,
    batch_count,
    batch_share_schedule,
    feature_mask,
    keep_mask,
    label_probability,
    label_score,
    linear_tail_gradient,
    linear_tail_logits,
    linear_tail_saliency,
    mute_count,
    saliency,
    select_samples,
    vector_keep_mask,
    vector_select,
)
from golden_data import GoldenCase, load_golden

OFFICIAL = [*load_golden("rsc_official_spatial"), *load_golden("rsc_official_channel")]
DOMAINBED = list(load_golden("rsc_domainbed"))
FEATURE_SHARE = {"spatial": 1 / 3, "channel": 1 / 3.2}
# float64: rounding of a different order of sums. float32: ten times what separates the reference's two runs.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
SCOPES = ["spatial", "channel"]
SHAPES = [(1, 1, 1, 1), (1, 3, 1, 1), (1, 1, 4, 5), (5, 6, 7, 3), (4, 5, 2, 3, 4), (3, 8, 10), (6, 16, 1, 9)]
few = settings(max_examples=40, deadline=None)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE[actual.dtype])


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_dtype=False)


def head(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    pooled = F.adaptive_avg_pool2d(z, 1) if z.ndim == 4 else z.flatten(2).mean(2)
    return F.linear(pooled.flatten(1), weight, bias)


def gradient_at(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(label_score(head(z, weight, bias), target), z)[0]


def random_case(shape: tuple[int, ...], classes: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, shape[1], generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype)
    return z, weight, bias, torch.randint(classes, shape[:1], generator=g)


# --- the authors' release


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", OFFICIAL, ids=str)
def test_official_generic_path(case: GoldenCase, dtype: torch.dtype) -> None:
    scope = case.settings["mode"]
    z, weight, bias, y = (case.inputs_as(dtype)[name] for name in ("z", "W", "b", "y"))

    logits = head(z, weight, bias)
    gradient = gradient_at(z, y, weight, bias)
    close(logits, case.expected("logits_before", dtype))
    close(gradient, case.outputs["grad_z"].to(dtype))
    close(saliency(z, gradient, "channel"), case.expected("channel_mean", dtype))
    close(saliency(z, gradient, "spatial").flatten(1), case.expected("spatial_mean", dtype))

    scores = saliency(z, gradient, scope)
    mask = feature_mask(scores, z, scope, FEATURE_SHARE[scope])
    assert mask.dtype == dtype
    exactly(mask, case.outputs["mask_pre"])
    count = mute_count(scores.flatten(1).shape[1], FEATURE_SHARE[scope])
    assert count == case.outputs["drop_num"]
    close(scores.flatten(1).sort(descending=True).values[:, count], case.expected("threshold", dtype))

    masked_logits = head(z * mask, weight, bias)
    before, after = label_probability(logits, y), label_probability(masked_logits, y)
    close(masked_logits, case.expected("logits_allmasked", dtype))
    close(before, case.expected("before_vector", dtype))
    close(after, case.expected("after_vector", dtype))
    check_epochs(case, dtype, z, mask, before, after, closed_form=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", OFFICIAL, ids=str)
def test_official_closed_form(case: GoldenCase, dtype: torch.dtype) -> None:
    scope = case.settings["mode"]
    z, weight, bias, y = (case.inputs_as(dtype)[name] for name in ("z", "W", "b", "y"))

    channel_gradient = linear_tail_gradient(weight, y, positions=49)
    close(channel_gradient, case.expected("channel_mean", dtype))
    logits = linear_tail_logits(z, None, weight, bias)
    close(logits, case.expected("logits_before", dtype))
    mask = feature_mask(linear_tail_saliency(z, channel_gradient, scope), z, scope, FEATURE_SHARE[scope])
    exactly(mask, case.outputs["mask_pre"])
    masked_logits = linear_tail_logits(z, mask, weight, bias)
    close(masked_logits, case.expected("logits_allmasked", dtype))
    before, after = label_probability(logits, y), label_probability(masked_logits, y)
    check_epochs(case, dtype, z, mask, before, after, closed_form=True)


def check_epochs(
    case: GoldenCase,
    dtype: torch.dtype,
    z: Tensor,
    mask: Tensor,
    before: Tensor,
    after: Tensor,
    closed_form: bool,
) -> None:
    """Steps 3 and 4 for each epoch of the case, with the gradients of the loss that is trained on."""
    inputs = case.inputs_as(dtype)
    weight, bias = inputs["W"].requires_grad_(), inputs["b"].requires_grad_()
    z = z.clone().requires_grad_()
    for e, epoch in enumerate(case.settings["epochs"]):
        # The release updates its share only every tenth epoch; each epoch here is a new model.
        share = batch_share_schedule(epoch) if epoch % 10 == 0 else 1 / 3
        assert share == pytest.approx(case.outputs["e_pecent_used"][e].item(), rel=1e-15)
        count = batch_count(len(z), share)
        assert count == case.outputs["e_batch_index"][e]

        selected = select_samples(before, after, count)
        exactly(selected.long(), case.outputs["e_drop_index_fg"][e])
        final = apply_selection(mask, selected)
        exactly(final, case.outputs["e_mask_final"][e])

        logits = linear_tail_logits(z, final, weight, bias) if closed_form else head(z * final, weight, bias)
        close(logits, case.expected("e_logits_masked", dtype)[e].to(dtype))
        loss = F.cross_entropy(logits, inputs["y"])
        close(loss, case.expected("e_loss_ce", dtype)[e].to(dtype))
        gradients = torch.autograd.grad(loss, (z, weight, bias))
        for name, gradient in zip(("z", "W", "b"), gradients, strict=True):
            close(gradient, case.expected(f"e_grad_loss_{name}", dtype)[e].to(dtype))
        assert not gradients[0][(final == 0).expand_as(z)].any()


# --- DomainBed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", DOMAINBED, ids=str)
def test_domainbed(case: GoldenCase, dtype: torch.dtype) -> None:
    inputs = case.inputs_as(dtype)
    features, y = inputs["f"].requires_grad_(), inputs["y"]
    parameters = [inputs[f"p{i}"].requires_grad_() for i in range(len(inputs) - 2)]
    assert len(parameters) == (6 if case.settings["nonlinear"] else 2)

    def classify(x: Tensor) -> Tensor:
        for i in range(0, len(parameters), 2):
            x = F.linear(x.relu() if i else x, parameters[i], parameters[i + 1])
        return x

    logits = classify(features)
    (gradient,) = torch.autograd.grad(label_score(logits, y), features)
    mask = vector_keep_mask(gradient, case.settings["drop_f"])
    muted_logits = classify(features * mask)
    before, after = label_probability(logits, y), label_probability(muted_logits, y)
    selected = vector_select(before, after, case.settings["drop_b"])
    final = apply_selection(mask, selected)
    close(logits, case.expected("all_p", dtype))
    close(gradient, case.expected("all_g", dtype))
    exactly(mask, case.outputs["mask_f"])
    close(muted_logits, case.expected("all_p_muted", dtype))
    close(before - after, case.expected("changes", dtype))
    exactly((~selected).unsqueeze(1).long(), case.outputs["mask_b"].long())
    exactly(final, case.outputs["mask"])

    logits = classify(features * final)
    loss = F.cross_entropy(logits, y)
    close(logits, case.expected("all_p_muted_again", dtype))
    close(loss, case.expected("loss", dtype))
    grad_features, *grads = torch.autograd.grad(loss, (features, *parameters))
    close(grad_features, case.expected("grad_loss_f", dtype))
    for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        close(grad, case.expected(f"grad_loss_p{i}", dtype))
        stepped = (parameter - case.settings["lr"] * grad).detach()
        close(stepped, case.expected(f"p{i}_after_sgd", dtype))


# --- counts


@pytest.mark.parametrize(
    ("size", "share", "count"),
    [
        (49, 1 / 3, 17),
        (48, 1 / 3, 16),
        (32, 1 / 3.2, 10),
        (20, 1 / 3.2, 7),
        (100, 0.07, 7),  # 7.000000000000001 in floating point
        (10, 0.1 + 0.2, 3),
        (1, 1 / 3, 1),
        (7, 1e-13, 1),
        (7, 0.0, 0),
        (7, 1.0, 7),
        (0, 0.5, 0),
    ],
)
def test_mute_count(size: int, share: float, count: int) -> None:
    assert mute_count(size, share) == count


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_mute_count_of_a_ratio_is_exact(size: int, parts: int) -> None:
    assert mute_count(size, 1 / parts) == -(-size // parts)


@pytest.mark.parametrize(
    ("batch", "share", "count"),
    [(12, 1 / 3, 4), (9, 0.5, 4), (5, 0.9, 4), (1, 1 / 3, 0), (8, 1.0, 8), (0, 0.5, 0)],
)
def test_batch_count(batch: int, share: float, count: int) -> None:
    assert batch_count(batch, share) == count


def test_batch_share_schedule() -> None:
    epochs = (0, 9, 10, 15, 20, 30, 39, 40, 400)
    assert [batch_share_schedule(e) for e in epochs] == [0.3, 0.3, 0.5, 0.5, 0.7, 0.9, 0.9, 1.0, 1.0]


# --- the rule of the threshold


def test_ties_at_the_threshold_stay() -> None:
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [4.0, 4.0, 1.0, 1.0]])
    exactly(keep_mask(scores, 2), torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]))


def test_count_beyond_the_last_entry_mutes_all() -> None:
    scores = torch.ones(2, 3)
    assert not keep_mask(scores, 3).any()
    assert not keep_mask(scores, 4).any()
    assert keep_mask(scores, 0).all()


def test_nan_scores_are_kept() -> None:
    nan = math.nan
    scores = torch.tensor([[nan, 3.0, 2.0, 1.0], [nan, nan, nan, 1.0]])
    exactly(keep_mask(scores, 2), torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 1]]))


@few
@given(
    st.lists(st.permutations(range(9)), min_size=1, max_size=4), st.integers(0, 11), st.permutations(range(4))
)
def test_keep_mask_properties(rows: list[list[int]], count: int, order: list[int]) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    mask = keep_mask(scores, count)
    assert mask.dtype == scores.dtype
    # Without ties the count is exact, and what is muted are the highest.
    assert ((mask == 0).sum(1) == min(count, 9)).all()
    exactly(mask, (scores < 9 - count).double())
    # Muting more mutes no less, and samples do not see each other.
    assert (keep_mask(scores, count + 1) <= mask).all()
    order = [i for i in order if i < len(rows)]
    exactly(keep_mask(scores[order], count), mask[order])


def test_select_samples() -> None:
    before = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    after = torch.tensor([0.1, 0.5, 0.6, 0.59995, 0.7])  # falls: 0.8, 0.3, 0.1, under the margin, a rise
    expected = {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 5, 9: 5}
    for count, kept in expected.items():
        assert select_samples(before, after, count).tolist() == [True] * kept + [False] * (5 - kept)
    assert select_samples(before, after, 4, margin=0.0).tolist() == [True, True, True, True, False]


def test_apply_selection() -> None:
    mask = torch.zeros(3, 1, 2, 2)
    kept = apply_selection(mask, torch.tensor([True, False, True]))
    assert kept.flatten(1).sum(1).tolist() == [0, 4, 0]
    assert not mask.any()


# --- labels


@few
@given(st.integers(1, 6), st.integers(2, 7), st.integers(0, 999))
def test_soft_targets_extend_indices(batch: int, classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (batch,), generator=g)
    one_hot = F.one_hot(y, classes)  # integers are soft targets too
    close(label_score(logits, y), label_score(logits, one_hot))
    close(label_probability(logits, y), label_probability(logits, one_hot.double()))
    close(label_probability(logits, y), F.cross_entropy(logits, y, reduction="none").neg().exp())
    mixed = 0.25 * one_hot + 0.75 * one_hot.roll(1, dims=1)
    close(label_score(logits, mixed), (logits * mixed).sum())
    weight = torch.randn(classes, 5, generator=g, dtype=torch.float64)
    close(linear_tail_gradient(weight, y, 6), linear_tail_gradient(weight, one_hot, 6))


# --- scores and masks in any shape


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_follow_their_definitions(shape: tuple[int, ...], scope: str) -> None:
    z, g = random_case(shape)[0], random_case(shape, seed=1)[0]
    space = tuple(range(2, z.ndim))
    pooled = g.mean(space, keepdim=True)
    expected = {
        ("grad_cam", "top_gradient"): (z * pooled).sum(1) if scope == "spatial" else g.mean(space),
        ("gradient", "top_gradient"): g.mean(1) if scope == "spatial" else g.mean(space),
        ("grad_cam", "top_activation"): z.mean(1) if scope == "spatial" else z.mean(space),
    }
    for (kind, strategy), scores in expected.items():
        close(saliency(z, g, scope, kind=kind, strategy=strategy), scores)
    close(saliency(z, None, scope, strategy="top_activation"), scores)
    close(
        saliency(z, None, scope, strategy="top_activation"), saliency(z, g, scope, strategy="top_activation")
    )

    torch.manual_seed(0)
    drawn = saliency(z, None, scope, strategy="random")
    assert drawn.shape == scores.shape
    assert drawn.dtype == z.dtype
    torch.manual_seed(0)
    exactly(saliency(z, None, scope, strategy="random"), drawn)

    for share in (0.0, 1 / 3, 1.0):
        mask = feature_mask(drawn, z, scope, share)
        assert mask.shape == (
            (*shape[:2], *[1] * len(space)) if scope == "channel" else (shape[0], 1, *shape[2:])
        )
        entries = mask[0].numel()
        assert ((mask == 0).flatten(1).sum(1) == mute_count(entries, share)).all()


def test_a_vector_has_channels_only() -> None:
    z, weight, bias, y = random_case((5, 8))
    g = linear_tail_gradient(weight, y, positions=1)
    exactly(saliency(z, g, "channel"), g)
    exactly(saliency(z, None, "channel", strategy="top_activation"), z)
    assert saliency(z, None, "channel", strategy="random").shape == z.shape
    mask = feature_mask(g, z, "channel", 1 / 4)
    assert (mask == 0).sum(1).tolist() == [2] * 5
    close(linear_tail_logits(z, mask, weight, bias), F.linear(z * mask, weight, bias))
    close(linear_tail_logits(z, None, weight, bias), F.linear(z, weight, bias))


def test_ranking_by_gradient_needs_one() -> None:
    with pytest.raises(ConfigError, match="pass gradient="):
        saliency(torch.ones(2, 3, 4), None, "spatial")


@pytest.mark.parametrize("scope", SCOPES)
def test_views_of_other_layouts(scope: str) -> None:
    z, g = random_case((3, 6, 4, 5))[0], random_case((3, 6, 4, 5), seed=1)[0]
    last = z.to(memory_format=torch.channels_last)
    permuted = z.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for view in (last, permuted):
        scores = saliency(view, g, scope)
        close(scores, saliency(z, g, scope))
        muted = view * feature_mask(scores, view, scope, 1 / 3)
        assert muted.is_contiguous(memory_format=torch.channels_last)
    tokens = z.flatten(2).transpose(1, 2).contiguous()  # (B, N, C)
    close(saliency(tokens.transpose(1, 2), g.flatten(2), scope), saliency(z, g, scope).flatten(1))


# --- a linear tail


@few
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from(SCOPES),
)
def test_closed_form_is_the_general_path(
    batch: int, channels: int, space: list[int], seed: int, soft: bool, scope: str
) -> None:
    z, weight, bias, target = random_case((batch, channels, *space), seed=seed)
    if soft:
        target = torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed)).softmax(1).double()
    g = gradient_at(z, target, weight, bias)
    pooled = linear_tail_gradient(weight, target, math.prod(space))
    close(pooled.reshape(batch, channels, *[1] * len(space)).expand_as(z), g)
    for kind in ("grad_cam", "gradient"):
        close(linear_tail_saliency(z, pooled, scope, kind=kind), saliency(z, g, scope, kind=kind))

    mask = feature_mask(saliency(z, None, scope, strategy="random"), z, scope, 1 / 3)
    z.requires_grad_()
    weight.requires_grad_()
    for m in (mask, None):
        for b in (bias, None):
            closed, general = linear_tail_logits(z, m, weight, b), head(z if m is None else z * m, weight, b)
            close(closed, general)
            pairs = zip(
                *(torch.autograd.grad(x.square().sum(), (z, weight)) for x in (closed, general)), strict=True
            )
            for ours, theirs in pairs:
                close(ours, theirs)


def test_gradient_scores_after_a_linear_tail_mute_no_position() -> None:
    z, weight, _, y = random_case((4, 6, 7, 7), dtype=torch.float32)
    scores = linear_tail_saliency(z, linear_tail_gradient(weight, y, 49), "spatial", kind="gradient")
    assert feature_mask(scores, z, "spatial", 1 / 3).all()


# --- vectors


@few
@given(st.integers(1, 5), st.integers(1, 30), st.floats(0.01, 1.0), st.integers(0, 999))
def test_vector_mask_is_a_quantile(batch: int, size: int, share: float, seed: int) -> None:
    g = torch.randn(batch, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = vector_keep_mask(g, share)
    rank = share * (size - 1)
    if (
        abs(rank - round(rank)) > 1e-9
    ):  # else the threshold is an entry, and torch.quantile leaves it to rounding
        exactly(mask, (g < g.quantile(1 - share, dim=1, keepdim=True)).double())
    # Rank r from the top, counted from 0: entries 0 to ⌊r⌋ reach the quantile.
    muted = math.floor(rank + 1e-9) + 1
    assert ((mask == 0).sum(1) == muted).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "share", "muted"),
    [(4, 1 / 3, 2), (16, 1 / 3, 6), (64, 1 / 3, 22), (100, 1 / 3, 34), (256, 1 / 3, 86), (101, 0.29, 30)],
)
def test_vector_count_does_not_depend_on_the_dtype(
    size: int, share: float, muted: int, dtype: torch.dtype
) -> None:
    # The quantile falls on an entry, where DomainBed mutes one fewer at some of these sizes in float64. The
    # entry is 0, so that no rounding error is too small to show; 0.29 · 100 is a little less than 29.
    g = (torch.arange(size) - (size - muted)).to(dtype).reshape(1, size)
    assert (vector_keep_mask(g, share) == 0).sum() == muted


def test_vector_edges() -> None:
    g = torch.tensor([[1.0, 2.0, 3.0]])
    assert vector_keep_mask(g, 0.0).all()
    assert not vector_keep_mask(g, 1.0).any()
    rise, fall = torch.tensor([0.2]), torch.tensor([0.7])
    assert vector_select(rise, fall, 1 / 3).tolist() == [True]  # a batch of one, whatever the change
    assert vector_select(rise, fall, 0.0).tolist() == [False]
    assert (vector_keep_mask(torch.ones(2, 5), 1 / 3) == 0).all()  # all reach the quantile
    changes = torch.tensor([0.1, -0.2, 0.3])
    assert vector_select(changes, torch.zeros(3), 1.0).all()
    assert vector_select(changes, torch.zeros(3), 1 / 3).tolist() == [False, False, True]


# --- where it has to run


def every_step(z: Tensor, g: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> list[Tensor]:
    """Both scopes, all strategies, the closed form and the vector variant, on any device."""
    results = []
    positions = z.shape[2:].numel()
    pooled = linear_tail_gradient(weight, y, positions)
    before = label_probability(linear_tail_logits(z, None, weight, bias), y)
    for scope in SCOPES:
        for strategy in ("top_gradient", "top_activation", "random"):
            for kind in ("grad_cam", "gradient"):
                mask = feature_mask(saliency(z, g, scope, kind=kind, strategy=strategy), z, scope, 1 / 3)
                results.append(mask)
        mask = feature_mask(linear_tail_saliency(z, pooled, scope), z, scope, 1 / 3)
        after = label_probability(linear_tail_logits(z, mask, weight, bias), y)
        selected = select_samples(before, after, batch_count(len(z), 1 / 3))
        results.append(linear_tail_logits(z, apply_selection(mask, selected), weight, bias))
    features = z.flatten(2).mean(2)
    mask = vector_keep_mask(pooled.to(z.dtype), 1 / 3)
    results.append(features * apply_selection(mask, vector_select(before, before.flip(0), 1 / 3)))
    results.append(label_score(F.linear(features, weight, bias), y))
    return results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtypes_and_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, weight, bias, y = random_case(shape, dtype=dtype)
    *results, score = every_step(z, z.flip(0), weight, bias, y)
    for result in results:
        assert result.dtype == dtype
        assert result.isfinite().all()
    at_least_single = torch.promote_types(dtype, torch.float32)
    assert score.dtype == at_least_single
    assert saliency(z, z, "spatial").dtype == at_least_single


def test_half_precision_ranks_as_float32() -> None:
    z, weight, bias, y = (
        x.bfloat16().float() if x.is_floating_point() else x for x in random_case((6, 24, 7, 7))
    )
    g = gradient_at(z, y, weight, bias).bfloat16()
    for scope in SCOPES:
        single = feature_mask(saliency(z, g.float(), scope), z, scope, 1 / 3)
        half = feature_mask(saliency(z.bfloat16(), g, scope), z.bfloat16(), scope, 1 / 3)
        exactly(half, single)


def test_autocast_does_not_round_scores() -> None:
    z, weight, bias, y = random_case((6, 24, 7, 7), dtype=torch.float32)
    g = z.flip(0)
    plain = saliency(z, g, "spatial"), linear_tail_gradient(weight, y.eq(1).unsqueeze(1).expand(-1, 4), 49)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = saliency(z, g, "spatial"), linear_tail_gradient(weight, y.eq(1).unsqueeze(1).expand(-1, 4), 49)
        mask = feature_mask(cast[0], z, "spatial", 1 / 3)
        logits = linear_tail_logits(z, mask, weight, bias)
        assert logits.dtype == head(z * mask, weight, bias).dtype == torch.bfloat16
        assert label_probability(logits, y).dtype == torch.float32
    for ours, theirs in zip(cast, plain, strict=True):
        exactly(ours, theirs)


def test_reads_no_values() -> None:
    """On the meta device there are none: anything that waited for one would raise."""
    z, weight, bias, y = (x.to("meta") for x in random_case((6, 24, 7, 7), dtype=torch.float32))
    assert all(x.is_meta for x in every_step(z, z, weight, bias, y))


def test_compiles_in_one_graph() -> None:
    class Steps(nn.Module):
        def forward(self, *args: Tensor) -> list[Tensor]:
            return every_step(*args)

    torch.compiler.reset()
    compiled = torch.compile(Steps(), fullgraph=True, backend="aot_eager")
    for batch in (6, 4, 5, 1):  # from the second size on the batch is symbolic
        z, weight, bias, y = random_case((batch, 24, 7, 7), dtype=torch.float32)
        torch.manual_seed(0)
        expected = every_step(z, z.flip(0), weight, bias, y)
        torch.manual_seed(0)
        for ours, theirs in zip(compiled(z, z.flip(0), weight, bias, y), expected, strict=True):
            close(ours, theirs)
    torch.compiler.reset()
