"""The registry of methods: the built-in ones, and those of other packages."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fxgraft.errors import ConfigError, MethodError, no_method
from fxgraft.graph.grafting.graft import Graft
from fxgraft.patches.base import Patch
from fxgraft.patches.options import check_known

P = TypeVar("P", bound=type[Patch])
_registry: dict[str, type[Patch]] = {}
_entry_points_loaded = False

ENTRY_POINT_GROUP = "fxgraft.patches"
_OF_THE_CALL = frozenset({"model", "method", "preset", "name", "dry_run", "input_size"})


def register(name: str, *, override: bool = False) -> Callable[[P], P]:
    """Register a patch class under a name; a class decorator.

    Args:
        name: what users pass to `fxgraft.patch`.
        override: replace a method of that name instead of raising.

    Raises:
        MethodError: the name isn't an identifier, or the class isn't a dataclass that derives from `Patch` and
            implements ``place``; says what to write.
        ConfigError: the name is taken; names both classes.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise MethodError(
            f"A method's name must be an identifier, got {name!r}.\n"
            "It becomes part of parameter names. Use letters, digits and '_': "
            '@fxgraft.register("my_method").'
        )

    def add(cls: P) -> P:
        _check_class(name, cls)
        taken = _registry.get(name)
        if taken is not None and not override:
            raise ConfigError(
                f"The method name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} cannot have it too.\n"
                "Choose another name, or register with override=True."
            )
        cls.method = name
        _registry[name] = cls
        return cls

    return add


def _check_class(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Patch)):
        raise MethodError(
            f"{cls!r} isn't a subclass of fxgraft.Patch.\n"
            "A method is a dataclass that derives from it and implements place()."
        )
    declared = [hint for hint in inspect.get_annotations(cls).values() if "ClassVar" not in str(hint)]
    parameters = cls.__dict__.get("__dataclass_params__")
    if (declared and parameters is None) or (parameters is not None and not parameters.frozen):
        what = "isn't a dataclass" if parameters is None else "is a dataclass that can be changed"
        raise MethodError(
            f"{cls.__name__} {what}, so its options are not what fxgraft.patch takes.\n"
            "Decorate it twice, in this order:\n"
            f'@fxgraft.register("{name}")\n@dataclass(frozen=True, kw_only=True)\nclass {cls.__name__}(...): ...'
        )
    if not isinstance(cls.pairs_labels, str):
        raise MethodError(
            f"{cls.__name__} says pairs_labels = {cls.pairs_labels!r}, and not why.\n"
            "The reason is what users read where the method is refused beside another one.\n"
            'Write what follows the method\'s name: pairs_labels = "mixes images in every pass".'
        )
    shadowed = [f.name for f in dataclasses.fields(cls) if f.init and f.name in _OF_THE_CALL]
    if shadowed:
        raise MethodError(
            f"{cls.__name__} has an option {shadowed[0]!r}, which is an argument of fxgraft.patch itself.\n"
            "The option would never be given.\nChoose another name for it."
        )
    if cls.place is Patch.place:
        raise MethodError(
            f"{cls.__name__} does not implement place(), which says what goes where.\n"
            "Write: def place(self, backbone, make): ..."
        )


def check_beside(new: Graft, other: Graft) -> None:
    """Raise `ConfigError` where two grafts cannot be on one model, by what their methods declare."""
    for one, two in ((new, other), (other, new)):
        again, paired = one.patch.replays(), two.patch.pairs_labels
        if again and paired:
            raise ConfigError(
                f"{one.name!r} {again}, and {two.name!r} {paired}.\n"
                "The passes would be of other mixtures, row by row.\n"
                "Switch one of the two off, or take one of them off."
            )
    if new.patch.pairs_labels and other.patch.pairs_labels:
        raise ConfigError(
            f"{new.patch.method!r} and {other.name!r}, which is on the model, both pair every row of the output "
            f"with labels of other rows: {new.patch.method!r} {new.patch.pairs_labels}, {other.name!r} "
            f"{other.patch.pairs_labels}.\n"
            "Neither's loss knows what the other has mixed.\nUnpatch one of them."
        )


def not_beside(method: type[Patch]) -> list[str]:
    """List the methods that cannot be on one model with a method, each with the reason; see `check_beside`."""
    reasons = []
    for name, other in methods().items():
        if method.pairs_labels and other.pairs_labels:
            reasons.append(f"{name}, which {other.pairs_labels} and pairs labels as well")
        elif method.pairs_labels and other.replays is not Patch.replays:
            reasons.append(f"{name}, where it runs the batch again")
        elif other.pairs_labels and method.replays is not Patch.replays:
            reasons.append(f"{name}, which {other.pairs_labels}, where this one runs the batch again")
    return reasons


def methods() -> dict[str, type[Patch]]:
    """Return all methods by name: the built-in ones and those of installed packages.

    Other packages offer methods through entry points of the group ``fxgraft.patches``; an entry point loads a
    module that registers, or the patch class itself.
    """
    global _entry_points_loaded
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    if not _entry_points_loaded:
        _entry_points_loaded = True
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
            loaded = point.load()
            if isinstance(loaded, type) and issubclass(loaded, Patch) and point.name not in _registry:
                register(point.name)(loaded)
    return dict(sorted(_registry.items()))


def _found(method: str) -> type[Patch] | None:
    """Find one method; a built-in one is imported without the others."""
    own = f"{__package__}.{method}"
    if method not in _registry and method.isidentifier() and importlib.util.find_spec(own) is not None:
        importlib.import_module(own)
    return _registry[method] if method in _registry else methods().get(method)


def build(method: str, options: Mapping[str, Any]) -> Patch:
    """Make a patch from its name and options, ``preset`` among them.

    Raises:
        UnknownGraftError: no method of that name; lists close matches.
        ConfigError: an option the method does not have, or a value it does not take.
    """
    if not isinstance(method, str):
        hint = f"fxgraft.{method.__name__}(...)" if isinstance(method, type) else "fxgraft.RSC(layers=-1)"
        raise ConfigError(
            f"fxgraft.patch takes a method's name or a patch, got {method!r}.\nPass for example {hint}."
        )
    cls = _found(method)
    if cls is None:
        raise no_method(method, methods())
    given_options = dict(options)
    preset = given_options.pop("preset", None)
    check_known(cls, method, given_options)
    if preset is not None:
        return cls.preset(preset, **given_options)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    names = {"layers", *options} if "layer" in options else set(options)
    missing = [
        f.name
        for f in fields
        if f.name not in names
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{method!r} needs {', '.join(missing)}.\nSee help(fxgraft.{cls.__name__}).")
    return cls(**given_options)
