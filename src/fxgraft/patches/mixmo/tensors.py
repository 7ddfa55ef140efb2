"""Tensor functions of MixMo (Ramé, Sun, Cord, ICCV 2021), with MIMO (Havasi et al., ICLR 2021) as a special case.

M encoders l_i of M inputs x_i are mixed into one map, which the shared network takes to M heads d_i:

    l = M · Σ_i mask_i · l_i,        loss = Σ_i w_i · CE(y_i, d_i(l)),        w_i = M · κ_i^{1/r} / Σ_j κ_j^{1/r},

with Σ_i mask_i = 1 at every position and κ_i the share that mask_i leaves to member i. The steps of one batch:
`permutations` pair the samples, `dirichlet` draws κ, `fxgraft.patches.mixmo.masks.draw_masks` makes masks and
shares, `mix` mixes, `balance` and `member_losses` weigh the losses. `input_cutmix` goes before all that: CutMix
of the images themselves, whose labels then depend on what the mixing leaves visible.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft._torch import sample_dirichlet
from fxgraft.errors import ConfigError, TargetError
from fxgraft.patches.mixmo.masks import box_mask, draw_centres

Criterion = Callable[..., Tensor]


def dirichlet(
    alpha: float,
    batch: int,
    members: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the mixing ratios κ of every sample from a symmetric Dirichlet distribution.

    Args:
        alpha: its concentration, above 0; 2 in the paper. Large values mix evenly, small ones hardly.
        batch: B.
        members: M.
        device: where to draw.
        dtype: what to draw in. Masks and shares that follow from it sum to 1 as exactly as it can tell.

    Returns:
        (B, M) of `dtype`; rows sum to 1.

    Raises:
        ConfigError: alpha is not above 0.
    """
    if not alpha > 0 or math.isinf(alpha):
        raise ConfigError(
            f"κ is drawn from a Dirichlet distribution, whose alpha must be above 0 and finite, got {alpha!r}.\n"
            'The paper uses 2. For equal shares of all members (MIMO) use mixing="sum".'
        )
    parts = torch.full((batch, members), float(alpha), device=device, dtype=dtype)
    return sample_dirichlet(parts)


def mix(encodings: Sequence[Tensor], masks: Tensor | Sequence[Tensor], gain: float | None = None) -> Tensor:
    """Mix M encodings: gain · Σ_i mask_i · l_i.

    Where a mask is 0, exactly no gradient reaches that encoding. With a gain of 1 two members are mixed in a
    single pass over memory; that is what to use where the factor M can go into the encoders' weights.

    Args:
        encodings: l_i, of one shape and dtype.
        masks: mask_i, M of them, that sum to 1 and broadcast against the encodings. They are constants: give
            none that requires a gradient.
        gain: factor of the whole; M by default.

    Returns:
        A map shaped as the encodings, in their dtype and memory order.
    """
    members = len(encodings)
    gain = float(members) if gain is None else gain
    if members == 1:
        return encodings[0] if gain == 1 else encodings[0] * gain
    # In the wider dtype of the two: neither masks nor encodings lose what they came with to the gain.
    dtype = encodings[0].dtype
    wide = [mask.to(torch.promote_types(mask.dtype, dtype)) for mask in masks]
    weights = [(mask if gain == 1 else mask * gain).to(dtype) for mask in wide]
    if members == 2 and gain == 1:
        return torch.lerp(encodings[1], encodings[0], weights[0])
    mixed = encodings[0] * weights[0]
    for encoding, weight in zip(encodings[1:], weights[1:], strict=True):
        # In place: neither the product before nor this one is kept for the backward pass.
        mixed = mixed.addcmul_(encoding, weight)
    return mixed


def balance(shares: Tensor, r: float = 3.0) -> Tensor:
    """Weights of the members' losses: w_i = M · κ_i^{1/r} / Σ_j κ_j^{1/r}.

    Args:
        shares: (B, M), what each member has of the map; rows sum to 1.
        r: 1 weighs by the share, larger values more evenly, infinity equally. The paper finds 3 to 6 best.

    Returns:
        (B, M); rows sum to M. A member without a share has weight 0 (unless r is infinite).

    Raises:
        ConfigError: r is not above 0.
    """
    if not r > 0:
        raise ConfigError(
            f"The losses are weighted by the r-th root of the shares; r must be above 0, got {r!r}."
        )
    roots = shares ** (1 / r)
    return shares.shape[1] * roots / roots.sum(1, keepdim=True)


def permutations(
    batch: int,
    members: int,
    repetitions: int = 1,
    device: torch.device | str = "cpu",
    kept: float = 0.0,
) -> Tensor:
    """Pair the samples of a batch: which of them each member sees in every row.

    Args:
        batch: B, the number of samples.
        members: M.
        repetitions: how many times every sample occurs; the rows are repetitions · B.
        device: where to draw.
        kept: share of the rows, the first ones, in which all members see the same sample, in [0, 1] (the
            release's `proba_input_repetition`).

    Returns:
        (M, repetitions · B) indices in [0, B). Member 0 sees the batch in its order, as often as repeated; the
        others see the same rows shuffled, each in its own way.

    Raises:
        ConfigError: repetitions below 1, kept outside [0, 1].
    """
    if repetitions < 1 or not 0 <= kept <= 1:
        raise ConfigError(
            "Samples are repeated 1 or more times, and a share in [0, 1] of the rows is kept together; "
            f"got repetitions={repetitions!r}, kept={kept!r}."
        )
    rows = batch * repetitions
    own = torch.arange(batch, device=device).repeat(repetitions)
    fixed = int(kept * rows)
    # Sorting noise gives all the permutations at once.
    keys = torch.rand(members - 1, rows - fixed, device=device)
    shuffled = own[fixed:][keys.argsort(1)]
    return torch.cat((own.unsqueeze(0), torch.cat((own[:fixed].expand(members - 1, -1), shuffled), 1)))


def cut_probability(p: float, progress: float, decay: float = 1 / 12, epochs: int | None = None) -> float:
    """Probability of the binary mixing: `p`, but falling linearly to 0 over the last `decay` of training.

    Args:
        p: probability before, in [0, 1]; 0.5 in the paper.
        progress: share of training that is done, in [0, 1].
        decay: share of training over which it falls; 0 keeps it constant.
        epochs: length of the training. The release counts the running epoch as done: the probability is one number in
            every epoch, and 0 in the last. None: it follows the progress.
    """
    if epochs is not None:
        # A fraction of k/epochs may come out just below k; it means that epoch k begins.
        progress = min(1.0, (int(progress * epochs + 1e-9) + 1) / epochs)
    return p if decay <= 0 else p * min(1.0, max(0.0, (1 - progress) / decay))


def member_losses(
    criterion: Criterion,
    logits: Tensor,
    targets: Sequence[Tensor],
    weights: Tensor,
    even: bool = False,
    doubt: Callable[[Tensor | bool, ConfigError], None] | None = None,
) -> Tensor:
    """Losses of the members: for member i, Σ_b w[b, i] · criterion(logits[i, b], target_i[b]) / B.

    The weights differ from row to row, so the criterion is asked for one value per row: a function (or
    `functools.partial` of one) that takes `reduction`, or a module or object that has it as attribute, is called with
    "none"; the attribute is put back afterwards. Then its own reduction is applied to the weighted values: "mean" and
    "batchmean" divide by B (and "mean" of a loss per class by the classes as well), "sum" by nothing, "none" keeps
    them. The divisor is B whatever the labels: class weights scale a row's loss and are not divided out again, and rows
    labelled `ignore_index` count as 0 in the sum and as 1 in B.

    Any other criterion is called as it is, once for each member, where that is the same: all weights are 1, or there is
    one member.

    Args:
        criterion: a function, called with logits (B, K) and a target.
        logits: (M, B, K).
        targets: one per member, class indices (B,) or soft targets (B, K).
        weights: (B, M), from `balance`.
        even: all weights are 1.
        doubt: a function, called with () bool and an error where the criterion's value for a row depends on which
            row it is (it holds data of the batch, whose order is not that of the members).

    Returns:
        (M,), or (M, B, ...) where the criterion reduces nothing.

    Raises:
        ConfigError: a criterion that has no values for rows, with weights that differ.
    """
    if len(logits) == 1:
        return criterion(logits[0], targets[0]).unsqueeze(0)
    pairs = list(zip(logits, targets, strict=True))
    reduction = reduction_of(criterion)
    if reduction is not None and doubt is not None and not _knows_rows_alone(criterion):
        with _undisturbed(criterion):
            first = _rows(criterion, reduction, *pairs[0])
            wrong = (
                True
                if first is None
                else _depends_on_order(partial(_rows, criterion, reduction), first, *pairs[0])
            )
        if first is None:
            reduction = None
        else:
            doubt(wrong, _batch_data(criterion))
    if reduction is None:
        if not even:
            raise _no_rows(criterion)
        if doubt is not None and not torch.compiler.is_compiling():
            with _undisturbed(criterion):
                wrong = _depends_on_order(criterion, criterion(*pairs[0]), *pairs[0])
            doubt(wrong, _batch_data(criterion))
        return torch.stack([criterion(*pair) for pair in pairs])
    losses = []
    for (rows, target), weight in zip(pairs, weights.unbind(1), strict=True):
        values = _rows(criterion, reduction, rows, target)
        if values is None:
            raise _no_rows(criterion)
        weighted = values * weight.reshape(-1, *[1] * (values.ndim - 1))
        if reduction == "mean":
            weighted = weighted.flatten(1).mean(1) if values.ndim > 1 else weighted
        total = weighted if reduction == "none" else weighted.sum()
        losses.append(total if reduction in ("none", "sum") else total / rows.shape[0])
    return torch.stack(losses)


REDUCTIONS = ("mean", "sum", "none", "batchmean")


def reduction_of(criterion: Criterion) -> str | None:
    """Return how a criterion reduces a batch, if it can be asked for its rows instead; else None."""
    inner, keywords = criterion, {}
    if isinstance(criterion, functools.partial):
        inner, keywords = criterion.func, criterion.keywords
    if inner is F.cross_entropy:  # compiled code cannot read signatures
        reduction = keywords.get("reduction", "mean")
    elif isinstance(getattr(criterion, "reduction", None), str):
        reduction = criterion.reduction  # type: ignore[attr-defined]
    else:
        try:
            parameter = inspect.signature(criterion).parameters.get("reduction")
        except (TypeError, ValueError):  # builtins may hide their signature
            return None
        reduction = None if parameter is None else parameter.default
    return reduction if reduction in REDUCTIONS else None


def _rows(criterion: Any, reduction: str, logits: Tensor, target: Tensor) -> Tensor | None:
    """Compute a criterion's values per row, (B, ...); None if it reduces the batch nevertheless."""
    if isinstance(getattr(criterion, "reduction", None), str):
        criterion.reduction = "none"
        try:
            values = criterion(logits, target)
        finally:
            criterion.reduction = reduction
    else:
        values = criterion(logits, target, reduction="none")
    whole = isinstance(values, Tensor) and values.ndim > 0 and values.shape[0] == logits.shape[0]
    return values if whole else None


def _knows_rows_alone(criterion: Any) -> bool:
    """Say whether a criterion is known to judge every row by itself, so that nothing has to be tried."""
    if torch.compiler.is_compiling():
        return True
    inner = criterion.func if isinstance(criterion, functools.partial) else criterion
    return inner in (F.cross_entropy, F.nll_loss) or type(inner) in (nn.CrossEntropyLoss, nn.NLLLoss)


def _depends_on_order(
    ask: Callable[..., Tensor | None], rows: Tensor, logits: Tensor, target: Tensor
) -> Tensor | bool:
    """Say whether values change where the rows of a batch change places, () bool, without waiting for a device."""
    with torch.no_grad():
        try:
            again = ask(logits.detach().roll(1, 0), target.roll(1, 0))
        except (RuntimeError, ValueError, IndexError):
            return True
        expected = rows.detach().roll(1, 0) if rows.ndim else rows.detach()
        if again is None or again.shape != expected.shape:
            return True
        allowed = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        return ((again - expected).abs() > allowed * (1 + expected.abs())).any()


@contextmanager
def _undisturbed(criterion: Any) -> Iterator[None]:
    """Leave attributes and buffers of a criterion, and the CPU's generator of random numbers, as they were."""
    owner = criterion.func if isinstance(criterion, functools.partial) else criterion
    owner = getattr(owner, "__self__", owner)
    parts = list(owner.modules()) if isinstance(owner, nn.Module) else [owner]
    kept = [(vars(part), dict(vars(part))) for part in parts if hasattr(part, "__dict__")]
    buffers = [(part._buffers, dict(part._buffers)) for part in parts if isinstance(part, nn.Module)]
    for now, before in buffers:
        now.update({name: buffer.clone() for name, buffer in before.items() if buffer is not None})
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for now, before in (*kept, *buffers):
            now.clear()
            now.update(before)


def _name(criterion: Any) -> str:
    inner = criterion.func if isinstance(criterion, functools.partial) else criterion
    return getattr(inner, "__name__", type(inner).__name__)


def _no_rows(criterion: Any) -> ConfigError:
    return ConfigError(
        f"The criterion {_name(criterion)} gives one value for a batch, and MixMo weighs every row by itself.\n"
        "The weighted loss does not follow from it: class weights, ranks and normalisation may span rows.\n"
        "Pass a criterion that can be asked for its rows: nn.CrossEntropyLoss(weight=..., label_smoothing=...), "
        "functools.partial(F.cross_entropy, weight=...), or a function with a parameter reduction that returns (B,) "
        'for reduction="none". Or give all members the same weight: mixing="sum".'
    )


def _batch_data(criterion: Any) -> ConfigError:
    return ConfigError(
        f"The criterion {_name(criterion)} gives a row another value where the rows of the batch change places.\n"
        "It holds data of the batch (weights of samples, a teacher's predictions) or draws random numbers, and MixMo's "
        "members see the batch in orders of their own.\n"
        "Hand such data over inside the labels, as soft targets, or leave them out."
    )


@dataclass(frozen=True)
class MixedLabels:
    """Labels of images that are each put together from two.

    Attributes:
        first: (B,) class indices of the first image of each pair.
        second: (B,) those of the other.
        mask: (B, 1, H, W) share of the first image in every pixel, in [0, 1].
    """

    first: Tensor
    second: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: Tensor | slice) -> MixedLabels:
        """The labels of some rows, such as those that a member of a permuted batch sees."""
        return MixedLabels(self.first[rows], self.second[rows], self.mask[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedLabels:
        """The labels on another device."""
        parts = (self.first, self.second, self.mask)
        return MixedLabels(*(part.to(device, non_blocking=non_blocking) for part in parts))

    def pin_memory(self) -> MixedLabels:
        """The labels in pinned memory, for loaders."""
        return MixedLabels(*(part.pin_memory() for part in (self.first, self.second, self.mask)))

    def soft(self, classes: int, visible: Tensor | None = None) -> Tensor:
        """Soft targets: each of the two labels with the share of its image.

        Args:
            classes: K.
            visible: the mask under which MixMo shows these images, (B, 1 or C, h, w): shares are then those of
                the visible part, see `visible_shares`. None: those of the whole image.

        Returns:
            (B, K) in the dtype of the mask; rows sum to 1. For one logit (B, 1), the mean of the two labels.
        """
        share = self.mask.mean((1, 2, 3)) if visible is None else visible_shares(self.mask, visible)
        share = share.unsqueeze(1)
        first, second = (one_hot(label, classes).to(share.dtype) for label in (self.first, self.second))
        return share * first + (1 - share) * second


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return labels as soft targets (B, K); those of one logit as they are, in a column (B, 1)."""
    return labels.reshape(-1, 1).float() if classes == 1 else F.one_hot(labels.long(), classes).float()


def visible_shares(mixed_mask: Tensor, masks: Tensor) -> Tensor:
    """Share of the first image of a mixed pair in what MixMo's mask leaves visible of that pair.

    mean(mixed · mask) / (mean(mask) + 1e-8), with the mixed mask average-pooled to the size of the other, as in
    the authors' pipeline (there for stems that keep or halve the size). Where nothing is visible it is 0; such a
    row weighs nothing in the loss.

    Args:
        mixed_mask: (..., 1, H, W), share of the first image per pixel.
        masks: (..., 1 or C, h, w) or (..., 1 or C, 1, 1), masks of one member's encodings.

    Returns:
        (...), in the dtype of `mixed_mask`.
    """
    seen = masks.to(mixed_mask.dtype).mean(-3, keepdim=True)
    height, width = seen.shape[-2:]
    pooled = F.adaptive_avg_pool2d(mixed_mask.flatten(0, -4), (height, width))
    pooled = pooled.reshape(*mixed_mask.shape[:-2], height, width)
    return (pooled * seen).mean((-3, -2, -1)) / (seen.mean((-3, -2, -1)) + 1e-8)


def input_cutmix(
    x: Tensor, y: Tensor, alpha: float = 1.0, visible: Tensor | None = None, p: float = 1.0
) -> tuple[Tensor, MixedLabels]:
    """Mix the images of a batch by CutMix (Yun et al., ICCV 2019), and remember which pixel is whose.

    Every image gets a box of its own, whose area follows Beta(alpha, alpha) before it is clipped, and a partner
    from the batch. As in MixMo's release the image with the larger part counts as the first of the pair.

    The release asks for the larger part of what MixMo's mask leaves visible, which `visible` gives; where it is
    smaller, the two images change places. In training the patch draws its masks only after the images were mixed,
    so there the larger part of the whole image is all that is known. What the network learns from is the same: a
    pair is as likely either way round, and its label names both images by their visible parts, see
    `visible_shares`. The order only decides which of the two is the one that every sample is once.

    Args:
        x: (B, C, H, W).
        y: (B,) class indices.
        alpha: parameter of the Beta distribution, above 0.
        visible: the mask under which these images will be shown, (B, 1 or C, h, w), for whoever draws masks
            first. None: all of the image is seen.
        p: probability that an image is mixed, a coin for each; the others stay as they are. 0.5 in the release, which
            mixes each member's image by itself with one from all of the data: `fxgraft.mixmo.paired_loader` does.

    Returns:
        The mixed images, with row b of `x` as the first image of row b, and their labels.

    Raises:
        ConfigError: alpha is not above 0, or p outside [0, 1].
        TargetError: labels that are not one class index per image.
    """
    if not 0 <= p <= 1:
        raise ConfigError(f"The probability of mixing an image must be in [0, 1], got {p!r}.")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise TargetError(
            f"Input CutMix pairs class indices of shape {tuple(x.shape[:1])}, got {tuple(y.shape)} of {y.dtype}.\n"
            "Which of two soft targets a pixel belongs to is not known; apply it before any other mixing."
        )
    share = dirichlet(alpha, x.shape[0], 2, x.device)[:, 0]
    height, width = x.shape[-2:]
    box = box_mask(share, draw_centres(x.shape[0], height, width, device=x.device), height, width)
    part = box.mean((1, 2, 3)) if visible is None else visible_shares(box, visible)
    mask = torch.where(part[:, None, None, None] < 0.5, 1 - box, box)
    if p < 1:
        mask = torch.where(torch.rand(x.shape[0], 1, 1, 1, device=x.device) < p, mask, 1)
    partner = torch.rand(x.shape[0], device=x.device).argsort()
    return torch.where(mask > 0, x, x[partner]), MixedLabels(y, y[partner], mask)
