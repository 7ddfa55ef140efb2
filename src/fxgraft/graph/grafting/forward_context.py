"""One pass through a patched model: what its grafts share while it runs, and what it leaves behind.

The state of a pass lives with the call: it is found through the thread that makes the call, so that calls of one
model from several threads do not meet. What a pass leaves behind (values recorded by taps, what a method has to
know of it for its loss) belongs to the thread that made it, too, and to the output that came of it.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxgraft.errors import BypassError, ConfigError, FxgraftError, FxgraftWarning, TargetError
from fxgraft.graph.grafting.labels import checked_labels
from fxgraft.graph.grafting.loss_watch import Doubts, LossWatch, Outputs, ParameterWatch, ProgressWatch
from fxgraft.graph.grafting.published import Offer, published, targets
from fxgraft.graph.grafting.sharded import outside_sharded_step
from fxgraft.graph.structure.rest_of_network import Rest
from fxgraft.graph.tracing.observe import tensors

T = TypeVar("T")

_REFUSED = {
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
        takes_labels: whether the model itself gets a ``target`` that a call gives.
        weights: tensors that stood in for parameters of the model, by name.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        labelled: bool = False,
        takes_labels: bool = False,
        weights: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.labelled = labelled
        self.takes_labels = takes_labels
        self.weights = weights

    def first(self, rows: int, size: int) -> Arguments:
        """Return those for the first rows of the batch, of which there were ``size``."""

        def cut(value: Any) -> Any:
            return value[:rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value

        kwargs = {name: cut(value) for name, value in self.kwargs.items()}
        return Arguments(tuple(map(cut, self.args)), kwargs, self.labelled, self.takes_labels, self.weights)

    def repeat(self, model: nn.Module, target: Any) -> Any:
        """Call the model with them again, with labels for its grafts that the model itself gets only if it got them.

        Raises:
            ConfigError: other tensors stood in for the model's parameters then.
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
            return model(*self.args, **self.kwargs)
        if target is not None and not self.takes_labels:  # compiled code can enter no block
            return model(*self.args, target=target, **self.kwargs)
        labels: Any = target
        with targets(labels):
            return model(*self.args, **self.kwargs)


def _standing_in(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors that stand in for parameters of a model, by name, as `torch.func.functional_call` has it."""
    found: dict[str, Tensor] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        value = model.get_submodule(path)._parameters.get(own)
        if value is not None and not isinstance(value, nn.Parameter):
            found[name] = value
    return found


class LastPass:
    """What a pass leaves behind in its thread, until the next pass of the model there.

    Attributes:
        notes: what grafts remember of it, by name.
        recorded: the values that taps recorded and nobody fetched yet; None if there are none.
        shapes: of the tensors that it returned; None where no graft has a share in the loss, and in compiled code.
        learns: whether gradients may come back to it; not told in compiled code.
    """

    def __init__(self, notes: dict[str, Any], recorded: dict[str, Any] | None) -> None:
        self.notes = notes
        self.recorded = recorded
        self.shapes: list[tuple[int, ...]] | None = None
        self.learns = True


class Context:
    """What the grafts of one model share beyond a pass.

    Attributes:
        progress: share of training done, in [0, 1].
        replays: whether a graft runs the model again; then the arguments of training passes outlive them.
        samples: names of some of the model's parameters, by which such a graft sees that others stand in for them.
        judges: names of the grafts that have a share in the loss.
        watch: notices that the loss is never asked for.
        doubts: what was to be checked on a device, whose answer is not waited for.
        outputs: which pass an output is of.
        told: what grafts have warned of.
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
        self.doubts = Doubts()
        self.outputs = Outputs()
        self.told: set[tuple[str, str]] = set()
        self._local = threading.local()
        # Compiled code asks whether a thread has it: it should not appear between the first call and the second.
        _running.stack = getattr(_running, "stack", ())

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel with nothing but the progress: passes and what they left belong to the model and its threads."""
        return Context, (), {"progress": self.progress}

    @property
    def current(self) -> ForwardContext | None:
        """The pass of this model that this thread is in; None outside of one."""
        for each in getattr(_running, "stack", ())[::-1]:
            if each.context is self:
                return each
        return None

    @property
    def left(self) -> LastPass | None:
        """What the last pass of this model in this thread left behind."""
        return getattr(self._local, "left", None)

    def forget(self) -> None:
        """Drop what the last pass in this thread left behind."""
        self._local.left = None

    def leave(self, run: ForwardContext, out: Any, arguments: Arguments) -> None:
        """Keep what a pass that came through leaves behind."""
        if torch.compiler.is_exporting():
            return  # tensors of a trace, which nobody can read
        if run.training:
            self.measured = run.measured  # one assignment, which other threads see whole
        if self.replays and run.training:
            if not torch.compiler.is_compiling():
                arguments.weights = _standing_in(run.model, self.samples)
            run.notes[ARGUMENTS] = arguments
        self._local.left = LastPass(run.notes, run.recording)
        self.outputs.note(out, run.notes, run.given if run.took else None)
        if self.loss_grafts and not torch.compiler.is_compiling():
            self._local.left.shapes = [tuple(each.shape) for each in tensors(out)]
            self._local.left.learns = any(each.requires_grad for each in tensors(out))
            if run.training and torch.is_grad_enabled():
                self.watch.note(run.model, self.loss_grafts, out)

    @property
    def asked(self) -> Mapping[tuple[str, str], Any]:
        """What `asking` asks of the passes that this thread makes now."""
        return getattr(self._local, "asked", {})

    @contextmanager
    def override(self, graft: str, **options: Any) -> Iterator[None]:
        """Ask something of a graft's units in all passes that this thread makes in the block; see `Pass.asked`."""
        before = self.asked
        self._local.asked = {**before, **{(graft, key): value for key, value in options.items()}}
        try:
            yield
        finally:
            self._local.asked = before

    def recall(self, graft: str, out: Any, note: str | None = None) -> Any:
        """Return what a graft remembers of the pass that gave ``out``; None if it remembers nothing of it.

        Args:
            graft: its name.
            out: what the pass returned, or something computed from that.
            note: what the memory is kept under, if not under the graft's name.

        Raises:
            TargetError: the output is of several passes; or it is not seen to be of any, in training, and the graft
                remembers passes.
        """
        found = self.outputs.records(out)
        if len(found) > 1:
            raise TargetError(
                f"{graft!r} was asked for the loss of an output that was computed from {len(found)} passes.\n"
                "It judges each pass by what it did in that pass.\n"
                "Call fxgraft.loss on the output of each pass, with its labels, and add the losses."
            )
        if found:
            return found[0].notes.get(note or graft)
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


class ForwardContext:
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
        beside: what the call gave the model beside images and labels, by argument; see `check_images_alone`.
        took: whether a graft has read the labels.
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
        self.target = target
        self.inputs = inputs
        self.options: Mapping[str, Any] = options or {}
        self.notes: dict[str, Any] = {}
        self.measured: Measured = {}
        self.visited: dict[str, bool] = {}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.recording: dict[str, Any] | None = {}
        self.beside: Mapping[str, Any] = {}
        self._shared: dict[tuple[str, str], Any] = {}
        self.took = self.read_by_model = False
        self._given: Any = None
        self._offer = Offer()
        self._refused: str | None = None

    @property
    def training(self) -> bool:
        """The mode of the whole model, where parts of it may be frozen in evaluation mode."""
        return self.model.training

    def adopt_published(self) -> None:
        """Take the labels that were published for this thread or task, where the call gave none."""
        offer = published(self.model, self.inputs)
        stack: tuple[ForwardContext, ...] = getattr(_running, "stack", ())
        around = stack[-1] if stack and not offer.seen and stack[-1]._offer.labels is not None else None
        if around is not None:  # a model inside of another one: its inputs are of the same batch
            offer = around._offer
        if self.target is None:
            self._offer = offer
            if offer.labels is None or offer.labels.value is None:
                return
            self.target = offer.labels.value
            if around is not None:
                self._refused = around._refused
            elif offer.doubt is not None:
                self._refused = offer.doubt
            elif self.training and offer.labels.spent(offer.inputs):
                self._refused = "spent"
        elif offer.labels is not None and (offer.seen or self.target is offer.labels.value):
            self._offer = offer  # labels of a batch that was published have served by that

    def came_through(self) -> None:
        """Note that the labels have served their pass; one that failed may be made again."""
        offer = self._offer
        if not self.training or offer.labels is None or offer.source is None or offer.doubt is not None:
            return
        if self.took:
            offer.labels.take(offer.inputs)
        if torch.compiler.is_compiling():
            offer.labels.passed = True
        else:
            offer.source.pass_made(offer.labels, offer.seen)

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
        self.took = True
        if self._refused is not None:
            raise TargetError(f"{graft!r} {_REFUSED[self._refused]}")
        return checked_labels(graft, self.target if part is None else part, batch)

    def check_images_alone(self, graft: str, why: str, all_positions: bool = False) -> None:
        """Raise where the model was called with more than images and labels, of which its graphs know nothing.

        A model is looked at as it runs on images. A mask of padding, coordinates or a condition are what calls bring.

        Args:
            graft: name of the graft.
            why: a sentence that says what would be wrong.
            all_positions: whether only what may tell positions apart is: tensors of several entries per image.

        Raises:
            BypassError: it was.
        """
        labels = self.given
        found = [
            name
            for name, each in self.beside.items()
            if each is not labels
            and (
                not all_positions
                or (isinstance(each, Tensor) and each.ndim > 1 and each.shape[1:].numel() > 1)
            )
        ]
        if found:
            raise BypassError(
                f"{graft!r} was given {', '.join(map(repr, found))} beside the images, and it knows the model as it "
                f"runs on images alone.\n{why}\n"
                "Give the model tensors of images of one size, which need no mask, or leave the method out."
            )

    def doubt(self, wrong: Tensor | bool, error: FxgraftError) -> None:
        """Raise an error if something is wrong, without waiting for a device: there it comes in a later step.

        Args:
            wrong: () bool.
            error: what to raise.
        """
        self.context.doubts.check(wrong, error)

    def tell(self, graft: str, key: str, message: str) -> None:
        """Warn of something that a graft cannot do in passes such as this one, once for its model.

        Args:
            graft: its name.
            key: a name for it.
            message: what follows the graft's name.
        """
        told = self.context.told
        if torch.compiler.is_compiling() or (graft, key) in told:
            return
        told.add((graft, key))
        warnings.warn(f"{graft!r} {message}", FxgraftWarning, stacklevel=2)

    def relabel(self, target: Any) -> None:
        """Set the labels that grafts see from here on, after a graft has mixed the samples.

        `fxgraft.loss` goes on getting the labels of the batch from the caller.
        """
        if self._given is None:
            self._given = self.target
        self.target = target

    @property
    def given(self) -> Any:
        """The labels of the batch, as the pass was given them."""
        return self.target if self._given is None else self._given

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
