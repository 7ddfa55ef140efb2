"""Units: the modules that a graft inserts into a network, and their view of the pass that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from fxgraft._torch import fsdp_state_before_backward, graph_task, transforms_active
from fxgraft.errors import BypassError, FxgraftError, SiteError
from fxgraft.graph.runtime.forward_context import Context, ForwardContext, tell_once
from fxgraft.graph.structure.rest_of_network import Rest

T = TypeVar("T")


class PassView:
    """One call of a patched model, as the units of one graft see it.

    Args:
        model_pass: the pass, which all grafts share.
        graft: the graft's name.
    """

    def __init__(self, model_pass: ForwardContext, graft: str) -> None:
        self.model_pass = model_pass
        self.graft = graft

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self.model_pass.model

    @property
    def training(self) -> bool:
        """The mode of the whole model, where parts of it may be frozen in evaluation mode."""
        return self.model_pass.training

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The model's positional arguments."""
        return self.model_pass.inputs

    @property
    def options(self) -> Mapping[str, Any]:
        """Keyword arguments of the call that a patch declared as its own."""
        return self.model_pass.options

    @property
    def target(self) -> Any:
        """The labels as grafts see them from here on, unchecked; None if there are none."""
        return self.model_pass.labels.value

    @property
    def read_by_model(self) -> bool:
        """Whether the model's own forward was given labels of the batch, by an argument that it names."""
        return self.model_pass.read_by_model

    def labels(self, batch: int, part: Any = None) -> Tensor:
        """Return the labels of this pass, or raise what is wrong with them.

        Args:
            batch: batch size at the unit's site.
            part: where the call was given labels in several parts: the one to check and return.

        Raises:
            TargetError: no labels, labels that served an earlier batch, labels of which of several loaders
                nobody says, or another batch size.
        """
        return self.model_pass.labels.checked(self.graft, batch, part)

    def check_images_alone(self, why: str, all_positions: bool = False) -> None:
        """Raise where a call gave the model more than images and labels: its graphs know nothing of that.

        A model is traced on images alone. A call may add a mask of padding, coordinates or a condition.

        Args:
            why: a sentence that says what would go wrong.
            all_positions: refuse only what may tell positions apart: tensors of several entries per image.

        Raises:
            BypassError: the call gave more.
        """
        labels = self.model_pass.labels.given
        extra = [
            name
            for name, labels_beside in self.model_pass.beside.items()
            if labels_beside is not labels
            and (
                not all_positions
                or (
                    isinstance(labels_beside, Tensor)
                    and labels_beside.ndim > 1
                    and labels_beside.shape[1:].numel() > 1
                )
            )
        ]
        if extra:
            raise BypassError(
                f"{self.graft!r} was given {', '.join(map(repr, extra))} beside the images, and it knows the model as "
                f"it runs on images alone.\n{why}\n"
                "Give the model tensors of images of one size, which need no mask, or leave the method out."
            )

    def relabel(self, target: Any) -> None:
        """Replace the labels for the grafts that run later, after this one has mixed the samples.

        `fxgraft.loss` goes on getting the labels of the batch from the caller.
        """
        self.model_pass.labels.replace(target)

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """Return a value that all units of the graft share in this pass; the first one that asks makes it.

        Args:
            key: a name for it.
            make: a function that makes the value; usually a draw.
        """
        shared = self.model_pass.shared
        if (self.graft, key) not in shared:
            shared[self.graft, key] = make()
        return shared[self.graft, key]

    def put(self, key: str, value: Any) -> None:
        """Hand a value to the units of the graft that run later in this pass."""
        self.model_pass.shared[self.graft, key] = value

    def get(self, key: str) -> Any:
        """Return what `put` or `shared` has under that name, or None."""
        return self.model_pass.shared.get((self.graft, key))

    def asked(self, key: str) -> Any:
        """Return the request that `Graft.override` set for this pass under that name, or None."""
        return self.model_pass.context.asked.get((self.graft, key))

    def remember(self, state: Any) -> None:
        """Store what the graft's loss needs of this pass; `Graft.recall` finds it by the output.

        Passes in evaluation store nothing: a loss that is computed there is the user's own.
        """
        self.model_pass.notes[self.graft] = state

    def measure(self, name: str, value: Any) -> None:
        """Store a scalar of a training pass for `fxgraft.diagnostics`; other passes store nothing.

        Values that several units measure under one name are averaged. Nothing is computed here and no device is waited
        for, so pass the tensor at hand: a mask rather than its mean.

        Args:
            name: the scalar's name.
            value: a number, or a tensor of any shape that stands for its mean; it is detached.
        """
        run = self.model_pass
        if not run.training or run.recording is None:  # a look ahead isn't a training pass
            return
        if isinstance(value, Tensor):
            if not torch.compiler.is_compiling() and transforms_active():
                return  # it would outlive the transform that it belongs to
            value = value.detach()
        run.measured.setdefault(self.graft, {}).setdefault(name, []).append(value)

    def tell(self, key: str, message: str) -> None:
        """Warn, once for the model, of something that the graft cannot do in passes such as this one.

        Args:
            key: a name for it.
            message: what follows the graft's name.
        """
        tell_once(self.model_pass.context, (self.graft, key), f"{self.graft!r} {message}")

    def doubt(self, wrong: Tensor | bool, error: FxgraftError) -> None:
        """Raise an error if something is wrong. An accelerator isn't waited for: its error comes in a later step.

        Args:
            wrong: () bool.
            error: what to raise.
        """
        self.model_pass.context.checks.check(wrong, error)


def recomputed() -> bool:
    """Say whether this runs in a backward pass, as a region does that activation checkpointing runs again."""
    return not torch.compiler.is_compiling() and graph_task() != -1


class _NoPass:
    """Stands for the pass where there is none. A property that raises would stop tools that list attributes."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit

    def __getattr__(self, name: str) -> Any:
        self._unit.refuse_no_pass()


class Unit(nn.Module):
    """What a graft inserts: a module called with the value at its site.

    A unit runs only in the graphs it was placed in, so it holds no branch on the mode. One with parameters
    or buffers is registered beside the module it serves, under a name that starts with ``graft_``; one
    without is not registered at all and leaves no trace in ``children()``.

    Attributes:
        context: state that the grafts of the model share; set when the unit is installed.
        graft: the name of its graft.
        optional: whether calls of a part of the model may go around it; another unit then says what is missing.
        built_with: the whole numbers that the unit was built with, such as a width.
        restarts: bound in planning where the layer that the unit serves was replaced by one of other weights; once the
            plan is carried out, `restart` is called and what the unit had is reported as lost.
    """

    _fxgraft_unit: ClassVar[bool] = True  # `names.UNIT`: tracing, below, tells units by it

    context: Context
    graft: str = ""
    optional: bool = False
    built_with: tuple[int, ...] | None = None
    restarts: bool = False

    @property
    def current(self) -> PassView | None:
        """The pass that is running in this thread; None outside of one (a part of the model called by itself)."""
        running = self.context.current
        return None if running is None else PassView(running, self.graft)

    @property
    def run(self) -> PassView:
        """The pass that is running in this thread.

        Outside of one, whatever is asked of it raises: SiteError where a part of the model was called by itself,
        BypassError where activation checkpointing runs a part of the model again.
        """
        return self.current or cast("PassView", _NoPass(self))

    def refuse_no_pass(self) -> NoReturn:
        """Raise, since a part of the model runs outside of a pass.

        Raises:
            SiteError: it was called by itself.
            BypassError: activation checkpointing runs it again, when what the unit did in the pass is gone.
        """
        self.refuse_recomputation()
        raise SiteError(f"{self.graft!r} acts inside a pass of its model.\nCall the model, not its parts.")

    def refuse_recomputation(self) -> None:
        """Raise where activation checkpointing runs a part of the model again, in the backward pass.

        Raises:
            BypassError: it does, when what the unit did in the pass is gone.
        """
        if recomputed():
            raise BypassError(
                f"{self.graft!r} acts inside a pass of its model, and activation checkpointing runs a part of it again "
                "when that pass is over: not as it ran before.\n"
                "Switch checkpointing off, or leave the part that the graft acts in out of it."
            )

    def bind(self, **attributes: Any) -> None:
        """Set attributes that planning finds again on every model: they don't travel with copies and pickles.

        Modules among them do not become children of the unit.
        """
        self.__dict__["_bound"] = tuple(dict.fromkeys((*self.__dict__.get("_bound", ()), *attributes)))
        self.__dict__.update(attributes)

    def bound(self) -> dict[str, Any]:
        """Return what `bind` has set."""
        return {name: self.__dict__[name] for name in self.__dict__.get("_bound", ())}

    def set_progress(self, fraction: float) -> None:
        """Follow a schedule. Store what depends on it in plain attributes, on which compiled code guards."""

    def restart(self, model: nn.Module) -> None:
        """Take up new weights of the network, where tensors of the unit are made from them."""

    def counterparts(self) -> Mapping[str, str]:
        """Map each parameter of the unit that is a further copy of one of the model's to that one's qualified name.

        Rules that choose parameters by name then hold for both.
        """
        return {}

    def stale(self, model: nn.Module) -> bool:
        """Say whether what the unit knows about ``model`` no longer holds, so that it must be planned again."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the model the unit sits in; it is set again when a copy is grafted."""
        out = {"context", "_bound", *self.bound()}
        return {key: value for key, value in self.__dict__.items() if key not in out}

    @property
    def registered(self) -> bool:
        """Whether the unit holds tensors and so has to join the module tree."""
        return any(True for _ in self.parameters()) or any(True for _ in self.buffers())


class Capture(Unit):
    """Hands the value at a site to the other units of its graft, and on.

    Args:
        key: the name to hand it over by.
    """

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        run = self.current
        if run is not None:
            run.put(self.key, x)
        return x


def look_ahead(run: PassView, rest: Rest, z: Tensor) -> Tensor:
    """Return the logits for a value at the site where a `Rest` starts. The pass goes on as if this had not run.

    Args:
        run: the pass, as seen by the graft that captured what else the rest needs.
        rest: the rest of the network.
        z: the value. Nothing is written to it as long as it is not used elsewhere; pass a clone.
    """
    captured = [run.get(capture.name) for capture in rest.captured]
    inputs = [run.inputs[index] for index in rest.inputs]
    with run.model_pass.aside(), _outside_sharded_step(run.model, rest.children):
        return rest.evaluate(run.model, z, captured, inputs, run.model_pass.calls)


@contextlib.contextmanager
def _outside_sharded_step(model: nn.Module, children: tuple[str, ...]) -> Iterator[None]:
    """Keep what runs in the block out of the step that FSDP2 is in the middle of.

    FSDP2 ends its step in a callback of the first backward through its modules. That would be the backward of a look
    ahead, and the parameters would be sharded again in the middle of the model's forward. FSDP2 runs modules plainly
    that are in their backward, as activation checkpointing needs it; so they are made to look like that.
    """
    sharded = [
        part
        for name in children
        for part in model.get_submodule(name).modules()
        if hasattr(type(part), "_get_fsdp_state")
    ]
    if not sharded:
        yield
        return
    states: list[Any] = [part._get_fsdp_state() for part in sharded]  # type: ignore[operator]
    before = [state._training_state for state in states]
    for part, state in zip(sharded, states, strict=True):
        part.unshard()  # type: ignore[operator]
        state._training_state = fsdp_state_before_backward()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state._training_state = kept
