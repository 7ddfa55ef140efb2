"""The registry of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeVar

from fxgraft.errors import (
    ConfigError,
    DuplicateGraftError,
    UnknownMethodError,
    candidates,
)
from fxgraft.patches.base import Patch

ENTRY_POINT_GROUP = "fxgraft.patches"


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
