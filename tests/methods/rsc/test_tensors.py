"""The tensor functions of RSC against their own definitions and each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxgraft.errors import ConfigError
from fxgraft.patches.rsc.closed_form import linear_tail_gradient, linear_tail_logits
from fxgraft.patches.rsc.tensors import (
    apply_selection,
    batch_count,
    batch_share_schedule,
    feature_mask,
    keep_mask,
    label_probability,
    label_score,
    mute_count,
    pooled_saliency,
    saliency,
    select_samples,
    vector_keep_mask,
    vector_select,
)
from methods.rsc.rsc_tools import SCOPES, SHAPES, close, exactly, few, gradient_at, head, random_case

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
        close(pooled_saliency(z, pooled, scope, kind=kind), saliency(z, g, scope, kind=kind))

    mask = feature_mask(saliency(z, None, scope, strategy="random"), z, scope, 1 / 3)
    z.requires_grad_()
    weight.requires_grad_()
    for m in (mask, mask.expand_as(z).contiguous(), None):
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
    scores = pooled_saliency(z, linear_tail_gradient(weight, y, 49), "spatial", kind="gradient")
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
        mask = feature_mask(pooled_saliency(z, pooled, scope), z, scope, 1 / 3)
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


@pytest.mark.sweep
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
