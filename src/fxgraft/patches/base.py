"""The contract of a patch, and the registry of methods.

A method is a frozen dataclass of its options that derives from `Patch`, is decorated with `register`, and
says in `place` which units go where. Nothing else has to know it: the API, the documentation table, the test
sweeps and the benchmarks iterate over the registry.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fxgraft.errors import (
    ConfigError,
    DuplicateGraftError,
    MergeError,
    SiteError,
    UnknownMethodError,
    candidates,
)
from fxgraft.graph.anatomy import Anatomy
from fxgraft.graph.grafted import Unit, state_of
from fxgraft.graph.ledger import Graft, Placement

Make = Callable[[str, Callable[[], Unit]], Unit]
"""``make(key, build)``: the graft's unit of that key, built the first time it is asked for."""

ENTRY_POINT_GROUP = "fxgraft.patches"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
    """Base of all methods: the options of one, and what it does to a model.

    Class attributes describe the method for tables and messages:
        method: name in the registry.
        title, paper, url: what it is called and where it is from.
        where: where in a backbone it goes.
        cost: what it costs in training and in evaluation.
        train_only: evaluation is bitwise the bare model's.
        needs_labels: training passes need ``target``.
        adds_parameters: it has parameters of its own to train.
        call_options: keyword arguments of the model's call that are meant for this method's units.
        saves: a recipe of its options is enough to make it again; otherwise `fxgraft.save` refuses.
    """

    method: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    url: ClassVar[str] = ""
    where: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    train_only: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    adds_parameters: ClassVar[bool] = False
    call_options: ClassVar[tuple[str, ...]] = ()
    saves: ClassVar[bool] = True

    def place(self, anatomy: Anatomy, make: Make) -> Sequence[Placement]:
        """Say which units go where on a bare model.

        Called when the patch is made and again whenever the model has to be planned anew; units come from
        ``make``, so that their parameters survive.
        """
        raise NotImplementedError

    def describe(self, graft: Graft) -> str:
        """Say what the graft does on its model, in one line, for `fxgraft.summary`."""
        return ""

    def losses(
        self, graft: Graft, out: Any, target: Tensor, criterion: Callable[..., Tensor]
    ) -> Mapping[str, Tensor]:
        """Return what the method adds to the loss, by name."""
        return {}

    def criterion(self, graft: Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the criterion to use in place of the user's."""
        return criterion

    def merge(self, graft: Graft, model: nn.Module) -> None:
        """Fold the graft into the stock weights of ``model``; a method of training alone has nothing to fold.

        Raises:
            MergeError: the method changes the trained function in a way that stock weights cannot express.
        """
        if not self.train_only:
            raise MergeError(
                f"{graft.name!r} ({self.title}) acts in evaluation too, and stock weights cannot express it.\n"
                "Keep the patched model (fxgraft.save), or unpatch it and accept another function."
            )


P = TypeVar("P", bound=type[Patch])
_registry: dict[str, type[Patch]] = {}
_entry_points_loaded = False


def register(name: str, *, override: bool = False) -> Callable[[P], P]:
    """Register a patch class under a name; a class decorator.

    Args:
        name: what users pass to `fxgraft.patch`.
        override: replace a method of that name instead of raising.

    Raises:
        DuplicateGraftError: the name is taken; names both classes.
    """

    def add(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Patch)):
            raise ConfigError(
                f"{cls!r} is no subclass of fxgraft.Patch.\n"
                "A method is a dataclass that derives from it and implements place()."
            )
        taken = _registry.get(name)
        if taken is not None and not override:
            raise DuplicateGraftError(
                f"The method name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} cannot have it too.\n"
                "Choose another name, or register with override=True."
            )
        cls.method = name
        _registry[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Patch]]:
    """Return all methods by name: the built-in ones and those of installed packages.

    Other packages offer methods through entry points of the group ``fxgraft.patches``; an entry point loads a
    module that registers, or the patch class itself.
    """
    global _entry_points_loaded
    if not _entry_points_loaded:
        _entry_points_loaded = True
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
            loaded = point.load()
            if isinstance(loaded, type) and issubclass(loaded, Patch) and point.name not in _registry:
                register(point.name)(loaded)
    return dict(sorted(_registry.items()))


def build(method: str, options: Mapping[str, Any]) -> Patch:
    """Make a patch from its name and options.

    Raises:
        UnknownMethodError: no method of that name; lists close matches.
        ConfigError: an option the method does not have, or a value it does not take.
    """
    if not isinstance(method, str):
        hint = f"fxgraft.{method.__name__}(...)" if isinstance(method, type) else "fxgraft.RSC(layer=-1)"
        raise ConfigError(
            f"fxgraft.patch takes a method's name or a patch, got {method!r}.\nPass for example {hint}."
        )
    known = methods()
    if method not in known:
        raise UnknownMethodError(
            f"There is no method {method!r}.\n{candidates(method, known)}\n"
            "fxgraft.methods() lists them; your own are added with @fxgraft.register."
        )
    cls = known[method]
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for option in options:
        if option not in names:
            raise ConfigError(f"{method!r} has no option {option!r}.\n{candidates(option, names, 30)}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and f.name not in options
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{method!r} needs {', '.join(missing)}.\nSee help(fxgraft.{cls.__name__}).")
    return cls(**options)


def check_share(owner: str, **shares: float) -> None:
    """Raise `ConfigError` unless every value is a number in [0, 1]."""
    for name, value in shares.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise ConfigError(f"{owner}: {name} must be a share in [0, 1], got {value!r}.")


def check_choices(patch: Patch) -> None:
    """Raise `ConfigError` for every option declared as a `typing.Literal` that holds something else."""
    hints = typing.get_type_hints(type(patch))
    for f in dataclasses.fields(patch):
        hint = hints[f.name]
        parts = (
            typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        )
        literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
        if not literals:
            continue
        allowed = [value for part in literals for value in typing.get_args(part)]
        value = getattr(patch, f.name)
        if value not in allowed and not (value is None and types.NoneType in parts):
            raise ConfigError(
                f"{type(patch).__name__}: {f.name} must be one of {', '.join(map(repr, allowed))}, "
                f"got {value!r}."
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """Look through what is wrapped around a patched model: DistributedDataParallel, torch.compile."""
    while state_of(model) is None:
        inner = next((model._modules[n] for n in ("_orig_mod", "module") if n in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def grafts_on(model: nn.Module) -> list[Graft]:
    """List the grafts of a model that nothing is wrapped around; empty for a bare one."""
    state = state_of(model)
    return state.ledger.grafts if state is not None and state.ledger is not None else []


@contextmanager
def recording(model: nn.Module, kind: type[Unit], missing: str) -> Iterator[list[Any]]:
    """Let the units of one kind on a model append to a list, as ``unit.records``, for the time of the block.

    Raises:
        SiteError: there is none of them; says ``missing``.
    """
    units: list[Any] = [u for graft in grafts_on(model) for u in graft.units.values() if isinstance(u, kind)]
    if not units:
        raise SiteError(missing)
    records: list[Any] = []
    for unit in units:
        unit.records = records
    try:
        yield records
    finally:
        for unit in units:
            unit.records = None


def card(cls: type[Patch]) -> str:
    """Return the documentation of a method, as written in its class docstring."""
    return inspect.cleandoc(cls.__doc__ or "")
