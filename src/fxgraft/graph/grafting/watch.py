"""Between a pass and its loss: which pass an output is of, the loss that is never asked for, answers of a device."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxgraft.errors import FxgraftError, FxgraftWarning
from fxgraft.graph.grafting.labels import version_of
from fxgraft.graph.grafting.published import place_of
from fxgraft.graph.tracing.observe import tensors

STEPS = 2
"""So many backward passes of losses of somebody else are a training; one may be somebody looking at gradients."""


class LossWatch:
    """Notices that a model is trained and the loss of its grafts is never asked for, and warns of it once.

    Until then a hook on what a training pass returns notes that gradients came back to it, which costs next to
    nothing and waits for no accelerator. Passes alone say little: one loss may be of several.

    Attributes:
        asked: whether the loss was ever asked for, in any thread, or the warning was given.
    """

    def __init__(self) -> None:
        self.asked = False
        self._passes = 0
        self._warned = False
        self._trained: set[int] = set()

    def note(self, model: nn.Module, grafts: Sequence[str], out: Any) -> None:
        """Take note of a training pass.

        Args:
            model: that made it.
            grafts: names of those with a share in the loss.
            out: what it returned.

        Warns:
            FxgraftWarning: gradients came back to two passes before this one, and nobody asked for the loss.
        """
        if self.asked:
            return
        if len(self._trained) < STEPS:
            self._passes += 1
            for each in tensors(out):
                if each.requires_grad:
                    each.register_hook(partial(self._seen, self._passes))
            return
        self.asked = True
        warnings.warn(
            f"{', '.join(map(repr, grafts))} on this {model._get_name()} has a share in the loss, and the model is "
            "trained without it: fxgraft.loss, losses and extra_loss were never called.\n"
            "Take fxgraft.loss(model, out, y) for the loss, or add fxgraft.extra_loss(model, out, y) to your own.",
            FxgraftWarning,
            stacklevel=2,
        )

    def warn_of_no_gradients(self, model: nn.Module) -> None:
        """Warn, once, that the loss of a model in training mode was asked for where no gradients are recorded."""
        if self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        warnings.warn(
            f"The loss of this {model._get_name()} was asked for in training mode with gradients switched off "
            "(torch.no_grad or inference_mode): its patches act, and nothing is learned.\n"
            "Leave that block to train; call model.eval() to evaluate.",
            FxgraftWarning,
            stacklevel=4,
        )

    def _seen(self, number: int, _gradient: Tensor) -> None:
        self._trained.add(number)


class PassRecord:
    """What is known of a pass when the loss of its output is computed.

    Attributes:
        notes: what grafts remember of it, by name.
        labels: those that its grafts read, as the call gave them; None if none did.
        version: how often the labels were written to by then; None where that is not known.
        out: what it returned, where that was in compiled code and nobody has asked for it yet.
        shapes: of the tensors that it returned; empty until they are tied to it.
    """

    def __init__(self, notes: dict[str, Any], labels: Any = None, out: Any = None) -> None:
        self.notes = notes
        self.shapes: list[tuple[int, ...]] = []
        self.labels = labels
        self.version = None if torch.compiler.is_compiling() else version_of(labels)
        self.out = out


class Recent:
    """The last passes in compiled code, the newest first. Attributes, since compiled code guards on a list's length."""

    def __init__(self, first: PassRecord, second: PassRecord, third: PassRecord, fourth: PassRecord) -> None:
        self.first, self.second, self.third, self.fourth = first, second, third, fourth

    def all(self) -> tuple[PassRecord, ...]:
        """List them."""
        return self.first, self.second, self.third, self.fourth


def _no_passes() -> Recent:
    # Four records and not one, since compiled code guards on two attributes being the same object.
    return Recent(PassRecord({}), PassRecord({}), PassRecord({}), PassRecord({}))


FAR = 2000
"""So many steps of an output's arithmetic are followed back to the pass that it is of."""
BEYOND = 200
"""So many more, once a pass is found, to see whether another one has a part in it."""


class Outputs:
    """Knows which pass of a model an output is of.

    An output is tied to its pass by the tensors themselves and by a note at their place in the graph of autograd, which
    lives as long as the graph does. So what is computed from an output (converted, scaled, copied, cut) is known by the
    graph, and by its memory where it is a view and there is no graph. Compiled code can do neither: it leaves the last
    four outputs behind, and they are tied when somebody asks.
    """

    def __init__(self) -> None:
        self._records = WeakTensorKeyDictionary()
        self._noting: tuple[str, ...] = ()
        self._recent = _no_passes()

    def note(self, out: Any, notes: dict[str, Any], labels: Any) -> None:
        """Tie what a pass returned to it.

        Args:
            out: what it returned.
            notes: what grafts remember of it, by name.
            labels: those that its grafts read.
        """
        if torch.compiler.is_compiling():
            if notes or labels is not None:
                known = self._recent
                record = PassRecord(notes, labels, out)
                self._recent = Recent(record, known.first, known.second, known.third)
            return
        if notes or labels is not None or self._noting:
            self._tie(out, PassRecord(notes, labels))

    def records(self, out: Any) -> list[PassRecord]:
        """List the passes that an output is of, or was computed from."""
        recent = self._recent
        if torch.compiler.is_compiling():
            return [each for each in recent.all() if each.out is out]
        if recent.first.out is not None:
            self._recent = _no_passes()
            for record in reversed(recent.all()):
                if record.out is not None:
                    self._tie(record.out, record)
                    record.out = None
        given = tensors(out)
        found = [self._records[each] for each in given if each in self._records]
        found = found or [record for each in given for record in self._behind(each)]
        if not found:
            places = [place for each in given if (place := place_of(each)) is not None]
            known = [(place_of(each), record) for each, record in self._records.items()]
            found = [record for own, record in known if own and any(own.holds(place) for place in places)]
        return list({id(record): record for record in found}.values())

    def remembers(self, graft: str) -> bool:
        """Say whether a graft has remembered anything of any pass."""
        return graft in self._noting or any(graft in record.notes for record in self._recent.all())

    def _tie(self, out: Any, record: PassRecord) -> None:
        if any(name not in self._noting for name in record.notes):
            self._noting = tuple({*self._noting, *record.notes})
        for each in tensors(out):
            record.shapes.append(tuple(each.shape))
            self._records[each] = record
            node: Any = each.grad_fn
            if node is not None:
                node.metadata[self] = record

    def _behind(self, out: Tensor) -> list[PassRecord]:
        """Follow an output back through the graph of autograd, breadth first."""
        found: list[PassRecord] = []
        waiting = deque([] if out.grad_fn is None else [out.grad_fn])
        seen, left = set(waiting), FAR
        while waiting and left:
            node: Any = waiting.popleft()
            left -= 1
            record = node.metadata.get(self)
            if record is not None:
                left = left if found else min(left, BEYOND)
                found.append(record)
                continue
            following = [each for each, _ in node.next_functions if each is not None and each not in seen]
            seen.update(following)
            waiting.extend(following)
        return found


class Doubts:
    """What is checked on a device, whose answer is not waited for but looked at in a later step."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Any, FxgraftError]] = deque(maxlen=64)

    def check(self, wrong: Tensor | bool, error: FxgraftError) -> None:
        """Raise if something is wrong: at once where that is known, else when the device has found it out.

        Args:
            wrong: () bool.
            error: what to raise.
        """
        if torch.compiler.is_compiling():
            return
        if isinstance(wrong, bool) or wrong.device.type == "cpu":
            if not isinstance(wrong, FakeTensor) and wrong:
                raise error
            return
        if isinstance(wrong, FakeTensor) or wrong.is_meta or _capturing():
            return
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(wrong, non_blocking=True)
        done = torch.Event(wrong.device.type)
        done.record()
        self._waiting.append((answer, done, error))

    def answers(self) -> None:
        """Raise what a device has found to be wrong by now."""
        while self._waiting and self._waiting[0][1].query():
            answer, _, error = self._waiting.popleft()
            if answer:
                self._waiting.clear()
                raise error


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
