"""Labels from outside a call: their sources, and the choice of the labels that a pass takes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxgraft.errors import TargetError
from fxgraft.graph.runtime.labels import Entry, checked_labels, take_from, tensors_in

Doubt = Literal["loaders", "batches", "other part"]
"""Why nobody can say whether labels are those of an input."""

MOST = 32
"""So many batches ahead of its passes a loop may be."""


class Place(NamedTuple):
    """The memory that holds a tensor's values, without keeping it alive."""

    storage: StorageWeakRef
    start: int
    end: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def holds(self, other: Place) -> int:
        """Say whether another tensor is this one (2), or a part or view of it (1)."""
        if self.storage != other.storage or self.storage.expired():
            return 0
        if self == other:
            return 2
        return int(self.start <= other.start and other.end <= self.end)


def place_of(value: Tensor) -> Place | None:
    """Return the memory of a tensor; None where that cannot be told."""
    try:
        storage = StorageWeakRef(value.untyped_storage())
        shape, stride, start = tuple(value.shape), value.stride(), int(value.storage_offset())
    except (NotImplementedError, RuntimeError):  # sparse tensors and those of functorch have no storage
        return None
    if 0 in shape:
        return None
    last: Any = start + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    size = value.element_size()
    return Place(storage, start * size, (last + 1) * size, shape, stride)


class Labels:
    """Labels set from outside a call, by `targets`, `with_targets` or a trainer's callback.

    Attributes:
        value: class indices (B,) or soft targets (B, K); None for a batch without labels.
        serves: what may read them: all passes of a "block"; one "pass"; or all passes of one "input", the first one.
        used: whether a graft has read them in a training pass.
        passed: whether a training pass was made with them, or with their batch.
    """

    def __init__(
        self,
        value: Any,
        serves: Literal["block", "pass", "input"],
        batch: Any = None,
        around: Any = None,
    ) -> None:
        """Note where the inputs are.

        Args:
            value: the labels.
            serves: see above.
            batch: the whole batch.
            around: the part of it that the labels are an entry of.
        """
        self.value = value
        self.serves = serves
        self.used = self.passed = False
        self._first: list[Place] | None = None
        own = {id(tensor) for tensor in tensors_in(value)}
        beside = [tensor for tensor in tensors_in(around) if id(tensor) not in own]
        own.update(map(id, beside))
        self._inputs = _places(beside)
        self._others = _places(tensor for tensor in tensors_in(batch) if id(tensor) not in own)

    def of(self, inputs: list[Place]) -> int:
        """Say whether inputs come from the batch: as the same tensor (2), or in the same memory (1)."""
        return _match(self._inputs, inputs)

    def beside(self, inputs: list[Place]) -> bool:
        """Say whether inputs come from a part of the batch that has other labels."""
        return not self.of(inputs) and _match(self._others, inputs) > 0

    @property
    def gone(self) -> bool:
        """Whether all inputs of the batch are out of memory, so that none can be recognised any more."""
        return all(place.storage.expired() for place in self._inputs)

    def spent(self, inputs: list[Place]) -> bool:
        """Say whether the labels were used as often as they may be."""
        if self.serves == "block" or not self.used:
            return False
        return self.serves == "pass" or not (self._first and _match(self._first, inputs) == 2)

    def take(self, inputs: list[Place]) -> None:
        """Note that a graft has read the labels in a training pass on these inputs."""
        if not self.used:
            self._first = inputs
        self.used = True


def _places(tensors: Iterable[Tensor]) -> list[Place]:
    places = (place_of(tensor) for tensor in tensors)
    return [place for place in places if place is not None]


def _match(known: list[Place], given: list[Place]) -> int:
    return max((one.holds(other) for one in known for other in given), default=0)


class LabelSource:
    """A source of labels: a block, or one run through a loader.

    Attributes:
        last: the labels of the last batch.
        ahead: whether some batch before the last one has had no training pass yet.
        model: the only model whose passes read them; None for any.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.last: Labels | None = None
        self.ahead = False
        self.model = None if model is None else weakref.ref(model)
        self._earlier: list[Labels] = []
        self._lost = False

    def serves(self, model: nn.Module) -> bool:
        """Say whether the passes of a model read these labels."""
        return self.last is not None and (self.model is None or self.model() is model)

    @property
    def known(self) -> list[Labels]:
        """The labels of earlier batches without a training pass, and then those of the last batch."""
        return self._earlier if self.last is None else [*self._earlier, self.last]

    def publish(self, labels: Labels) -> None:
        """Set the labels of the next batch."""
        waiting = [batch for batch in self.known if not batch.passed]
        kept = [batch for batch in waiting if not batch.gone][-MOST:]
        # Only passes in compiled code run without showing their inputs.
        self._lost = self._lost or len(kept) < len(waiting)
        self._earlier, self.last = kept, labels
        self.ahead = self._lost or bool(kept)

    def pass_made(self, labels: Labels, seen: bool) -> None:
        """Note a training pass, and whether its inputs were recognised as those of its labels' batch."""
        labels.passed = True
        if seen:  # a loop whose inputs can be told left the lost ones out
            self._lost = False
        self._earlier = [batch for batch in self._earlier if not batch.passed and not batch.gone]
        self.ahead = self._lost or bool(self._earlier)


# The innermost source is the last. Each thread or task has its own: it doesn't see those of others.
_published: ContextVar[tuple[LabelSource, ...]] = ContextVar("fxgraft_labels", default=())


@contextmanager
def publishing(source: LabelSource) -> Iterator[None]:
    """Offer what a source publishes to the passes inside the block."""
    try:
        _published.set((*_published.get(), source))
        yield
    finally:
        # Set, not reset by a token: a generator may be closed in another context than the one it was started in.
        _published.set(tuple(other for other in _published.get() if other is not source))


class Offer(NamedTuple):
    """Labels that a pass may take.

    Attributes:
        labels: the labels; None if there are none.
        source: who published them.
        inputs: where the inputs of the pass are.
        seen: whether the inputs were recognised as those of the labels' batch.
        doubt: why the labels may belong to another batch; None if they don't.
    """

    labels: Labels | None = None
    source: LabelSource | None = None
    inputs: list[Place] = []  # noqa: RUF012 - never written to
    seen: bool = False
    doubt: Doubt | None = None


def published(model: nn.Module, inputs: Any) -> Offer:
    """Choose the labels for a pass among those that are set for this thread or task.

    Labels whose batch the inputs come from are preferred, then those bound to the model. Inputs that are recognised as
    of no batch (copies) count as those of the last one, unless several batches are possible.

    Args:
        model: the model that makes the pass.
        inputs: the arguments of the call.
    """
    sources = [known for known in _published.get() if known.serves(model)]
    if not sources:
        return Offer()
    last: Any = sources[-1].last
    if last.serves == "block":  # a block around the call settles it
        return Offer(last, sources[-1])
    sources = [known for known in sources if known.last is not None and known.last.serves != "block"]
    if not torch.compiler.is_compiling():
        places = _places(tensors_in(inputs))
        offer = _recognised(sources, places)
        if offer is not None:
            return offer
    else:
        places = []
    chosen = [known for known in sources if known.model is not None] or sources
    source = chosen[-1]
    doubt: Doubt | None = "loaders" if len(chosen) > 1 else "batches" if source.ahead else None
    return Offer(source.last, source, places, False, doubt)


def _recognised(sources: list[LabelSource], places: list[Place]) -> Offer | None:
    """Find the labels whose batch the inputs come from."""
    known = [(source, labels) for source in sources for labels in source.known]
    scores = [labels.of(places) for _, labels in known]
    best = max(scores, default=0)
    if best == 0:
        beside = next(((s, labels) for s, labels in known if labels.beside(places)), None)
        return None if beside is None else Offer(beside[1], beside[0], places, True, "other part")
    candidates = [pair for pair, score in zip(known, scores, strict=True) if score == best]
    bound = [pair for pair in candidates if pair[0].model is not None] or candidates
    source, labels = bound[-1]
    doubt: Doubt | None = None
    if any(other is not source and bound_labels.value is not labels.value for other, bound_labels in bound):
        doubt = "loaders"
    elif best == 1 and len(bound) > 1:
        doubt = (
            "batches"  # batches share this memory: for buffers that are filled again, the last one is right
        )
    return Offer(labels, source, places, True, doubt)


@contextmanager
def targets(y: Tensor) -> Iterator[None]:
    """Give labels to every patched model called inside the block.

    For training loops that can only call ``model(x)``. The labels hold for the whole block, however
    many passes it makes, and for the thread or task that entered it.

    Args:
        y: class indices (B,), soft targets (B, K), or whatever the criterion takes.
    """
    source = LabelSource()
    source.publish(Labels(y, "block"))
    with publishing(source):
        yield


@contextmanager
def batch_targets(batch: Any, entry: Entry, how: str) -> Iterator[None]:
    """Give the labels of a batch to the patched models that are called on its inputs inside the block.

    The labels are for the first input that a graft reads them for, in all passes of that input.

    Args:
        batch: the batch, as a trainer hands it out.
        entry: where in the batch the labels are.
        how: the code to write instead, for the message.

    Raises:
        TargetError: the batch has no such entry.
    """
    value, around = take_from(batch, entry, how)
    source = LabelSource()
    source.publish(Labels(value, "input", batch, around))
    with publishing(source):
        yield


def relabel(y: Any, batch: Any) -> None:
    """Set other labels for the batch that a loader of `with_targets` has given last; without one, do nothing.

    For loops that mix images and labels after loading.

    Args:
        y: the labels from now on.
        batch: tensors that calls may get, by which their batch is recognised.
    """
    source = next((candidate for candidate in _published.get()[::-1] if candidate.last is not None), None)
    if source is not None and source.last is not None and source.last.serves == "pass":
        source.last = Labels(y, "pass", batch, batch)


_REFUSED: dict[str, str] = {
    "loaders": "cannot tell which labels are those of this batch: two loaders of fxgraft.with_targets are open.\n"
    "The input is a tensor of neither one's last batches, and both are for any model.\n"
    "Say which model a loader is for, fxgraft.with_targets(loader, model=model), or call model(x, target=y).",
    "batches": "cannot tell which labels are those of this batch: the loop is ahead of its passes.\n"
    "Several batches of fxgraft.with_targets wait for a training pass (or were left out), and the input is a copy, "
    "which is seen to be of none of them.\n"
    "Call model(x, target=y), or pass the tensors of the batch as the loader gave them.",
    "other part": "was given an input that these labels are not of.\n"
    "It belongs to another part of the batch than the labels that were set for it.\n"
    "Call model(x, target=y) with labels of its own, or leave the input out of the passes that train the patch.",
    "spent": "was given labels left over from an earlier pass.\n"
    "Labels set by fxgraft.with_targets serve one training pass, those of a trainer's callback one input, so that no "
    "batch is ever paired with another batch's labels.\n"
    "Call model(x, target=y), or use `with fxgraft.targets(y):` around several passes of one batch.",
}
"""Why published labels are not taken."""


class PassLabels:
    """The labels of one pass: those of the call, or else those that were published for its inputs.

    Args:
        value: the call's labels; None where it gave none.

    Attributes:
        value: the labels that grafts see from here on; None for none.
        read: whether a graft has read the labels.
    """

    def __init__(self, value: Any = None) -> None:
        self.value = value
        self.read = False
        self._given: Any = None
        self._offer = Offer()
        self._refused: str | None = None

    @property
    def given(self) -> Any:
        """The labels of the batch, as the pass was given them."""
        return self.value if self._given is None else self._given

    def adopt(self, model: nn.Module, inputs: Any, around: PassLabels | None) -> None:
        """Take the labels that were published for this thread or task, where the call gave none.

        Args:
            model: the model that makes the pass.
            inputs: its arguments.
            around: labels of the pass around this one, where the model is inside another patched one.
        """
        offer = published(model, inputs)
        if offer.seen or around is None or around._offer.labels is None:
            around = None
        else:  # a model inside another one: its inputs come from the same batch
            offer = around._offer
        if self.value is None:
            self._offer = offer
            if offer.labels is None or offer.labels.value is None:
                return
            self.value = offer.labels.value
            if around is not None:
                self._refused = around._refused
            elif offer.doubt is not None:
                self._refused = offer.doubt
            elif model.training and offer.labels.spent(offer.inputs):
                self._refused = "spent"
        elif offer.labels is not None and (offer.seen or self.value is offer.labels.value):
            self._offer = offer  # published labels of this batch count as used

    def served(self) -> None:
        """Note that a training pass with these labels did not fail; one that failed may be made again."""
        offer = self._offer
        if offer.labels is None or offer.source is None or offer.doubt is not None:
            return
        if self.read:
            offer.labels.take(offer.inputs)
        if torch.compiler.is_compiling():
            offer.labels.passed = True
        else:
            offer.source.pass_made(offer.labels, offer.seen)

    def replace(self, value: Any) -> None:
        """Set the labels that grafts see from here on, after one has mixed the samples."""
        if self._given is None:
            self._given = self.value
        self.value = value

    def checked(self, graft: str, batch: int, part: Any = None) -> Tensor:
        """Return the labels, or raise what is wrong with them.

        Args:
            graft: name of the graft that needs them, for the message.
            batch: batch size at the graft's site.
            part: where the call was given labels in several parts: the one to check and return.

        Raises:
            TargetError: no labels, labels that served an earlier batch, labels of which of several loaders
                nobody says, or another batch size.
        """
        self.read = True
        if self._refused is not None:
            raise TargetError(f"{graft!r} {_REFUSED[self._refused]}")
        return checked_labels(graft, self.value if part is None else part, batch)
