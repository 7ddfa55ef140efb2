"""The loss of a model with grafts: the criterion, and what the grafts add to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft._torch import assert_later
from fxgraft.errors import ConfigError, MethodError, StructureError, TargetError
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import registry_of
from fxgraft.graph.grafting.lookup import grafts_on, named_grafts, patched_parts
from fxgraft.graph.runtime.forward_context import ARGUMENTS, Context
from fxgraft.graph.runtime.labels import batch_of, check_criterion, differ, version_of
from fxgraft.graph.runtime.pass_records import OTHER_LABELS, some_of
from fxgraft.graph.structure.heads.outputs import take_logits
from fxgraft.graph.tracing.observe import tensors

Criterion = Callable[..., Tensor]


def losses(
    model: nn.Module, out: Any, y: Any, criterion: Callable[..., Tensor] = F.cross_entropy
) -> dict[str, Tensor]:
    """Return the parts of the loss by name: "criterion", then what each graft adds.

    Args:
        model: bare, patched, or with patched parts (a backbone inside a model of your own). Every graft of every part
            adds its terms, except for those that this output doesn't depend on while it depends on others, such as a
            teacher beside a student, frozen or under ``torch.no_grad``. A graft that stands in
            for the criterion (MixMo, the gradient-boosting loss) may be on one part, whose output is then the model's.
        out: what the model returned; of a structured output the logits are taken: "out" of torchvision's
            segmentation models, whose "aux" is left to you, or "logits".
        y: labels, as the criterion takes them, or as the call took them as ``target``.
        criterion: a function, called as ``criterion(logits, y)``.

    Returns:
        Scalars by name, "criterion" as the criterion gives it. Those of grafts are ``"<graft>.<term>"``, with the
        part's name before it where a graft is on a part: ``"backbone.crossnorm.consistency"``.

    Raises:
        StructureError: it is not clear what in the output are the logits; or a graft on a part stands in for the
            criterion, and the model's output is not that part's.
        ConfigError: grafts of several parts stand in for the criterion; or it is a class, or the cross-entropy of a
            single logit; or ``out`` and ``y`` changed places.
    """
    _ask(model, out, y)
    names = [getattr(graft.patch, "output", None) for graft in grafts_on(model)]
    logits = take_logits(out, names)
    _check_arguments(logits, criterion)
    own = criterion
    for graft in _judging(model, logits):
        replacement = graft.patch.criterion(graft, criterion)
        # Compiled code knows no attributes of a function that it has made itself.
        if not torch.compiler.is_compiling() and not hasattr(replacement, "__call__"):  # noqa: B004 - `callable` narrows
            raise MethodError(
                f"{type(graft.patch).__name__}.criterion returned {_kind(replacement)}.\n"
                "criterion() returns a criterion, called as criterion(logits, y): at least the one it was given."
            )
        criterion = replacement
    if criterion is own:  # where a graft stands in for it, the logits may be of several rows each
        check_criterion(own, logits.shape[1] if logits.ndim > 1 else 1)
    return {"criterion": criterion(logits, y), **_terms(model, out, y, criterion)}


def loss(model: nn.Module, out: Any, y: Any, criterion: Callable[..., Tensor] = F.cross_entropy) -> Tensor:
    """Return the whole loss as one scalar: the sum of `losses`. A criterion alone is returned as it is.

    >>> import fxgraft, timm, torch
    >>> model = fxgraft.patch(timm.create_model("test_resnet", num_classes=4), "mixmo")
    >>> x, y = torch.randn(4, 3, 96, 96), torch.arange(4)
    >>> out = model(x, target=y)  # one row of logits for each member
    >>> fxgraft.loss(model, out, y).backward()

    Args:
        model: the model, as in `losses`.
        out: what the model returned.
        y: labels.
        criterion: a function, called as ``criterion(logits, y)``.

    Raises:
        StructureError, ConfigError: as `losses`; or the criterion reduces nothing and grafts add terms.
    """
    parts = losses(model, out, y, criterion)
    if len(parts) == 1:
        return parts["criterion"]
    if not isinstance(parts["criterion"], Tensor):
        raise ConfigError(
            f"The criterion returned {_kind(parts['criterion'])}, to which the grafts add tensors.\n"
            "A number or a tuple has no gradient to add to.\nReturn the loss alone, as a tensor."
        )
    if parts["criterion"].numel() != 1:
        others = ", ".join(map(repr, list(parts)[1:]))
        raise ConfigError(
            f"The criterion gave {_kind(parts['criterion'])}, and the grafts add {others} to it, which are scalars.\n"
            "A sum of both would count them once for every value.\n"
            'Let the criterion reduce (reduction="mean"), or take fxgraft.losses(...) and add up its parts.'
        )
    return _sum(parts)


def extra_loss(
    model: nn.Module, out: Any, y: Any, criterion: Callable[..., Tensor] = F.cross_entropy
) -> Tensor:
    """Return what the grafts add to the loss, without the criterion: to be added to a loss of your own.

    For criteria that take more than the logits (auxiliary heads, reference scripts), and for models that compute
    their loss themselves (detectors, transformers): ``out.loss + fxgraft.extra_loss(model, out, y)``.

    Args:
        model: the model, as in `losses`.
        out: what the model returned.
        y: labels, as the call took them as ``target``.
        criterion: the criterion for terms that use it, called as ``criterion(logits, y)``.

    Returns:
        A scalar; zero, without a gradient, where no graft adds anything.

    Raises:
        ConfigError: a graft stands in for the criterion, so that a loss without it would not be the method's.
        StructureError: a term needs the logits, and it is not clear what in the output they are.
    """
    _ask(model, out, y)
    for name, graft in named_grafts(model).items():
        if graft.patch.replaces_criterion():
            raise ConfigError(
                f"{name!r} ({graft.patch.title}) stands in for the criterion, and extra_loss is there for losses of "
                "your own.\nWhat it does to the criterion would be missing.\n"
                "Call fxgraft.loss(model, out, y, criterion=...), or unpatch it."
            )
    terms = _terms(model, out, y, criterion)
    if terms:
        return _sum(terms)
    return next(
        (tensor.new_zeros(()) for tensor in tensors(out) if tensor.is_floating_point()), torch.zeros(())
    )


def _check_arguments(logits: Any, criterion: Any) -> None:
    """Raise `ConfigError` for a criterion that cannot be called on logits, and for what isn't logits."""
    if isinstance(criterion, type):
        raise ConfigError(
            f"criterion is a function, called as criterion(logits, y), and {criterion.__name__} is a class.\n"
            f"It would build an object from the logits.\nPass an object of it: {criterion.__name__}()."
        )
    if not callable(criterion):
        raise ConfigError(
            f"criterion is a function, called as criterion(logits, y), and {criterion!r} cannot be called.\n"
            "Pass for example torch.nn.functional.cross_entropy, which is the default."
        )
    if isinstance(logits, Tensor) and not logits.is_floating_point() and not logits.is_complex():
        raise ConfigError(
            f"The output of the model was given as a tensor of {logits.dtype}, which are labels and not logits.\n"
            "Call fxgraft.loss(model, out, y), in this order."
        )


def _sum(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.reshape(()) for value in parts.values()]).sum()


def _ask(model: nn.Module, out: Any, y: Any) -> None:
    """Note in every patched part that its loss is asked for, and compare the labels with those that its passes took."""
    for path, part in patched_parts(model).items():
        registry = registry_of(part)
        if registry is not None:
            registry.context.watch.asked = True
            if part.training and not torch.compiler.is_compiling():
                registry.watch_asked(part)
            if part.training and not torch.is_grad_enabled():
                registry.context.watch.warn_of_no_gradients(part)
            if torch.compiler.is_compiling():
                _compare_compiled(registry.context, path, out, y)
            else:
                registry.context.checks.answers()
                _compare_labels(registry.context, path, out, y)


@torch.compiler.disable(
    reason="fxgraft.loss compares labels with those of the pass, which compiled code finds by the output as the model "
    "returned it, of its last two passes. Give it that, and convert outputs in the criterion."
)
def _compare_labels(context: Context, path: str, out: Any, y: Any) -> None:
    """Raise where a loss is given other labels than the pass that it is for took.

    Outside of compiled code, which cannot tell which pass an output is of that was converted.

    Raises:
        TargetError: it is; on an accelerator it may come in one of the next steps, since the device is not waited for.
        StructureError: a part took them for what it returns, and the loss is for what a classifier behind it does.
    """
    records = context.outputs.records(out)
    shapes = [tuple(tensor.shape) for tensor in tensors(out)]
    for record in records:
        if record.labels is None:
            continue
        if path and not any(shape in record.shapes for shape in shapes):
            if y is record.labels:
                _check_classes(path, record.shapes, shapes)
            continue  # the model around a part may have another task
        if record.version is not None and record.version != version_of(record.labels):
            raise TargetError(
                "The labels of the pass were written to between the pass and its loss.\n"
                "The grafts acted on what they were before.\n"
                "Change labels in a copy, y.clone(), or before the pass, and give both the same."
            )
        if len(records) > 1 and batch_of(y) != batch_of(record.labels):
            continue  # outputs of several passes, joined
        wrong = differ(record.labels, y)
        if wrong is not None and wrong is not False:
            context.checks.check(wrong, TargetError(_OTHER_LABELS))


def _check_classes(path: str, own: Sequence[tuple[int, ...]], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise where a part that took labels of classes gives another number of them than the model around it."""
    if not {shape[1:2] for shape in own} & {shape[1:2] for shape in shapes}:
        raise StructureError(
            f"What is patched in the part {path!r} took the labels of this loss for the part's own output, "
            f"{', '.join(map(str, own))}, and the loss is for {', '.join(map(str, shapes))}.\n"
            "An encoder that ends in a linear layer or a convolution looks like a classifier; it gives features.\n"
            "Patch the whole model; layers= takes names inside of the part."
        )


def _compare_compiled(context: Context, path: str, out: Any, y: Any) -> None:
    """Have compiled code raise, as it runs, where a loss is given other labels than the pass took.

    Only for what a pass returned, as it is: from an output that was converted, compiled code finds no way back.
    """
    # Before the pass is looked at: the compiler then reads a tensor that both hold from the argument.
    some, labels = some_of(out), some_of(y)
    record = context.outputs.compiled(out)
    if record is None:
        if not path and context.outputs.compiled_labels():
            _compare_labels(context, path, out, y)
        return
    if path or record.labels is None:  # the model around a part may have another task
        record.check(some, None)
        return
    wrong = differ(record.labels, y)
    if wrong is True:
        raise TargetError(_OTHER_LABELS)
    record.check(some, labels if y is record.labels else some_of(record.labels))
    if isinstance(wrong, Tensor):
        assert_later(~wrong, OTHER_LABELS)


_OTHER_LABELS = (
    "The loss was given other labels than the pass of this output took.\n"
    "The grafts acted on those of the pass, and the loss would train on others: permuted, mixed, mapped to other "
    "classes, or of another batch. (Smoothed labels of the same classes are the same.)\n"
    "Give both the same, model(x, target=y) and fxgraft.loss(model, out, y): mix before the pass, map in the criterion."
)


def _terms(model: nn.Module, out: Any, y: Any, criterion: Criterion) -> dict[str, Tensor]:
    if torch.compiler.is_compiling():
        return _collected(model, out, y, criterion)
    registries = [registry_of(part) for part in patched_parts(model).values()]
    watches = [registry.context.watch for registry in registries if registry is not None]
    for watch in watches:
        watch.unasked = None  # passes that a graft runs for its loss do not count as the training's
    try:
        return _collected(model, out, y, criterion)
    finally:
        for watch in watches:
            watch.unasked = 0


def _collected(model: nn.Module, out: Any, y: Any, criterion: Criterion) -> dict[str, Tensor]:
    return {
        ".".join(filter(None, (path, graft.name, term))): value
        for path, part in _trained_parts(model, out).items()
        for graft in grafts_on(part)
        for term, value in _checked(graft, graft.patch.losses(graft, out, y, criterion)).items()
    }


def _trained_parts(model: nn.Module, out: Any) -> dict[str, nn.Module]:
    """Find the patched parts that an output trains, where that can be told; else all.

    Gradients may come back to their last pass, and the output is seen to be computed from one of their passes.
    """
    parts = patched_parts(model)
    if len(parts) == 1 or torch.compiler.is_compiling():
        return parts
    contexts = {
        path: registry.context for path, part in parts.items() if (registry := registry_of(part)) is not None
    }
    learning = {
        path: context for path, context in contexts.items() if context.left is None or context.left.learns
    } or contexts
    behind = {path for path, context in learning.items() if context.outputs.records(out)}
    if behind:
        noting = {
            path
            for path, context in learning.items()
            if any(map(context.outputs.remembers, (*context.loss_grafts, ARGUMENTS)))
        }
        learning = {
            path: context for path, context in learning.items() if path in behind or path not in noting
        }
    return {path: parts[path] for path in learning}


def _checked(graft: Graft, terms: Any) -> Mapping[str, Tensor]:
    """Return what ``losses`` of a method returned, if it is scalars by name."""
    wrong = _kind(terms)
    if isinstance(terms, Mapping):
        wrong = next(
            (
                f"{_kind(term)} as {name!r}"
                for name, term in terms.items()
                if not isinstance(term, Tensor) or term.numel() != 1
            ),
            "",
        )
    if wrong:
        raise MethodError(
            f"{type(graft.patch).__name__}.losses returned {wrong}.\n"
            'losses() returns scalar tensors by name, as {"term": value}, or {} where there is nothing to add.'
        )
    return terms  # type: ignore[no-any-return]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _judging(model: nn.Module, logits: Any) -> list[Graft]:
    """List the grafts that replace the criterion; only one part of a model may have some.

    Raises:
        ConfigError: there are several such parts.
        StructureError: the logits are not the output of that part.
    """
    by_part: dict[str, list[Graft]] = {}
    for path, part in _trained_parts(model, logits).items():
        for graft in grafts_on(part):
            if graft.patch.replaces_criterion():
                by_part.setdefault(path, []).append(graft)
    if len(by_part) > 1:
        names = " and ".join(
            f"{grafts[0].name!r} on {path or 'the model'!r}" for path, grafts in by_part.items()
        )
        raise ConfigError(
            f"{names} each stand in for the criterion.\nEach judges the output of its own part by its own rule.\n"
            "Call fxgraft.loss on each part with that part's output, and add the results."
        )
    for path, grafts in by_part.items():
        context = grafts[0].context
        left = None if context is None else context.left
        shapes = None if left is None else left.shapes
        if path and shapes is not None and tuple(logits.shape) not in shapes:
            method = grafts[0].patch.method
            raise StructureError(
                f"{grafts[0].name!r} on the part {path!r} stands in for the criterion, and the model's output "
                f"{tuple(logits.shape)} is not that part's {', '.join(map(str, shapes))}.\n"
                "It judges the predictions of the model that it was put on.\n"
                f"Patch the whole model, fxgraft.patch(model, {method!r}, ...), or call fxgraft.loss on the part with "
                "the part's own output."
            )
    return [graft for grafts in by_part.values() for graft in grafts]
