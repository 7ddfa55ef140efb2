"""Finds labels in a batch, and checks them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft._torch import assert_later
from fxgraft.errors import ConfigError, TargetError
from fxgraft.graph.runtime.recorders import recorded, transformed, values_of

Entry = int | str | tuple[int | str, ...]
"""Where the labels are in a batch: a position, a key, an attribute, or a path of these."""

LEFT_OUT = (255, -1, -100)
"""Indices that data sets and criteria take for no class at all."""


def checked_labels(graft: str, target: Any, batch: int) -> Tensor:
    """Return labels that fit a batch, or raise.

    Args:
        graft: name of the graft that needs them, for the message.
        target: the labels; None for none.
        batch: number of samples.

    Raises:
        TargetError: no labels, no tensor, or another batch size.
    """
    if target is None:
        raise TargetError(
            f"{graft!r} needs the labels of the batch in training, and none were given.\n"
            "Call model(x, target=y), or wrap the call in `with fxgraft.targets(y):`, or iterate "
            "over fxgraft.with_targets(loader), with the loader that accelerate or Lightning returns; "
            "model.eval() needs none."
        )
    if not isinstance(target, Tensor):
        raise TargetError(
            f"{graft!r} was given labels of type {type(target).__name__}.\n"
            "Pass a tensor of class indices (B,) or of soft targets (B, K)."
        )
    if target.is_complex():
        raise TargetError(
            f"{graft!r} was given complex labels.\n"
            "Pass a tensor of class indices (B,) or of soft targets (B, K)."
        )
    if target.ndim == 0 or target.shape[0] != batch:
        raise TargetError(
            f"{graft!r} was given labels for {target.shape[0] if target.ndim else 'no'} "
            f"samples with a batch of {batch}.\n"
            "Labels and inputs must be of the same batch; labels set earlier may have been left over."
        )
    # Narrow integers index as masks (uint8, bool) or not at all.
    return target if target.is_floating_point() or target.dtype == torch.int64 else target.long()


def check_label_range(
    graft: str,
    target: Tensor,
    classes: int,
    spatial: int = 0,
    doubt: Callable[[Tensor | bool, TargetError], None] | None = None,
) -> Tensor:
    """Raise `TargetError` for labels of another shape or number of classes, and for indices out of range.

    On the CPU the values are read. On an accelerator that would stall the queue, so the error comes in a later step.
    In compiled and recorded code it would break the graph: there the graph raises `RuntimeError` as it runs.

    Args:
        graft: name of the graft that needs them, for the message.
        target: class indices or soft targets.
        classes: K.
        spatial: how many dimensions the logits have after (B, K).
        doubt: a function, called on an accelerator with () bool and the error, as `PassView.doubt`.

    Returns:
        The labels, indices within [0, K) whatever they were, for lookups that would wrap or write elsewhere.
    """
    soft = target.is_floating_point()
    if soft and target.ndim == 1:
        raise TargetError(
            f"{graft!r} was given one floating-point number per sample as labels of {classes} classes.\n"
            "Class indices are integers (B,), soft targets are floating-point (B, K); a number to predict (regression, "
            "an ordered level) isn't a class, and no probability belongs to it.\n"
            "Pass y.long() if these are indices, or leave the method out of a regression."
        )
    if target.ndim != spatial + (2 if soft else 1):
        per = "(B, K, ...)" if spatial else "(B, K)"
        raise TargetError(
            f"{graft!r} was given {'soft' if soft else 'integer'} labels of shape {tuple(target.shape)} "
            f"for logits {per}.\n"
            "Class indices have one dimension less than the logits, soft targets as many and floating point.\n"
            "Pass y.squeeze(1) for indices (B, 1), y.float() for one-hot labels (B, K)."
        )
    if soft and target.shape[1] != classes:
        raise TargetError(
            f"{graft!r} was given soft targets for {target.shape[1]} classes; the model has {classes}.\n"
            "Soft targets are (B, K), one weight per class of the model.\n"
            "Check num_classes of the model and of the data's mixing."
        )
    if soft:
        return target
    if recorded():
        # One line without double quotes, since compilers write it into their own source.
        message = (
            f"{graft!r} was given class indices outside of [0, {classes - 1}], the classes of the model."
        )
        assert_later(((target >= 0) & (target < classes)).all(), message)
        return target.clamp(0, classes - 1)
    values = values_of(target)
    if target.device.type != "cpu":
        if doubt is not None:
            error = TargetError(
                f"{graft!r} was given class indices outside of [0, {classes - 1}] in an earlier pass.\n"
                "The device found it out by now, since it isn't waited for.\n"
                "Check num_classes of the model and the labels of the data."
            )
            doubt(((values < 0) | (values >= classes)).any(), error)
        return target.clamp(0, classes - 1)
    lowest, highest = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    if not 0 <= lowest <= highest < classes:
        mark = next((value for value in (highest, lowest) if value in LEFT_OUT), None)
        hint = (
            ""
            if mark is None
            else f"\n{mark} often marks what is to be left out: {_leaving_out(mark, spatial)}"
        )
        raise TargetError(
            f"{graft!r} was given class indices from {lowest} to {highest} "
            f"for {classes} classes.\n"
            f"Indices must lie in [0, {classes - 1}]. Check num_classes of the model and the labels of the data.{hint}"
        )
    return target


def check_criterion(criterion: Any, classes: int) -> None:
    """Raise `ConfigError` for the cross-entropy of a single logit.

    Args:
        criterion: the criterion, as `fxgraft.loss` takes it.
        classes: number of logits of each row.
    """
    inner = criterion.func if isinstance(criterion, functools.partial) else criterion
    if classes == 1 and (inner is F.cross_entropy or isinstance(inner, nn.CrossEntropyLoss)):
        raise ConfigError(
            "fxgraft.loss was asked for the cross-entropy of one logit, which is 0 whatever the logit is.\n"
            "One logit is a question of yes and no, or a number to predict.\n"
            "Pass criterion=F.binary_cross_entropy_with_logits with labels (B, 1), or a loss of numbers."
        )


def check_soft_labels(graft: str, target: Tensor) -> None:
    """Raise `TargetError` for soft targets (B, K, ...) that aren't a distribution over classes.

    Only where looking costs nothing, as in `check_label_range`.
    """
    if not target.is_floating_point() or not _readable(target):
        return
    total = target.detach().sum(1)
    if bool((target < 0).any()) or bool(((total - 1).abs() > 0.02).any()):
        raise TargetError(
            f"{graft!r} was given soft targets that aren't a distribution over the classes: rows sum to "
            f"{float(total.min()):.3g} to {float(total.max()):.3g}, and not to 1.\n"
            "Several labels for an image are one question each; numbers to predict (regression) have no probability.\n"
            'Pass probability="sigmoid" to the method for several labels, or leave it out of a regression.'
        )


def binary_labels(
    graft: str, target: Tensor, shape: torch.Size, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Return the labels of binary logits, one question of yes or no each, and which of them count.

    Args:
        graft: name of the graft that needs them, for the message.
        target: 0 and 1, or the probability of 1, of any dtype: (B, K, ...), or (B, ...) for one logit.
        shape: the shape of the logits, (B, K, ...).
        ignore_index: value of labels to leave out.

    Returns:
        The probability of yes, and 1 where a label counts, else 0; both floating point and shaped as the logits.

    Raises:
        TargetError: labels of another shape, or outside [0, 1].
    """
    if shape[1] == 1 and target.ndim == len(shape) - 1:
        target = target.unsqueeze(1)
    if target.shape != shape:
        one = " or (B, ...)" if shape[1] == 1 else ""
        raise TargetError(
            f"{graft!r} was given labels of shape {tuple(target.shape)} for logits {tuple(shape)}, each of which is a "
            f"question of yes or no.\nIts labels are 0 and 1, shaped as the logits{one}.\n"
            "Pass one label for each logit, or give the model one logit for each class."
        )
    counts = target != ignore_index
    wide = target if target.is_floating_point() else target.float()
    answers = wide.where(counts, torch.zeros_like(wide))
    whole = not target.is_floating_point()
    if (
        _readable(answers)
        and answers.numel()
        and not (float(answers.min()) >= 0 and float(answers.max()) <= 1)
    ):
        what = "class indices or levels" if whole else "numbers"
        raise TargetError(
            f"{graft!r} was given {what} from {float(answers.min()):g} to {float(answers.max()):g} as labels of logits "
            "that are each a question of yes or no.\n"
            "Their labels are 0 and 1, or a probability between; an ordered level or a number to predict (regression) "
            "has no probability.\n"
            "Give the model one logit for each class or level, or leave the method out of a regression."
        )
    return answers, counts.to(answers.dtype)


def _readable(target: Tensor) -> bool:
    """Say whether values can be read at no cost: on the CPU, and not while they are traced."""
    return target.device.type == "cpu" and not recorded() and not transformed()


def _leaving_out(mark: int, spatial: int) -> str:
    if spatial:
        return f"pass ignore_index={mark} to the method and to the criterion."
    return f"in labels of pixels, ignore_index={mark} does so; a sample without a class belongs out of the batch."


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """List the tensors in a batch: of mappings, sequences, dataclasses and other objects, nested up to a depth."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, (str, bytes, nn.Module, type)):
        if isinstance(value, Mapping):
            parts: Iterable[Any] = value.values()
        elif isinstance(value, (list, tuple)):
            parts = value
        else:
            names = (*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", ()))
            parts = (getattr(value, name, None) for name in names)
        for part in parts:
            yield from tensors_in(part, depth - 1)


def take_from(batch: Any, entry: Entry, how: str) -> tuple[Any, Any]:
    """Take the labels out of a batch.

    Args:
        batch: a sequence, mapping, dataclass or other object.
        entry: see `Entry`.
        how: the code to write instead, for the message.

    Returns:
        The labels, and the part of the batch that they are an entry of. Where a path meets None (a loader of several
        that has come to its end) both are None.

    Raises:
        TargetError: the batch has no such entry.
    """
    steps = entry if isinstance(entry, tuple) and not _has(batch, entry) else (entry,)
    around, value = None, batch
    for step in steps:
        if value is None:
            return None, None
        around, value = value, _entry(value, step, entry, how)
    return value, around


def _has(batch: Any, entry: Any) -> bool:
    return isinstance(batch, Mapping) and entry in batch


def _entry(value: Any, step: Any, entry: Entry, how: str) -> Any:
    whole = isinstance(value, (Tensor, str, bytes))  # these can be indexed, but the result isn't an entry
    try:
        if isinstance(step, str) and not isinstance(value, Mapping) and not whole and hasattr(value, step):
            return getattr(value, step)
        held: Any = () if whole else value
        return held[step]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        names: Iterable[Any] = ()
        if isinstance(value, Mapping):
            names = value
        elif isinstance(value, (list, tuple)):
            names = getattr(value, "_fields", range(len(value)))
        elif not whole:
            names = getattr(value, "__dict__", ())
        has = ", ".join(map(repr, [*names][:12])) or "no entries"
        part = (
            "The batch" if step is entry or step == entry else f"On the way to {entry!r} a part of the batch"
        )
        raise TargetError(
            f"{part}, a {type(value).__name__}, has no entry {step!r} for the labels; it has {has}.\n"
            'The labels are found by a position, a key, an attribute, or a path of these: ("labelled", 1).\n'
            f"{how}"
        ) from error


def batch_of(labels: Any) -> int | None:
    """Return the number of samples that have these labels; None if that is not clear."""
    sizes = {len(tensor) for tensor in tensors_in(labels) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def version_of(labels: Any) -> int | None:
    """Return how often labels were written to; None where that is not known."""
    try:
        return sum(tensor._version for tensor in tensors_in(labels))
    except RuntimeError:  # tensors made in inference mode do not count
        return None


def differ(taken: Any, given: Any) -> Tensor | bool | None:
    """Say whether labels differ from those that a pass took, without waiting for a device.

    Class indices, one-hot labels and smoothed ones of the same classes are alike: a row of one is a positive
    multiple of the other's, plus a constant. Labels that are mixed, permuted or mapped to other classes are not.

    Args:
        taken: class indices (B, ...), soft targets (B, K, ...), or several tensors in any structure.
        given: the labels to compare with.

    Returns:
        () bool on the labels' device; a bool where nothing has to be computed; None where they cannot be compared:
        there are none, or they are those of a part of the batch.
    """
    if given is None or given is taken:
        return None
    parts = list(tensors_in(given))
    if isinstance(taken, Tensor):
        if isinstance(given, Tensor):
            return _differ(taken, given)
        alike = [_differ(taken, part) for part in parts if _comparable(taken, part)]
        if not alike or any(answer is False or answer is None for answer in alike):
            return None if not alike else False
        return _joined(alike, all)
    own = list(tensors_in(taken))
    if isinstance(given, Tensor) and isinstance(taken, (list, tuple)):
        return None  # a method that took several labels checks a single one itself
    if isinstance(given, Tensor) or len(own) != len(parts):
        return True
    return _joined([_differ(*pair) for pair in zip(own, parts, strict=True)], any)


def _joined(answers: list[Tensor | bool | None], how: Any) -> Tensor | bool:
    if any(isinstance(answer, Tensor) for answer in answers):
        device = next(answer.device for answer in answers if isinstance(answer, Tensor))
        flags = torch.stack(
            [torch.as_tensor(bool(answer) if answer is None else answer).to(device) for answer in answers]
        )
        return flags.any() if how is any else flags.all()
    return how(bool(answer) for answer in answers)


def _comparable(taken: Tensor, given: Tensor) -> bool:
    return taken.shape == given.shape and taken.is_floating_point() == given.is_floating_point()


def _differ(taken: Tensor, given: Tensor) -> Tensor | bool | None:
    if taken is given:
        return False
    if taken.ndim and given.ndim and given.shape[0] < taken.shape[0] and given.numel() < taken.numel():
        return None
    taken = taken.detach().to(given.device, non_blocking=True)
    given = given.detach()
    soft, hard = (taken, given) if taken.is_floating_point() else (given, taken)
    if soft.is_floating_point() and soft.ndim == hard.ndim + 1 and soft.shape[1] > 1:
        if (*soft.shape[:1], *soft.shape[2:]) != tuple(hard.shape):
            return True
        classes = torch.arange(soft.shape[1], device=soft.device).reshape(-1, *[1] * (hard.ndim - 1))
        hard = (hard.unsqueeze(1) == classes).to(soft.dtype)
    elif soft.numel() != hard.numel() or (soft.ndim == hard.ndim and soft.shape != hard.shape):
        return True
    elif not soft.is_floating_point():
        return (soft != hard.reshape(soft.shape)).any()
    half = any(labels.dtype in (torch.float16, torch.bfloat16) for labels in (soft, hard))
    hard = hard.reshape(soft.shape)
    if soft.ndim < 2 or soft.shape[1] == 1 or not hard.is_floating_point():
        pair = (soft.float(), hard.float())
    else:
        pair = (_direction(soft.float()), _direction(hard.float()))
    return ((pair[0] - pair[1]).abs() > (2e-2 if half else 1e-3)).any()


def _direction(rows: Tensor) -> Tensor:
    """Scale the deviations of rows (B, K, ...) from their means to length 1; a row without any stays 0."""
    apart = rows - rows.mean(1, keepdim=True)
    length = apart.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-4, apart / length, torch.zeros_like(apart))
