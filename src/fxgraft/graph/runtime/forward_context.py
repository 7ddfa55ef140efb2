"""One pass through a patched model: the state that its grafts share, and what stays after it.

The state of a pass lives as long as the call. It is found through the thread that makes the call, so that calls of one
model from several threads don't meet. What stays after a pass (values recorded by taps, what a method needs for its
loss) belongs to that thread, too, and to the output that the pass returned.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.errors import ConfigError, FxgraftWarning, TargetError
from fxgraft.graph.runtime.deferred_checks import DeferredChecks
from fxgraft.graph.runtime.loss_watch import LossWatch
from fxgraft.graph.runtime.parameter_watch import ParameterWatch
from fxgraft.graph.runtime.pass_records import Outputs
from fxgraft.graph.runtime.progress_watch import ProgressWatch
from fxgraft.graph.runtime.published_labels import PassLabels, targets
from fxgraft.graph.tracing.observe import tensors

# A plain threading.local, which torch.compile follows, writes included. Passes nest: the innermost is the last.
_running = threading.local()


Measured = dict[str, dict[str, list[Any]]]
"""What was measured in a pass: numbers and tensors by the name of the graft and then by their own."""

ARGUMENTS = "(arguments)"
"""What the arguments of a pass are noted under; no graft has such a name."""


class Arguments:
    """The arguments of a pass, kept so that it can be made again.

    Attributes:
        args, kwargs: the arguments that the model itself got.
        labelled: whether the call's ``target`` is among them.
        takes_labels: whether the model's own forward takes ``target``.
        weights: tensors that stood in for parameters of the model, by name.
        options: keywords of the call that are for the grafts, apart from labels.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        labelled: bool = False,
        takes_labels: bool = False,
        weights: Mapping[str, Tensor] = MappingProxyType({}),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.options = options
        self.labelled = labelled
        self.takes_labels = takes_labels
        self.weights = weights

    def first(self, rows: int, size: int) -> Arguments:
        """Return the arguments for the first rows of the batch, which had ``size`` rows."""

        def cut(value: Any) -> Any:
            return value[:rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value

        kwargs, options = (
            {name: cut(value) for name, value in keywords.items()} for keywords in (self.kwargs, self.options)
        )
        args = tuple(map(cut, self.args))
        return Arguments(args, kwargs, self.labelled, self.takes_labels, self.weights, options)

    def repeat(self, model: nn.Module, target: Any) -> Any:
        """Call the model with these arguments again. Its grafts get labels; the model gets them only if it did before.

        Raises:
            ConfigError: in the first pass, other tensors stood in for the model's parameters.
        """
        now = _standing_in(model, self.weights) if self.weights else {}
        if any(now.get(name) is not value for name, value in self.weights.items()):
            raise ConfigError(
                f"A loss is to run the batch again, and its pass was made with other weights than this "
                f"{model._get_name()} has now (torch.func.functional_call).\n"
                "The second pass would be that of another network, and its gradients would be lost.\n"
                "Take the loss inside of the call: functional_call(step, ...) of a module whose forward calls the "
                "model and returns fxgraft.loss(model, out, y)."
            )
        if self.labelled:
            return model(*self.args, **self.kwargs, **self.options)
        if target is not None and not self.takes_labels:  # torch.compile follows no such block
            return model(*self.args, target=target, **self.kwargs, **self.options)
        labels: Any = target
        with targets(labels):
            return model(*self.args, **self.kwargs, **self.options)


def _standing_in(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors that stand in for parameters of a model, by name, as `torch.func.functional_call` has it."""
    stand_ins: dict[str, Tensor] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        value = model.get_submodule(path)._parameters.get(own)
        if value is not None and not isinstance(value, nn.Parameter):
            stand_ins[name] = value
    return stand_ins


class LastPass:
    """What stays of a pass in its thread, until the next pass of the model there.

    Attributes:
        notes: what each graft stored for its loss, by the graft's name.
        recorded: the values that taps recorded and nobody fetched yet; None if there are none.
        shapes: the shapes of the tensors that it returned; None where no graft has a share in the loss, and in
            compiled code.
        learns: whether gradients may come back to it; unknown in compiled code.
    """

    def __init__(self, notes: dict[str, Any], recorded: dict[str, Any] | None) -> None:
        self.notes = notes
        self.recorded = recorded
        self.shapes: list[tuple[int, ...]] | None = None
        self.learns = True


class Context:
    """The state that the grafts of one model share across passes.

    Attributes:
        progress: share of training done, in [0, 1].
        replays: whether a graft runs the model again; then the arguments of training passes outlive them.
        samples: names of some of the model's parameters, to notice when other tensors stand in for these.
        loss_grafts: names of the grafts that have a share in the loss.
        watch: notices that the loss is never asked for.
        checks: checks on a device, whose answers are not waited for.
        outputs: the table that finds the pass of an output.
        told: the warnings that grafts have given.
        progress_watch: notices that schedules are not fed, or end too early.
        parameter_watch: notices that no optimiser moves the grafts' parameters.
        model: a weak reference to the model; set when the grafts are installed.
        measured: what grafts measured in the last training pass, whichever thread made it.
    """

    def __init__(self) -> None:
        self.progress = 0.0
        self.measured: Measured = {}
        self.replays = False
        self.samples: tuple[str, ...] = ()
        self.loss_grafts: tuple[str, ...] = ()
        self.watch = LossWatch()
        self.progress_watch = ProgressWatch()
        self.parameter_watch = ParameterWatch()
        self.model: weakref.ref[nn.Module] | None = None
        self.checks = DeferredChecks()
        self.outputs = Outputs()
        self.told: set[tuple[str, str]] = set()
        self._local = threading.local()
        # Set now: compiled code guards on whether it is there, and would be compiled again at the second call.
        _running.stack = getattr(_running, "stack", ())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the progress alone: passes and what they left belong to the model and its threads."""
        return Context, (), {"progress": self.progress}

    @property
    def current(self) -> ForwardContext | None:
        """The pass of this model that runs in this thread; None where none does."""
        for running in getattr(_running, "stack", ())[::-1]:
            if running.context is self:
                return running
        return None

    @property
    def left(self) -> LastPass | None:
        """What the last pass of this model in this thread left behind."""
        return getattr(self._local, "left", None)

    def forget(self) -> None:
        """Drop what the last pass in this thread left behind."""
        self._local.left = None

    def leave(self, run: ForwardContext, out: Any, arguments: Arguments) -> None:
        """Store what stays of a pass that did not fail."""
        if torch.compiler.is_exporting():
            return  # a trace has no numbers to keep
        if run.training:
            self.measured = run.measured  # in one assignment: other threads see all of it or nothing
        if self.replays and run.training:
            if not torch.compiler.is_compiling():
                arguments.weights = _standing_in(run.model, self.samples)
            run.notes[ARGUMENTS] = arguments
        self._local.left = LastPass(run.notes, run.recording)
        self.outputs.note(out, run.notes, run.labels.given if run.labels.read else None)
        if self.loss_grafts and not torch.compiler.is_compiling():
            self._local.left.shapes = [tuple(tensor.shape) for tensor in tensors(out)]
            self._local.left.learns = any(tensor.requires_grad for tensor in tensors(out))
            if run.training and torch.is_grad_enabled():
                self.watch.note(run.model, self.loss_grafts, out)

    @property
    def asked(self) -> Mapping[tuple[str, str], Any]:
        """The requests of `override` that hold for this thread now."""
        return getattr(self._local, "asked", {})

    @contextmanager
    def override(self, graft: str, **options: Any) -> Iterator[None]:
        """Set requests that a graft's units see in all passes of this thread in the block; see `PassView.asked`."""
        before = self.asked
        self._local.asked = {**before, **{(graft, key): value for key, value in options.items()}}
        try:
            yield
        finally:
            self._local.asked = before

    def recall(self, graft: str, out: Any, note: str | None = None) -> Any:
        """Return what a graft remembers of the pass that gave ``out``; None if it remembers nothing of it.

        Args:
            graft: the graft's name.
            out: what the pass returned, or something computed from that.
            note: the name under which the state was stored, if not the graft's.

        Raises:
            TargetError: the output comes from several passes; or, in training, from none that is known, while the graft
                remembers passes.
        """
        records = self.outputs.records(out)
        if len(records) > 1:
            raise TargetError(
                f"{graft!r} was asked for the loss of an output that was computed from {len(records)} passes.\n"
                "It judges each pass by what it did in that pass.\n"
                "Call fxgraft.loss on the output of each pass, with its labels, and add the losses."
            )
        if records:
            return records[0].notes.get(note or graft)
        model = None if self.model is None else self.model()
        if model is not None and model.training and self.outputs.remembers(note or graft):
            raise TargetError(
                f"{graft!r} cannot tell which pass this output is of.\n"
                "It is not what the model returned, and no gradient leads back from it to one of its training passes: "
                "it was detached, computed without gradients, or computed from that in compiled code.\n"
                "Pass on what the model returned, and convert it in the criterion: "
                "fxgraft.loss(model, out, y, criterion=...)."
            )
        return None


def tell_once(context: Context, key: tuple[str, str], message: str) -> None:
    """Warn of something once for the model, but not in compiled code.

    Args:
        context: what the grafts of the model share.
        key: whom or what it is about, and a name for it.
        message: the whole message.
    """
    if torch.compiler.is_compiling() or key in context.told:
        return
    context.told.add(key)
    warnings.warn(message, FxgraftWarning, stacklevel=3)


class ForwardContext:
    """One call of a patched model. Units see it through a `PassView`.

    Attributes:
        context: what the grafts of the model share.
        model: the patched model.
        labels: the labels of its batch.
        inputs: the model's positional arguments.
        options: keyword arguments of the call that a patch declared as its own.
        notes: what grafts remember of this pass, by name.
        measured: what grafts measured in this pass.
        shared: what the units of one graft hand to each other, by the graft's name and a key.
        visited: the owners reached so far, and whether any call of them was in training mode.
        calls: arguments that grafted modules with hooks were called with, by qualified name.
        recording: where taps put their values; None while a graft looks ahead.
        beside: what the call gave in addition to images and labels, by argument; see `PassView.check_images_alone`.
        read_by_model: whether the model's own forward was given labels of the batch, by an argument that it names.
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
        self.labels = PassLabels(target)
        self.inputs = inputs
        self.options: Mapping[str, Any] = options or {}
        self.notes: dict[str, Any] = {}
        self.measured: Measured = {}
        self.shared: dict[tuple[str, str], Any] = {}
        self.visited: dict[str, bool] = {}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.recording: dict[str, Any] | None = {}
        self.beside: Mapping[str, Any] = {}
        self.read_by_model = False

    @property
    def training(self) -> bool:
        """The mode of the whole model, where parts of it may be frozen in evaluation mode."""
        return self.model.training

    def adopt_published(self) -> None:
        """Take the labels that were published for this thread or task, where the call gave none."""
        stack: tuple[ForwardContext, ...] = getattr(_running, "stack", ())
        self.labels.adopt(self.model, self.inputs, stack[-1].labels if stack else None)

    def enter(self) -> None:
        """Make this the innermost pass of the thread."""
        _running.stack = (*getattr(_running, "stack", ()), self)

    def exit(self) -> None:
        """Go back to the pass around this one, if there is one."""
        _running.stack = tuple(running for running in getattr(_running, "stack", ()) if running is not self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let taps record and units measure nothing in the block: what runs there isn't part of the pass."""
        recording, self.recording = self.recording, None
        try:
            yield
        finally:
            self.recording = recording
