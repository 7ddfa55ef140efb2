"""A graft: a patch on one model, with its units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from fxgraft.errors import FxgraftError, MethodError
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.runtime.forward_context import ARGUMENTS, Arguments, Context

U = TypeVar("U", bound=Unit)


class Make(Protocol):
    """How a method gets its units, so that they are the same ones when a model is planned again."""

    def __call__(self, key: str, kind: Callable[..., U], *args: Any, **kwargs: Any) -> U:
        """Return the graft's unit of that key, building it as ``kind(*args, **kwargs)`` the first time."""
        ...


class Placer:
    """What planning and the registry ask of a patch: the interface that `Patch` implements.

    Attributes:
        order: (group, rank): units of one group at one site run by rank, whichever graft was added first.
        call_options: keyword arguments of the model's call that the patch reads.
        train_only: whether evaluation is the bare model's, to the bit.
    """

    order: ClassVar[tuple[str, int] | None] = None
    call_options: ClassVar[tuple[str, ...]] = ()
    train_only: ClassVar[bool] = False

    def place(self, backbone: Backbone, make: Make) -> Iterable[Placement | list[Placement]]:
        """Say which units go where on a bare model."""
        raise NotImplementedError

    def on_installed(self, graft: Graft, backbone: Backbone) -> None:
        """Look at the model with all of its grafts on it; called where some of them act in evaluation."""

    def on_first_training_pass(self, graft: Graft, model: nn.Module) -> None:
        """Look at the model before its first training pass with the graft on it; not called in compiled code."""

    def replays(self) -> str:
        """Say why the patch runs the model again on the arguments of a training pass; '' where it doesn't.

        The text follows the graft's name in messages, as "runs the batch again to compare predictions".
        """
        return ""

    def schedules(self) -> tuple[str, ...]:
        """Name the options whose present values follow the progress of the training."""
        return ()

    def contributes_loss(self) -> bool:
        """Say whether the patch has a share in the loss of training passes."""
        return False


P = TypeVar("P", bound=Placer, covariant=True)


@dataclass
class Graft(Generic[P]):
    """A patch on a model.

    Attributes:
        name: the name by which it can be taken off.
        patch: the settings, as given.
        units: the modules that it inserted, by key.
        input_size: (C, H, W) that its sites were resolved at, None for the model's own.
        context: state shared with the other grafts of its model; None before it is installed.
        started: whether a training pass was made with it.
    """

    name: str
    patch: P
    units: dict[str, Unit] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None
    context: Context | None = field(default=None, init=False, repr=False, compare=False)
    started: bool = field(default=False, init=False, repr=False, compare=False)

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters that the graft added, for an optimiser."""
        return [p for unit in self.units.values() for p in unit.parameters()]

    def where(self, most: int = 6) -> str:
        """Name the units, most of which have their sites' names; of many, the first two, the last and the count.

        Args:
            most: the largest number of units that are all named.
        """
        names = list(self.units)
        if len(names) <= most:
            return ", ".join(names)
        return f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)} units)"

    def units_of(self, kind: type[U]) -> list[U]:
        """List the units of one class."""
        return [unit for unit in self.units.values() if isinstance(unit, kind)]

    def make(self, key: str, kind: Callable[..., U], *args: Any, **kwargs: Any) -> U:
        """Return the unit of that key, building it as ``kind(*args, **kwargs)`` the first time.

        It is built again where a whole number in ``args``, such as a width, has changed.

        Raises:
            MethodError: what is built isn't a `Unit`, or the key belongs to a unit of another class.
        """
        unit = self.units.get(key)
        sizes = tuple(arg for arg in args if type(arg) is int)
        if unit is None or unit.built_with not in (None, sizes):
            unit = kind(*args, **kwargs)
            if not isinstance(unit, Unit):
                raise MethodError(
                    f"{self.name!r}: make({key!r}, ...) was to build a unit, and built a {type(unit).__name__}.\n"
                    "A unit is told its graft, its pass and the training's progress, which a plain module is not.\n"
                    f"Derive from fxgraft.extend.Unit: class {type(unit).__name__}(Unit)."
                )
            unit.built_with = sizes
            self.units[key] = unit
        elif isinstance(kind, type) and not isinstance(unit, kind):
            raise MethodError(
                f"{self.name!r}: make({key!r}, {kind.__name__}) asks for the key of a {type(unit).__name__}.\n"
                "One key belongs to one unit.\nGive every unit of the method a key of its own."
            )
        unit.graft = self.name
        return unit  # type: ignore[return-value]

    def recall(self, out: Any) -> Any:
        """Return what the graft remembers of the training pass that gave ``out``; None if nothing.

        That is what `PassView.remember` was given, for `Patch.criterion` and `Patch.losses`. ``out`` is what the model
        returned, or something computed from that: converted, scaled, copied, a view.

        Raises:
            TargetError: ``out`` comes from several passes, or from no known pass while the graft remembers some.
        """
        return None if self.context is None else self.context.recall(self.name, out)

    def measured(self) -> Mapping[str, Sequence[Any]]:
        """Return what was measured of the last training pass, by name: see `PassView.measure`."""
        return {} if self.context is None else self.context.measured.get(self.name, {})

    def measure(self, name: str, value: Any) -> None:
        """Measure something of the last training pass once it is over, as the loss does; see `PassView.measure`."""
        if self.context is not None:
            kept = value.detach() if isinstance(value, Tensor) else value
            self.context.measured.setdefault(self.name, {})[name] = [kept]

    def doubt(self, wrong: Tensor | bool, error: FxgraftError) -> None:
        """Raise an error if something is wrong. An accelerator isn't waited for: its error comes in a later step.

        Args:
            wrong: () bool.
            error: what to raise.
        """
        if self.context is not None:
            self.context.checks.check(wrong, error)

    def arguments(self, out: Any) -> Arguments | None:
        """Return the arguments of the pass that gave ``out``, if it was a training pass and the patch replays."""
        return None if self.context is None else self.context.recall(self.name, out, ARGUMENTS)

    def override(self, **options: Any) -> AbstractContextManager[None]:
        """Set a request that the graft's units see in all passes of this thread in the block; see `PassView.asked`."""
        return nullcontext() if self.context is None else self.context.override(self.name, **options)

    def model(self) -> nn.Module | None:
        """Return the model that the graft is on."""
        known = None if self.context is None else self.context.model
        return None if known is None else known()

    def __repr__(self) -> str:
        return f"Graft({self.name!r}, {self.patch!r})"


def checked_placements(graft: Graft, placed: Any) -> list[Placement]:
    """Return what ``place`` returned as a list, flattened by one level.

    Raises:
        MethodError: it holds something that isn't a placement; the message says what to return.
    """
    what = type(graft.patch).__name__
    how = (
        "place() returns what backbone.place(site, unit), .instead(...), .before(...) and .after(...) give, in a "
        "list or one by one with yield."
    )
    if isinstance(placed, Placement):
        return [placed]
    if placed is None or isinstance(placed, (str, nn.Module)) or not isinstance(placed, Iterable):
        returned = "nothing" if placed is None else f"a {type(placed).__name__}"
        raise MethodError(f"{what}.place returned {returned}.\n{how}")
    flat: list[Placement] = []
    for placement in placed:
        inner = placement if isinstance(placement, list) else [placement]
        for one in inner:
            if not isinstance(one, Placement):
                raise MethodError(
                    f"{what}.place returned a {type(one).__name__} among its placements.\n{how}"
                )
            if not isinstance(one.unit, Unit):
                raise MethodError(
                    f"{what}.place puts a {type(one.unit).__name__} at {one.key!r}, which isn't a unit.\n"
                    f"Derive from fxgraft.extend.Unit: class {type(one.unit).__name__}(Unit)."
                )
            learned = next(one.unit.parameters(), None) is not None
            if learned and all(one.unit is not unit for unit in graft.units.values()):
                raise MethodError(
                    f"{what}.place puts a {type(one.unit).__name__} at {one.key!r} that make() did not build.\n"
                    "It would be built anew whenever the model is planned again, and lose what it has learned.\n"
                    f"Build it by make(key, {type(one.unit).__name__}, ...)."
                )
            if one.evaluation and graft.patch.train_only:
                raise MethodError(
                    f"{what} says train_only = True, and places the unit {one.key!r} in evaluation as well.\n"
                    "Pass evaluation=False to place(), or leave train_only out."
                )
        flat += inner
    return flat
