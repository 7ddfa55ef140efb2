"""One pass through a patched model: what its grafts share while it runs, and what it leaves behind.

The state of a pass lives with the call: it is found through the thread that makes the call, so that calls of one
model from several threads do not meet. What a pass leaves behind (values recorded by taps, what a method has to
know of it for its loss) belongs to the thread that made it, too, and to the output that came of it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxgraft.errors import TargetError
from fxgraft.graph.grafting.labels import checked_labels
from fxgraft.graph.grafting.published import Labels, published, targets
from fxgraft.graph.grafting.sharded import outside_sharded_step
from fxgraft.graph.grafting.watch import LossWatch
from fxgraft.graph.structure.rest import Rest
from fxgraft.graph.tracing.observe import tensors

T = TypeVar("T")

# A plain threading.local, which torch.compile follows, writes included. Passes nest: the innermost is the last.
_running = threading.local()


Measured = dict[str, dict[str, list[Any]]]
"""What was measured in a pass: numbers and tensors by the name of the graft and then by their own."""

ARGUMENTS = "(arguments)"
"""What the arguments of a pass are noted under; no graft has such a name."""


class Arguments:
    """The arguments of a pass, kept so that it can be made again.

    Attributes:
        args, kwargs: what the model itself got.
        labelled: whether the call's ``target`` is among them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labelled: bool = False) -> None:
        self.args = args
        self.kwargs = kwargs
        self.labelled = labelled

    def first(self, rows: int, size: int) -> Arguments:
        """Return those for the first rows of the batch, of which there were ``size``."""

        def cut(value: Any) -> Any:
            return value[:rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value

        kwargs = {name: cut(value) for name, value in self.kwargs.items()}
        return Arguments(tuple(map(cut, self.args)), kwargs, self.labelled)

    def repeat(self, model: nn.Module, target: Any) -> Any:
        """Call the model with them again, with labels for its grafts that the model itself gets only if it got them."""
        if self.labelled:
            return model(*self.args, **self.kwargs)
        with targets(target):
            return model(*self.args, **self.kwargs)


class Left:
    """What a pass leaves behind in its thread, until the next pass of the model there.

    Attributes:
        notes: what grafts remember of it, by name.
        recorded: the values that taps recorded and nobody fetched yet; None if there are none.
        shapes: of the tensors that it returned; None where no graft has a share in the loss, and in compiled code.
    """

    def __init__(self, notes: dict[str, Any], recorded: dict[str, Any] | None) -> None:
        self.notes = notes
        self.recorded = recorded
        self.shapes: list[tuple[int, ...]] | None = None


class Context:
    """What the grafts of one model share beyond a pass.

    Attributes:
        progress: share of training done, in [0, 1].
        replays: whether a graft runs the model again; then the arguments of training passes outlive them.
        judges: names of the grafts that have a share in the loss.
        watch: notices that the loss is never asked for.
        model: a weak reference to the model; set when the grafts are installed.
        measured: what grafts measured in the last training pass, whichever thread made it.
    """

    def __init__(self) -> None:
        self.progress = 0.0
        self.measured: Measured = {}
        self.replays = False
        self.judges: tuple[str, ...] = ()
        self.watch = LossWatch()
        self.model: weakref.ref[nn.Module] | None = None
        self._local = threading.local()
        self._notes = WeakTensorKeyDictionary()
        # Compiled code asks whether a thread has it: it should not appear between the first call and the second.
        _running.stack = getattr(_running, "stack", ())

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel with nothing but the progress: passes and what they left belong to the model and its threads."""
        return Context, (), {"progress": self.progress}

    @property
    def current(self) -> Pass | None:
        """The pass of this model that this thread is in; None outside of one."""
        for each in getattr(_running, "stack", ())[::-1]:
            if each.context is self:
                return each
        return None

    @property
    def left(self) -> Left | None:
        """What the last pass of this model in this thread left behind."""
        return getattr(self._local, "left", None)

    def forget(self) -> None:
        """Drop what the last pass in this thread left behind."""
        self._local.left = None

    def leave(self, run: Pass, out: Any, arguments: Arguments) -> None:
        """Keep what a pass that came through leaves behind."""
        if run.training:
            self.measured = run.measured  # one assignment, which other threads see whole
        if self.replays and run.training:
            run.notes[ARGUMENTS] = arguments
        self._local.left = Left(run.notes, run.recording)
        if torch.compiler.is_compiling():
            return
        if run.notes or len(self._notes):
            for each in tensors(out):
                self._notes[each] = run.notes
        if self.judges:
            self._local.left.shapes = [tuple(each.shape) for each in tensors(out)]
            if run.training and torch.is_grad_enabled():
                self.watch.note(run.model, self.judges, out)

    @property
    def asked(self) -> Mapping[tuple[str, str], Any]:
        """What `asking` asks of the passes that this thread makes now."""
        return getattr(self._local, "asked", {})

    @contextmanager
    def asking(self, graft: str, **options: Any) -> Iterator[None]:
        """Ask something of a graft's units in all passes that this thread makes in the block; see `Pass.asked`."""
        before = self.asked
        self._local.asked = {**before, **{(graft, key): value for key, value in options.items()}}
        try:
            yield
        finally:
            self._local.asked = before

    def recall(self, graft: str, out: Any) -> Any:
        """Return what a graft remembers of the pass that gave ``out``; None if it remembers nothing of it.

        An output that is known is told by its identity. One that a wrapper has made anew, or that came out of
        compiled code, is taken for that of the last pass in this thread.
        """
        for each in tensors(out):
            if each in self._notes:
                return self._notes[each].get(graft)
        return None if self.left is None else self.left.notes.get(graft)


class Pass:
    """One call of a patched model.

    Attributes:
        context: what the grafts of the model share.
        model: the patched model.
        target: the labels that grafts see from here on; None if there are none.
        inputs: the model's positional arguments.
        options: keyword arguments of the call that a patch declared as its own.
        notes: what grafts remember of this pass, by name.
        measured: what grafts measured in this pass.
        visited: the owners reached so far.
        calls: arguments that grafted modules with hooks were called with, by qualified name.
        recording: where taps put their values; None while a graft looks ahead.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        target: Any = None,
        inputs: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.context = context
        self.model = model
        self.target = target
        self.inputs = inputs
        self.options: Mapping[str, Any] = options or {}
        self.notes: dict[str, Any] = {}
        self.measured: Measured = {}
        self.visited: dict[str, bool] = {}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.recording: dict[str, Any] | None = {}
        self._shared: dict[tuple[str, str], Any] = {}
        self._stale = self._guessed = False
        self._published: Labels | None = None

    @property
    def training(self) -> bool:
        """The mode of the whole model, where parts of it may be frozen in evaluation mode."""
        return self.model.training

    def adopt_published(self) -> None:
        """Take the labels that were published for this thread or task, where the call gave none."""
        if self.target is not None:
            return
        labels, self._guessed = published(self.model, self.inputs)
        if labels is None:
            return
        self.target, self._published = labels.value, labels
        if self.training:
            # A patched model inside of this one reads them in the same pass.
            around = [each for each in getattr(_running, "stack", ()) if each._published is labels]
            self._stale = around[-1]._stale if around else labels.used and not labels.reusable

    def came_through(self) -> None:
        """Note that the labels have served their pass; one that failed may be made again."""
        if self.training and self._published is not None:
            self._published.used = True

    def enter(self) -> None:
        """Make this the innermost pass of the thread."""
        _running.stack = (*getattr(_running, "stack", ()), self)

    def exit(self) -> None:
        """Go back to the pass around this one, if there is one."""
        _running.stack = tuple(each for each in getattr(_running, "stack", ()) if each is not self)

    def labels(self, graft: str, batch: int, part: Any = None) -> Tensor:
        """Return the labels of this pass, or raise what is wrong with them.

        Args:
            graft: name of the graft that needs them, for the message.
            batch: batch size at the graft's site.
            part: where the call was given labels in several parts: the one to check and return.

        Raises:
            TargetError: no labels, labels that served an earlier batch, labels of which of several loaders
                nobody says, or another batch size.
        """
        if self._guessed:
            raise TargetError(
                f"{graft!r} cannot tell which labels are those of this batch: two loaders of fxgraft.with_targets "
                "are open.\nThe input is a tensor of neither one's last batches, and both are for any model.\n"
                "Say which model a loader is for, fxgraft.with_targets(loader, model=model), or call "
                "model(x, target=y)."
            )
        if self._stale:
            raise TargetError(
                f"{graft!r} was given labels left over from an earlier pass.\n"
                "Labels set by fxgraft.with_targets serve one training pass, so that no batch is ever "
                "paired with another batch's labels.\n"
                "Call model(x, target=y), or use `with fxgraft.targets(y):` around several passes of one batch."
            )
        return checked_labels(graft, self.target if part is None else part, batch)

    def relabel(self, target: Any) -> None:
        """Set the labels that grafts see from here on, after a graft has mixed the samples.

        `fxgraft.loss` goes on getting the labels of the batch from the caller.
        """
        self.target = target

    def shared(self, graft: str, key: str, make: Callable[[], T]) -> T:
        """Return what all units of a graft share in this pass; made by the first one that asks.

        Args:
            graft: the graft's name.
            key: a name for it.
            make: makes it; usually a draw.
        """
        if (graft, key) not in self._shared:
            self._shared[graft, key] = make()
        return self._shared[graft, key]

    def asked(self, graft: str, key: str) -> Any:
        """Return what `Graft.asking` asks of the graft in this pass, or None."""
        return self.context.asked.get((graft, key))

    def put(self, graft: str, key: str, value: Any) -> None:
        """Hand a value to the units of the same graft that run later in this pass."""
        self._shared[graft, key] = value

    def get(self, graft: str, key: str) -> Any:
        """Return what `put` or `shared` has under that name, or None."""
        return self._shared.get((graft, key))

    def remember(self, graft: str, state: Any) -> None:
        """Keep what the graft's loss has to know of this pass; `Graft.recall` finds it by the output.

        Not for what happens in evaluation: a loss that is computed there is the user's own.
        """
        self.notes[graft] = state

    def measure(self, graft: str, name: str, value: Any) -> None:
        """Keep what `Patch.diagnostics` tells of the last training pass; nothing is kept of other passes.

        What several units measure under one name is averaged. Nothing is computed here and no device is waited for:
        hand over the tensor that is at hand, a mask and not its mean.

        Args:
            graft: the graft's name.
            name: of the scalar.
            value: a number, or a tensor of any shape that stands for its mean; it is detached.
        """
        if not self.training or self.recording is None:  # a look ahead is no training pass
            return
        if isinstance(value, Tensor):
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                return  # it would outlive the transform that it belongs to
            value = value.detach()
        self.measured.setdefault(graft, {}).setdefault(name, []).append(value)

    def look_ahead(self, graft: str, rest: Rest, z: Tensor) -> Tensor:
        """Return the logits for a value at the site that a `Rest` starts from; nothing else notices.

        Args:
            graft: the graft that captured what the rest needs besides.
            rest: the rest of the network.
            z: the value. Nothing is written to it as long as it is not used elsewhere; pass a clone.
        """
        captured = [self.get(graft, each.key) for each in rest.captured]
        inputs = [self.inputs[index] for index in rest.inputs]
        recording, self.recording = self.recording, None  # taps record the pass, not a look ahead
        try:
            with outside_sharded_step(self.model, rest.children):
                return rest.evaluate(self.model, z, captured, inputs, self.calls)
        finally:
            self.recording = recording
