"""Tensor functions of Representation Self-Challenging (Huang, Wang, Xing, Huang, ECCV 2020).

RSC mutes the part of a feature map that a prediction leans on most and trains on what is left. The steps,
for a map z of shape (B, C, *S), channels second (tokens: (B, C, N); a vector (B, C) has channels only):

1. g = ∂ Σ_b logit[b, y_b] / ∂z: the caller differentiates `label_score`;
2. `saliency` → `feature_mask`: mute the top share of positions, or of channels, in each sample;
3. `label_probability` before and after → `select_samples` → `apply_selection`: only the samples whose
   probability falls the most stay muted;
4. the caller runs the rest of the network on z · mask.

Masks are 1 (keep) and 0 (mute) and come out of comparisons, so no gradient passes through them; run steps 1
to 3 without autograd. When average pooling and one linear layer are all that follows z,
`rsc.closed_form` has steps 1 and 4. `vector_*` is DomainBed's variant for pooled features (B, D).

Half precision is scored in float32. Nothing here waits for the device: counts come from shapes and shares.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from fxgraft.errors import ConfigError

Scope = Literal["spatial", "channel"]
Saliency = Literal["grad_cam", "gradient"]
Strategy = Literal["top_gradient", "random_top_half", "top_activation", "random"]
GRADIENT_STRATEGIES = ("top_gradient", "random_top_half")


def mute_count(size: int, share: float) -> int:
    """How many of `size` entries to mute: ⌈size · share⌉, between 0 and `size`.

    A product that misses a whole number only by rounding counts as that number: 100 · 0.07 gives a little
    more than 7 in floating point, and a share of 7 % does not mean 8 entries.
    """
    size = int(size)  # a tensor, where torch.jit.trace records
    return min(max(math.ceil(_snapped(size * share)), 0), size)


def batch_count(batch: int, share: float) -> int:
    """How many samples may stay muted: B · share rounded half to even, as in the authors' code, at most B."""
    return min(max(round(int(batch) * share), 0), int(batch))


def batch_share_schedule(epoch: int) -> float:
    """The curriculum of the authors' code, 0.3 + 0.2 · ⌊epoch / 10⌋, but capped at 1."""
    # In whole tenths, because 0.3 + 0.2 * 3 overshoots 0.9 and could tip the rounding of `batch_count`.
    return min(1.0, (3 + 2 * (epoch // 10)) / 10)


def imagenet_share_schedule(epoch: int) -> float:
    """The batch share of the authors' ImageNet code: 1/6, 1/5.5, 1/5, 1/4.5, 1/4 from epochs 0, 19, 39, 59, 79."""
    return 1 / (6 - 0.5 * sum(epoch >= start for start in (19, 39, 59, 79)))


def keep_mask(scores: Tensor, count: int) -> Tensor:
    """Mute the `count` highest of each row of `scores` (B, N); 1 keep, 0 mute, in the dtype of `scores`.

    An entry is muted when it is strictly greater than the (count + 1)-th largest of its row: entries tied at
    the threshold all stay. A count of 0 mutes nothing, N or more mutes everything. A NaN takes a place among
    the largest but is itself kept (unless all are muted), so the mask is always finite.
    """
    return _above_rank(scores, count).logical_not().to(scores.dtype)


def random_top_half_mask(scores: Tensor, share: float) -> Tensor:
    """Mute a random ⌊N · share⌋ of the top half of each row of `scores` (B, N); 1 keep, 0 mute, as in `scores`.

    The rule of the authors' ImageNet code. The top half is what is greater than the (⌊N/2⌋ + 1)-th largest;
    in a row where that is less than what is to be muted, any entry may be. Draws from torch's generator.
    """
    size = scores.shape[1]
    count = min(math.floor(_snapped(size * share)), size)
    top = _above_rank(scores, size // 2)
    enough = top.sum(1, keepdim=True) >= count
    order = torch.rand(scores.shape, device=scores.device).masked_fill(enough & ~top, -1.0)
    return torch.ones_like(scores).scatter(1, order.topk(count, dim=1).indices, 0.0)


def label_score(logits: Tensor, target: Tensor) -> Tensor:
    """Σ_b logit[b, y_b]: the number whose gradient at z shows what the prediction rests on.

    `logits` are (B, K); `target` holds indices (B,), or soft targets (B, K): Σ_b Σ_k t[b, k] · logit[b, k].
    """
    return _at_label(logits.to(score_dtype(logits)), target).sum()


def label_probability(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax probability of the label, (B,); Σ_k t_k p_k for soft targets. Arguments as `label_score`."""
    return _at_label(logits.softmax(dim=1, dtype=score_dtype(logits)), target)


def label_rows(logits: Tensor, target: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """Bring logits (B, K, ...) and labels to rows: logits (N, K), labels (N,) or (N, K), which rows count (N,).

    A dense prediction gives a row per position; those labelled `ignore_index` count 0.
    """
    if logits.ndim == 2:
        return logits, target, logits.new_ones(logits.shape[0])
    flat = logits.movedim(1, -1).flatten(0, -2)
    if target.is_floating_point():
        return flat, target.movedim(1, -1).flatten(0, -2), flat.new_ones(flat.shape[0])
    labels = target.flatten()
    counts = labels != ignore_index
    return flat, labels.where(counts, torch.zeros_like(labels)), counts.to(flat.dtype)


def sample_probability(rows: Tensor, labels: Tensor, counts: Tensor, batch: int) -> Tensor:
    """`label_probability` of every sample, (B,), from its rows of `label_rows`: the mean over those that count."""
    shape = (batch, len(rows) // max(batch, 1))
    probability = (label_probability(rows, labels) * counts).reshape(shape).sum(1)
    return probability / counts.reshape(shape).sum(1).clamp(min=1)


def saliency(
    z: Tensor,
    gradient: Tensor | None,
    scope: Scope,
    *,
    kind: Saliency = "grad_cam",
    strategy: Strategy = "top_gradient",
) -> Tensor:
    """Score the positions, (B, *S), or the channels, (B, C), of every sample; the highest are to be muted.

    - "top_gradient" and "random_top_half": positions by Σ_c z_c · mean_S(g_c) ("grad_cam") or mean_c(g_c) ("gradient"),
      channels by mean_S(g_c);
    - "top_activation": mean_c(z_c) and mean_S(z_c);
    - "random": uniform on [0, 1), from torch's generator.

    `gradient` is g, shaped as `z`; None does for the last two strategies, which are rows of the paper's ablation.
    Of the two kinds, "grad_cam" is the authors' code and "gradient" the paper's text.
    """
    if strategy == "random":
        shape = z.shape[:1] + (z.shape[1:2] if scope == "channel" else z.shape[2:])
        return torch.rand(shape, dtype=score_dtype(z), device=z.device)
    if strategy == "top_activation":
        return spatial_mean(z) if scope == "channel" else _channel_mean(z)
    if gradient is None:
        raise ConfigError(f'strategy="{strategy}" ranks by the gradient: pass gradient=.')
    if scope == "spatial" and kind == "gradient":
        return _channel_mean(gradient)
    return pooled_saliency(z, spatial_mean(gradient), scope)


def feature_mask(
    scores: Tensor, z: Tensor, scope: Scope, share: float, *, strategy: Strategy = "top_gradient"
) -> Tensor:
    """Mute the top `share`, rounded up, of the positions or channels of every sample.

    With "random_top_half" it is a random share, rounded down, of their top half; see `random_top_half_mask`.

    From the `scores` of `saliency` in the same scope to a mask (B, 1, *S) or (B, C, 1, ...) in the dtype of
    `z`. The share is 1/3 of positions and 1/3.2 of channels in the authors' code, 1/3 of either in the paper.
    """
    rows = scores.flatten(1)
    shape = (*z.shape[:2], *[1] * (z.ndim - 2)) if scope == "channel" else (z.shape[0], 1, *z.shape[2:])
    if strategy == "random_top_half":
        return random_top_half_mask(rows, share).reshape(shape).to(z.dtype)
    return keep_mask(rows, mute_count(rows.shape[1], share)).reshape(shape).to(z.dtype)


def select_samples(p_before: Tensor, p_after: Tensor, count: int, margin: float = 1e-4) -> Tensor:
    """The samples that stay muted, (B,) bool: those with the largest δ = max(0, p_before − p_after − margin).

    The rule is that of `keep_mask`, so a sample that loses no more than the margin is never selected, except
    that a count of B or more selects every sample: a batch share of 1 switches the selection off. p_before
    and p_after (B,) are `label_probability` on z and on z · mask, `count` is `batch_count`'s.
    """
    fall = (p_before - p_after - margin).clamp(min=0)
    return _above_rank(fall.unsqueeze(0), count).squeeze(0)


def apply_selection(mask: Tensor, selected: Tensor) -> Tensor:
    """Ones in place of the rows of `mask` (B, ...) that are not `selected` (B,)."""
    return mask.masked_fill(~selected.reshape(-1, *[1] * (mask.ndim - 1)), 1.0)


def vector_keep_mask(gradient: Tensor, share: float) -> Tensor:
    """DomainBed's mask for pooled features: keep what lies below the (1 − share) quantile of its row.

    (B, D) → (B, D) in the dtype of `gradient`. An entry at the threshold is muted here, as in the paper.
    Share 0 mutes nothing, where DomainBed would still mute the maximum.
    """
    if share <= 0:
        return torch.ones_like(gradient)
    return (gradient < _quantile_entry(gradient, share)).to(gradient.dtype)


def vector_select(p_before: Tensor, p_after: Tensor, share: float) -> Tensor:
    """The samples that stay muted in DomainBed, (B,) bool: a fall of at least the (1 − share) quantile.

    The fall p_before − p_after is signed and has no margin, so a sample whose probability rises can be
    selected, and a batch of one always is. Share 0 selects none, where DomainBed would select the largest.
    """
    fall = p_before - p_after
    if share <= 0:
        return torch.zeros_like(fall, dtype=torch.bool)
    return fall >= _quantile_entry(fall.unsqueeze(0), share).squeeze(0)


def pooled_saliency(
    z: Tensor, channel_gradient: Tensor, scope: Scope, *, kind: Saliency = "grad_cam"
) -> Tensor:
    """What `saliency` gives when g is `channel_gradient` (B, C) at every position, without expanding it.

    With kind "gradient" all positions tie exactly, so that `keep_mask` mutes none of them.
    """
    if scope == "channel":
        return channel_gradient
    if kind == "gradient":
        mean = _channel_mean(channel_gradient)
        return mean.reshape(-1, *[1] * (z.ndim - 2)).expand(z.shape[0], *z.shape[2:])
    return matmul(channel_gradient.unsqueeze(1), z.flatten(2)).reshape(z.shape[0], *z.shape[2:])


def _above_rank(scores: Tensor, count: int) -> Tensor:
    """Strictly greater than the (count + 1)-th largest of the row; all of it when there is no such entry."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.topk(count + 1, dim=1).values[:, -1:]


def _quantile_entry(values: Tensor, share: float) -> Tensor:
    """The lowest entry of each row that reaches the row's (1 − share) quantile, (B, N) → (B, 1).

    Interpolated linearly, the quantile is this entry or lies between it and the next lower one, so comparing
    entries with either is the same, but an interpolated one would be off by rounding where it is the entry.
    """
    rank = math.floor(_snapped(share * (values.shape[1] - 1)))  # from the largest, which is 0
    return values.topk(rank + 1, dim=1).values[:, -1:]


def _snapped(value: float) -> float:
    """`value`, or the whole number it differs from by rounding error only."""
    nearest = round(value)
    return float(nearest) if abs(value - nearest) <= 1e-12 * nearest else value


def _at_label(values: Tensor, target: Tensor) -> Tensor:
    if target.ndim == 1:
        return values.gather(1, target.long().unsqueeze(1)).squeeze(1)
    return (values * target.to(values.dtype)).sum(dim=1)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product in at least float32, also under autocast: rounded scores would be ranked wrongly."""
    dtype = torch.promote_types(score_dtype(a), b.dtype)
    # The meta device has no autocast to switch off.
    full = nullcontext() if a.device.type == "meta" else torch.autocast(a.device.type, enabled=False)
    with full:
        return a.to(dtype) @ b.to(dtype)


def spatial_mean(x: Tensor) -> Tensor:
    """Average (B, C, *S) over its positions, in at least float32; a vector (B, C) is its own average."""
    # mean(dim=()) would average over everything, not over nothing.
    return x.mean(dim=tuple(range(2, x.ndim)), dtype=score_dtype(x)) if x.ndim > 2 else x.to(score_dtype(x))


def _channel_mean(x: Tensor) -> Tensor:
    return x.mean(dim=1, dtype=score_dtype(x))


def score_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which scores are computed: float32, or more."""
    return torch.promote_types(x.dtype, torch.float32)
