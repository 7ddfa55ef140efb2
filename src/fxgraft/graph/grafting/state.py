"""The state that a grafted module carries: the programs of both modes and the units they call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

from fxgraft.errors import no_module
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.names import STATE
from fxgraft.graph.runtime.forward_context import Context

if TYPE_CHECKING:
    from fxgraft.graph.grafting.graft_registry import GraftRegistry


@dataclass
class Program:
    """What a grafted module runs in one mode.

    Attributes:
        function: what runs in place of the class's forward, called with the module first; or None.
        units: units that act on the output, in order.
        inputs: units that act on the first argument, in order.
        skipped: qualified names of modules that the class's forward calls and the function does not.
    """

    function: Callable[..., Any] | None = None
    units: list[Unit] = field(default_factory=list)
    inputs: list[Unit] = field(default_factory=list)
    skipped: frozenset[str] = frozenset()

    @property
    def empty(self) -> bool:
        """Whether it is the module's own forward and nothing else."""
        return self.function is None and not self.units and not self.inputs

    @property
    def acts(self) -> bool:
        """Whether it does more than the module's own forward, not counting units that a call may go around."""
        return self.function is not None or not all(u.optional for u in (*self.units, *self.inputs))


@dataclass
class GraftState:
    """Everything a grafted module needs beyond its own attributes.

    Attributes:
        base: the module's own class.
        path: its qualified name in the model.
        context: shared by all grafted modules of the model.
        outer: whether this is the patched model itself.
        training, evaluation: what to run in each mode.
        units: units that generated code reaches through this state, by name.
        registered: units that joined the module tree as children of this module, by name.
        settings: plain attributes the graphs were traced under, by module path relative to this one.
        registry: (outer only) what keeps the grafts.
        orphan: set on a module that was copied without its model.
        twin: whether the module stands for one of the model's, in a replica or a shadow: nobody plans that again.
    """

    base: type[nn.Module]
    path: str
    context: Context
    outer: bool = False
    training: Program = field(default_factory=Program)
    evaluation: Program = field(default_factory=Program)
    units: SimpleNamespace = field(default_factory=SimpleNamespace)
    registered: dict[str, Unit] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    registry: GraftRegistry | None = None
    orphan: bool = False
    twin: bool = False

    def with_units(self, twin: Callable[[Unit], Unit]) -> GraftState:
        """Return the same state around other units.

        Args:
            twin: a function from a unit to the one that takes its place.
        """

        def program(of: Program) -> Program:
            whole = twin(of.function) if isinstance(of.function, Unit) else of.function
            return replace(of, function=whole, inputs=[*map(twin, of.inputs)], units=[*map(twin, of.units)])

        return replace(
            self,
            training=program(self.training),
            evaluation=program(self.evaluation),
            units=SimpleNamespace(**{name: twin(unit) for name, unit in vars(self.units).items()}),
            registered={name: twin(unit) for name, unit in self.registered.items()},
            twin=True,
        )


def foreign_forward(module: nn.Module) -> bool:
    """Say whether the instance has a forward of its own; its class's forward bound to it doesn't count."""
    own = module.__dict__.get("forward")
    if own is None:
        return False
    bound_here = getattr(own, "__self__", None) is module
    return not (state_of(module) is not None and bound_here and own.__func__ is type(module).forward)


def hidden_forward(who: str) -> str:
    """Make the error for a grafted module that was given a forward of its own."""
    return (
        f"{who!r} was given a forward of its own after it was patched (mixed precision of accelerate or transformers "
        "does so).\nIt holds on to the patched forward, which would be left without its graft.\n"
        "Undo it first: del module.forward, or accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
    )


def state_of(module: nn.Module) -> GraftState | None:
    """Return the graft state of a module, or None for a bare one.

    Raises:
        WrappedModelError: it isn't a module.
    """
    if not isinstance(module, nn.Module):
        raise no_module(module)
    return module.__dict__.get(STATE)


def parts_without_model(model: nn.Module) -> list[nn.Module]:
    """List the grafted parts of a model that were copied out of a patched model without the rest of it."""
    states = ((module, state_of(module)) for module in model.modules())
    return [module for module, state in states if state is not None and state.orphan]


def localise(model: nn.Module) -> None:
    """Give a replica of DataParallel its own copies of the units that hold tensors: replicas run in threads.

    State of a pass needs no copy, since it belongs to a thread.
    """
    state = state_of(model)
    if state is None or state.registry is None:
        return
    twins: dict[int, Unit] = {}
    owned = [model.get_submodule(path) for path in state.registry.paths()]
    for module in owned:
        registered = module.__dict__[STATE].registered
        for name, child in module._modules.items():
            if isinstance(child, Unit) and name in registered:
                twins[id(registered[name])] = child
    for module in owned:
        state = module.__dict__[STATE]
        module.__dict__[STATE] = state.with_units(lambda unit: twins.get(id(unit), unit))
