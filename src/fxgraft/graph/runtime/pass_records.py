"""Records of passes, and the way from an output to the record of the pass that gave it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxgraft._torch import assert_later
from fxgraft.graph.runtime.labels import version_of
from fxgraft.graph.runtime.published_labels import place_of
from fxgraft.graph.tracing.observe import tensors


class PassRecord:
    """What is known of a pass when the loss of its output is computed.

    Attributes:
        notes: what grafts remember of it, by name.
        labels: the labels that its grafts read, as the call gave them; None if none did.
        version: how often the labels had been written to; None where that is not known.
        out: the output of a pass in compiled code, until somebody asks for it.
        shapes: the shapes of the tensors that it returned; empty until they are tied to it.
        sample: some of the values that it returned in compiled code.
        some_labels: some of the labels there.
    """

    def __init__(self, notes: dict[str, Any], labels: Any = None, out: Any = None) -> None:
        self.notes = notes
        self.shapes: list[tuple[int, ...]] = []
        self.labels = labels
        self.version = None if torch.compiler.is_compiling() else version_of(labels)
        self.out = out
        self.sample = None if out is None else some_of(out)
        self.some_labels = None if out is None else some_of(labels)

    def check(self, out: Tensor | None, labels: Tensor | None) -> None:
        """Make compiled code raise when it runs with an output or labels that are not those of this pass.

        They were one tensor when the code was compiled. The compiler doesn't check that again where one is reached
        through a global name and the other is an argument.

        Args:
            out: some of the output's values, as `some_of` gives them.
            labels: some of the labels; None where they were compared by other means.
        """
        _check_same(self.sample, out, OTHER_OUTPUT)
        _check_same(self.some_labels, labels, OTHER_LABELS)


OTHER_OUTPUT = (
    "fxgraft.loss was given an output of another pass than it was compiled for: compile both together."
)
OTHER_LABELS = "fxgraft.loss was given other labels than the pass of this output took."


def _check_same(sample: Tensor | None, given: Tensor | None, message: str) -> None:
    if sample is None or given is None or sample.shape != given.shape:
        return
    # Compilers may round a value and its sample apart.
    near = (sample - given).abs() <= 2e-2 * (sample.abs() + given.abs())
    assert_later((near | sample.isnan()).all(), message)


SOME = 4096
"""So many numbers of outputs and of labels are compared in compiled code."""


def some_of(value: Any) -> Tensor | None:
    """Copy a few numbers of an output or of labels; None where there are none."""
    first = next((tensor for tensor in tensors(value) if tensor.numel()), None)
    return None if first is None else first.detach().flatten()[:SOME].float().clone()


class Recent:
    """The last passes in compiled code, newest first. In attributes: compiled code would guard on a list's length."""

    def __init__(self, first: PassRecord, second: PassRecord, third: PassRecord, fourth: PassRecord) -> None:
        self.first, self.second, self.third, self.fourth = first, second, third, fourth

    def all(self) -> tuple[PassRecord, ...]:
        """List the passes."""
        return self.first, self.second, self.third, self.fourth


def _no_passes() -> Recent:
    # Four empty records: with one for all, compiled code would guard on the attributes being the same object.
    return Recent(PassRecord({}), PassRecord({}), PassRecord({}), PassRecord({}))


FAR = 2000
"""So many steps of an output's arithmetic are followed back to the pass that it is of."""
BEYOND = 200
"""So many more, once a pass is found, to see whether another one has a part in it."""


class Outputs:
    """Finds the pass that an output comes from.

    An output is tied to its pass in two ways: by its tensors, and by a note in the graph of autograd, which lives as
    long as the graph. So the graph shows what was computed from an output (converted, scaled, copied, cut). Where
    there is no graph, shared memory shows that a tensor is a view of one. Compiled code can do neither. It stores its
    last four outputs, and they are tied when somebody asks.
    """

    def __init__(self) -> None:
        self._records = WeakTensorKeyDictionary()
        self._noting: tuple[str, ...] = ()
        self._recent = _no_passes()
        self._tied = False

    def note(self, out: Any, notes: dict[str, Any], labels: Any) -> None:
        """Tie a pass's output to the pass.

        Args:
            out: what the pass returned.
            notes: what grafts remember of it, by name.
            labels: the labels that its grafts read.
        """
        if torch.compiler.is_compiling():
            if notes or labels is not None:
                known = self._recent
                record = PassRecord(notes, labels, out)
                self._recent = Recent(record, known.first, known.second, known.third)
            return
        self._tie_recent()  # first, so that compiled code doesn't take this output for one of its own
        if notes or labels is not None or self._noting:
            self._tie(out, PassRecord(notes, labels))

    def records(self, out: Any) -> list[PassRecord]:
        """List the passes that an output is of, or was computed from."""
        recent = self._recent
        if torch.compiler.is_compiling():
            # The compiler guards on all that is looked at, and this is looked at in every call.
            same = next((record for record in recent.all() if record.out is out), None)
            return [] if same is None else [same]
        self._tie_recent()
        if not self._tied:  # no pass is known: don't walk through a long graph of autograd
            return []
        outputs = tensors(out)
        records = [self._records[tensor] for tensor in outputs if tensor in self._records]
        records = records or [record for tensor in outputs for record in self._behind(tensor)]
        if not records:
            places = [place for tensor in outputs if (place := place_of(tensor)) is not None]
            known = [(place_of(tensor), record) for tensor, record in self._records.items()]
            records = [record for own, record in known if own and any(own.holds(place) for place in places)]
        return list({id(record): record for record in records}.values())

    def compiled(self, out: Any) -> PassRecord | None:
        """Find the pass of an output in compiled code, among the last two: it guards on all that is looked at."""
        if self._recent.first.out is out:
            return self._recent.first
        return self._recent.second if self._recent.second.out is out else None

    def compiled_labels(self) -> bool:
        """Say whether the last compiled pass read labels, if its loss was not asked for yet."""
        return self._recent.first.out is not None and self._recent.first.labels is not None

    def trained(self) -> bool:
        """Say whether the last four passes were compiled ones with gradients whose loss nobody asked for."""
        return all(any(part.requires_grad for part in tensors(record.out)) for record in self._recent.all())

    def _tie_recent(self) -> None:
        recent = self._recent
        if recent.first.out is None:
            return
        self._recent = _no_passes()
        for record in reversed(recent.all()):
            if record.out is not None:
                self._tie(record.out, record)
                record.out = record.sample = record.some_labels = None

    def remembers(self, graft: str) -> bool:
        """Say whether a graft has remembered anything of any pass."""
        return graft in self._noting or any(graft in record.notes for record in self._recent.all())

    def _tie(self, out: Any, record: PassRecord) -> None:
        if any(name not in self._noting for name in record.notes):
            self._noting = tuple({*self._noting, *record.notes})
        self._tied = True
        for tensor in tensors(out):
            record.shapes.append(tuple(tensor.shape))
            self._records[tensor] = record
            node: Any = tensor.grad_fn
            if node is not None:
                node.metadata[self] = record

    def _behind(self, out: Tensor) -> list[PassRecord]:
        """Follow an output back through the graph of autograd, breadth first."""
        records: list[PassRecord] = []
        waiting = deque([] if out.grad_fn is None else [out.grad_fn])
        seen, left = set(waiting), FAR
        while waiting and left:
            node: Any = waiting.popleft()
            left -= 1
            record = node.metadata.get(self)
            if record is not None:
                left = left if records else min(left, BEYOND)
                records.append(record)
                continue
            following = [
                source for source, _ in node.next_functions if source is not None and source not in seen
            ]
            seen.update(following)
            waiting.extend(following)
        return records
