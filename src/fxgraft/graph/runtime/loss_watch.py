"""Between a pass and its loss: finds the pass of an output, and warns of what a training loop leaves out.

A loop may leave out a graft's share of the loss, its schedule, or its parameters. Each watch warns once. It costs
nothing after it has seen that all is well, a few passes after the start.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fxgraft._torch import FakeTensor, assert_later
from fxgraft.errors import FxgraftError, FxgraftWarning
from fxgraft.graph.runtime.labels import version_of
from fxgraft.graph.runtime.living import note_change
from fxgraft.graph.runtime.published_labels import place_of
from fxgraft.graph.runtime.recorders import recorded, values_of
from fxgraft.graph.tracing.observe import tensors

STEPS = 2
"""So many backward passes of losses of somebody else are a training; one may be somebody looking at gradients."""

PASSES = 20
"""So many training passes without a word on progress, and nobody is going to say one."""

STILL = 5000
"""So many training passes at one progress, or"""

ROUNDS = 5
"""so many evaluations between them, and nobody is going to set another one."""

OVER = 2
"""So many training passes after progress has come to 1, and the training is not over."""

MOVES = 3
"""So many steps of an optimiser that leave a parameter with gradients where it was."""

PATIENCE = 1000
"""So many passes without that, and it is not looked for any more."""

REFERENCES = 8
"""So many of the model's own parameters show that an optimiser has made a step."""


class LossWatch:
    """Warns once when a model is trained and the loss of its grafts is never asked for.

    Until it has warned, a hook on the output of training passes notes that gradients came back. That costs next to
    nothing and waits for no accelerator. Counting passes would not do: one loss may be of several.

    Attributes:
        asked: whether the loss was ever asked for, in any thread, or the warning was given.
        unasked: number of training passes since the loss was asked for; None while the loss is computed.
    """

    def __init__(self) -> None:
        self.asked = False
        self.unasked: int | None = 0
        self._most = 0
        self._passes = 0
        self._warned = False
        self._trained: set[int] = set()

    def note(self, model: nn.Module, grafts: Sequence[str], out: Any) -> None:
        """Take note of a training pass.

        Args:
            model: the model that made it.
            grafts: names of the grafts with a share in the loss.
            out: what the pass returned.

        Warns:
            FxgraftWarning: gradients came back to two passes before this one, and nobody asked for the loss.
        """
        if self.unasked is not None:
            self.unasked += 1
            if self.unasked >= 2 * max(self._most, 1):  # ever less often: some steps have several passes
                self._most = self.unasked
                note_change()  # the model may have been put into another one in a way that no hook sees
        if self.asked:
            return
        if len(self._trained) < STEPS:
            self._passes += 1
            if self._passes <= PASSES:
                note_change()  # the model may have been put into another one in a way that no hook sees
            for tensor in tensors(out):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._seen, self._passes))
            return
        self._warn_of_none(model, grafts)

    def look_back(self, model: nn.Module, grafts: Sequence[str], outputs: Outputs) -> None:
        """Take note of training passes in compiled code, which `note` has not seen.

        Args:
            model: the model that made them.
            grafts: names of the grafts with a share in the loss.
            outputs: the outputs of the model.
        """
        if grafts and not self.asked and outputs.trained():
            self._warn_of_none(model, grafts)

    def _warn_of_none(self, model: nn.Module, grafts: Sequence[str]) -> None:
        self.asked = True
        warnings.warn(
            f"{', '.join(map(repr, grafts))} on this {model._get_name()} has a share in the loss, and the model is "
            "trained without it: fxgraft.loss, losses and extra_loss were never called.\n"
            "Take fxgraft.loss(model, out, y) for the loss, or add fxgraft.extra_loss(model, out, y) to your own.",
            FxgraftWarning,
            stacklevel=4,
        )

    def warn_of_no_gradients(self, model: nn.Module) -> None:
        """Warn once that the loss of a model in training mode was asked for while no gradients are recorded."""
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


class Doubts:
    """Checks on a device. Nobody waits for an answer: it is read in a later step."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Any, FxgraftError]] = deque(maxlen=64)

    def check(self, wrong: Tensor | bool, error: FxgraftError) -> None:
        """Raise if something is wrong: at once on a CPU, else in the step after the device has found it out.

        Args:
            wrong: () bool.
            error: what to raise.
        """
        if recorded():
            return
        if isinstance(wrong, Tensor):
            wrong = values_of(wrong).any()
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
        """Raise the first error that a device has found by now."""
        while self._waiting and self._waiting[0][1].query():
            answer, _, error = self._waiting.popleft()
            if answer:
                self._waiting.clear()
                raise error


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class ProgressWatch:
    """Warns of schedules that get no progress, or none any more, and of those that end before the training does.

    Attributes:
        fed: whether progress was ever set.
    """

    def __init__(self) -> None:
        self.fed = False
        self._progress = 0.0
        self._passes = 0
        self._below = False
        self._over = 0
        self._since = self._rounds = self._looks = 0
        self._warned: set[str] = set()

    def told(self, fraction: float) -> None:
        """Take note of the progress that is set."""
        if fraction != self._progress or not self.fed:
            self._since = self._rounds = 0
        self.fed, self._progress = True, fraction

    def evaluated(self) -> None:
        """Take note of an evaluation pass. A single one between two of training may be part of a step."""
        self._looks += 1

    def note(self, model: nn.Module, schedules: Mapping[str, Sequence[str]]) -> None:
        """Take note of a training pass.

        Args:
            model: the model that makes it.
            schedules: options that follow the progress, by graft.

        Warns:
            FxgraftWarning: nobody has set the progress for `PASSES` passes; it stands still below 1 for `STILL`, or for
                `ROUNDS` evaluations of more than one pass; or it was at 1 for `OVER`, and came there from below.
        """
        if not schedules:
            return
        self._passes += 1
        if not self.fed:
            if self._passes > PASSES:
                self._warn(model, schedules, "unfed")
            else:
                note_change()  # the model may have been put into another one in a way that no hook sees
            return
        self._since += 1
        self._rounds += self._looks > 1
        self._looks = 0
        if self._progress < 1 and (self._since > STILL or self._rounds >= ROUNDS):
            self._warn(model, schedules, "still")
        self._below = self._below or self._progress < 1
        self._over = self._over + 1 if self._progress >= 1 else 0
        if self._below and self._over > OVER:
            self._warn(model, schedules, "over")

    def _warn(self, model: nn.Module, schedules: Mapping[str, Sequence[str]], what: str) -> None:
        if what in self._warned:
            return
        self._warned.add(what)
        options = ", ".join(f"{option} of {name!r}" for name, own in schedules.items() for option in own)
        follows = (
            f"{options} follow{'s' * (sum(map(len, schedules.values())) == 1)} the progress of the training"
        )
        texts = {
            "unfed": f"{follows}, and nobody has said in {PASSES} training passes of this {model._get_name()} how far "
            "it is: schedules stand still.\n"
            "Call fxgraft.set_progress(model, epoch / epochs) at the start of every epoch, counted from 0, or with "
            "step / steps at every step.",
            "still": f"{follows}, which stands at {self._progress:g} for {self._since} training passes of this "
            f"{model._get_name()}, with {self._rounds} evaluations between them: schedules stand still.\n"
            "Call fxgraft.set_progress again, with epoch / epochs (and not epoch // epochs) at the start of every "
            "epoch, counted from 0, or, where an epoch is as long as that, with step / steps at every step.",
            "over": f"{follows}, which is said to be over (1.0), and this {model._get_name()} is trained on: schedules "
            "came to their end too early.\n"
            "Progress is the share that is done: fxgraft.set_progress(model, epoch / epochs), epochs counted from 0, "
            "and not epoch / (epochs - 1) or (epoch + 1) / epochs.",
        }
        warnings.warn(texts[what], FxgraftWarning, stacklevel=2)


class ParameterWatch:
    """Warns of graft parameters that get gradients and that no optimiser moves.

    The version of a tensor says that it was written to, without a look at its values. Only tensors that seem to stand
    still are compared, and on an accelerator the answer is read in a later pass.
    """

    def __init__(self) -> None:
        self._done = False
        self._passes = self._moves = 0
        self._begun = False
        self._watched: dict[tuple[str, int], tuple[weakref.ref[nn.Parameter], int]] = {}
        self._seen: set[tuple[str, int]] = set()
        self._hooks: dict[tuple[str, int], Any] = {}
        self._references: list[tuple[weakref.ref[nn.Parameter], int]] = []
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._answer: Callable[[], list[bool] | None] | None = None

    def close(self) -> None:
        """Stop watching."""
        self._done = True
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._kept, self._answer = {}, {}, None

    def note(self, model: nn.Module, parameters: Callable[[], Mapping[str, Sequence[nn.Parameter]]]) -> None:
        """Look at the parameters before a training pass.

        Args:
            model: the model that makes it.
            parameters: a function that returns the parameters of every graft, by the graft's name.

        Warns:
            FxgraftWarning: `MOVES` steps of an optimiser have moved the model, but not these parameters.
        """
        if self._done or not torch.is_grad_enabled():
            return
        if not self._begun:
            self._begin(model, parameters())
        for key, (known, version) in list(self._watched.items()):
            p = known()
            if p is None or p._version != version:
                self._forget(key)
            elif p.grad is not None:
                self._seen.add(key)
        self._passes += 1
        if not self._watched or self._passes > PATIENCE:
            self.close()
            return
        moved = [
            p for known, version in self._references if (p := known()) is not None and p._version != version
        ]
        if not moved:
            return
        self._references = [
            (weakref.ref(p), p._version) for known, _ in self._references if (p := known()) is not None
        ]
        self._moves += 1
        if self._moves >= MOVES:
            self._compare(model)

    def _begin(self, model: nn.Module, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        own = {
            (name, index): p
            for name, parameter in parameters.items()
            for index, p in enumerate(parameter)
            if p.requires_grad and not p.is_inference()
        }
        self._begun = True
        self._watched = {key: (weakref.ref(p), p._version) for key, p in own.items()}
        for key, p in own.items():

            @unserializable_hook
            def hook(_: Tensor, key: tuple[str, int] = key) -> None:
                self._seen.add(key)

            self._hooks[key] = p.register_hook(hook)
        if own:  # once, and not in every pass
            ids = {id(p) for p in own.values()}
            others = [
                p for p in model.parameters() if p.requires_grad and not p.is_inference() and id(p) not in ids
            ]
            chosen = others[:: -(-len(others) // REFERENCES) or 1] + others[-1:]
            self._references = [(weakref.ref(p), p._version) for p in chosen]

    def _forget(self, key: tuple[str, int]) -> None:
        del self._watched[key]
        hook = self._hooks.pop(key, None)
        if hook is not None:
            hook.remove()

    def _compare(self, model: nn.Module) -> None:
        """Compare the values of parameters: some optimisers write without changing a tensor's version."""
        still = {
            key: p
            for key, (known, _) in self._watched.items()
            if key in self._seen and (p := known()) is not None
        }
        if self._answer is not None:
            answer = self._answer()
            if answer is not None:
                names = [key for key, same in zip(self._kept, answer, strict=True) if same and key in still]
                self.close()
                if names:
                    self._warn(model, {key: still[key] for key in names})
        elif self._kept:
            same = [(p == self._kept[key]).all() for key, p in still.items() if key in self._kept]
            self._kept = {key: value for key, value in self._kept.items() if key in still}
            if same:
                self._answer = _read_later(torch.stack([flag.detach() for flag in same]))
                self._compare(model)
        else:
            self._kept = {key: p.detach().clone() for key, p in still.items()}

    def _warn(self, model: nn.Module, still: Mapping[tuple[str, int], nn.Parameter]) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        shown = [names[id(p)] for p in still.values() if id(p) in names]
        where = f" ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if shown else ""
        grafts = dict.fromkeys(name for name, _ in still)
        warnings.warn(
            f"{len(still)} parameter{'s' * (len(still) > 1)} of {', '.join(map(repr, grafts))}{where} on this "
            f"{model._get_name()} get gradients, and no step of an optimiser moves them.\n"
            "An optimiser that was built before the patch does not know what the patch has added.\n"
            "Build it after fxgraft.patch, or add them: optimizer.add_param_group({'params': graft.parameters()}) with "
            f"graft from fxgraft.grafts(model); or freeze them: p.requires_grad_(False).",
            FxgraftWarning,
            stacklevel=2,
        )


def _read_later(flags: Tensor) -> Callable[[], list[bool] | None]:
    """Return a function that gives the values of flags, or None while an accelerator has not computed them."""
    if hasattr(flags, "fake_mode") or flags.is_meta:  # there are no values
        return lambda: [False] * len(flags)
    if not flags.is_cuda:
        return flags.tolist
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return lambda: host.tolist() if event.query() else None
