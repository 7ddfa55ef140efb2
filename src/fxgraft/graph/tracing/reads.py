"""Python state that a traced forward reads: when it changes, the graph has to be made again.

A graph holds the outcome of a branch, a loop or a number, and doesn't read its cause again. It looks tensors and
children of modules up at every call. Everything else that was read is compared before every pass: attributes of any
module, and the class attributes, functions and globals that the code names.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxgraft.graph.atomic import restoring
from fxgraft.graph.names import STATE, UNIT
from fxgraft.graph.tracing.preserve import MISSING

_TORCH = str(Path(torch.__file__).parent)
_MODULE = str(Path(_TORCH, "nn", "modules", "module.py"))
_NOBODY = (str(Path(_TORCH, "fx")), str(Path(__file__).parents[2]))
"""Folders of the tracer, whose reads are none of the forward's."""

_HERE = type("_Here", (), {"__repr__": lambda self: "a tensor or module"})()
"""Stands for a tensor or a module, which is looked up at every call."""

_MOST = 2000
"""So many entries of what one attribute holds are compared, and only the identity of the rest."""

_ALONE = (type, torch.dtype, torch.device, torch.Size, types.BuiltinFunctionType, types.ModuleType)
"""What is known by itself: nothing in it is compared."""

_OF_PYTHON = ("logging", "threading", "_thread", "multiprocessing", "concurrent", "weakref", "_weakref")
"""Packages whose objects change by themselves, and say nothing that a forward computes with."""

_TREE = ("_parameters", "_buffers", "_modules")

_EMPTY = frozenset(vars(nn.Module()))
"""What every module has."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))

_KINDS = frozenset(_PLAIN)

Names = dict[str, None]
"""Names in the order they were read."""


@contextlib.contextmanager
def noticed_reads(seen: dict[nn.Module, Names]) -> Iterator[None]:
    """Record which attributes of modules this thread reads in the block, leaving out what a tracer reads itself.

    ``torch.nn.Module.__getattribute__`` is replaced meanwhile. Other threads read through the replacement.
    """
    here = threading.get_ident()
    before = vars(nn.Module).get("__getattribute__")
    reading: dict[str, bool] = {}

    def note(module: nn.Module, name: str) -> None:
        frame = sys._getframe(2)
        file = frame.f_code.co_filename
        # A __call__ runs again where the graph calls the module. Layers of transformers checkpoint in their forwards,
        # by a function that no trace sees into: it changes no value.
        if frame.f_code.co_name == "__call__" or name == "gradient_checkpointing":
            return
        if file == _MODULE:  # torch's own functions, such as children(): the read counts as their caller's
            if name != "_modules":
                return
            while frame is not None and frame.f_code.co_filename == _MODULE:
                frame = frame.f_back
            file = "" if frame is None else frame.f_code.co_filename
        if file not in reading:
            reading[file] = not file.startswith(_NOBODY)
        if reading[file]:
            seen.setdefault(module, {})[name] = None

    def get(module: nn.Module, name: str) -> Any:
        if threading.get_ident() == here:
            note(module, name)
        return super(nn.Module, module).__getattribute__(name)

    def restore() -> None:
        if vars(nn.Module).get("__getattribute__") is get:
            if before is None:
                del nn.Module.__getattribute__
            else:
                nn.Module.__getattribute__ = before

    with restoring(restore):
        nn.Module.__getattribute__ = get  # type: ignore[method-assign]
        yield


def attribute(module: nn.Module, name: str) -> Any:
    """Return what a forward reads under a name, past hooks on reading; of children their names."""
    own = module.__dict__
    if name in _TREE:
        return tuple(key for key, part in own[name].items() if not getattr(type(part), UNIT, False))
    if name in own:
        value = own[name]
        return _HERE if isinstance(value, (Tensor, nn.Module)) else value
    for kind in _TREE:
        if name in own[kind]:
            return None if own[kind][name] is None else _HERE
    return getattr(getattr(type(module), "_fxgraft_base", type(module)), name, MISSING)


class Held(tuple[Any, ...]):
    """What a value holds, in a form that can be compared with a later one."""

    __slots__ = ()


def held(value: Any) -> Any:
    """Return an immutable value as it is; of any other, return a record of what it holds."""
    return _Holding().of(value)


class _Holding:
    def __init__(self) -> None:
        self._left = _MOST
        self._seen: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _KINDS or isinstance(value, (*_PLAIN, *_ALONE)) or value is MISSING or value is _HERE:
            return value
        if kind is types.FunctionType and value.__closure__ is None:
            return value
        if kind is tuple and _KINDS.issuperset(map(type, value)):
            return value
        if id(value) in self._seen:
            return Held(("again", self._seen[id(value)]))
        self._seen[id(value)] = len(self._seen)
        self._left -= 1
        if self._left < 0:
            return Held((kind, id(value)))
        if isinstance(value, nn.Module):
            return Held((kind, weakref.ref(value)))
        if isinstance(value, Tensor):
            version = None if value.is_inference() or isinstance(value, nn.Parameter) else value._version
            return Held((kind, weakref.ref(value), version))
        if kind in (dict, list) and _KINDS.issuperset(map(type, value.values() if kind is dict else value)):
            return Held((kind, value.copy()))  # long ones, such as names of classes, at the speed of C
        if isinstance(value, dict):
            return Held((kind, *map(self.pair, value.items())))
        if isinstance(value, (set, frozenset)):
            return Held((kind, *sorted(map(repr, value))))
        if isinstance(value, (list, tuple, deque)):
            return Held((kind, *map(self.typed, value)))
        return Held((kind, *map(self.typed, self.parts(value, kind))))

    def typed(self, value: Any) -> tuple[type, Any]:
        return type(value), self.of(value)  # 1 is equal to True

    def pair(self, entry: tuple[Any, Any]) -> tuple[Any, ...]:
        key, value = entry
        return (key if isinstance(key, _PLAIN) else repr(key), *self.typed(value))

    def parts(self, value: Any, kind: type) -> Collection[Any]:
        """List what another object holds."""
        if kind is types.FunctionType:
            return value.__code__, value.__defaults__, value.__kwdefaults__, *_cells(value)
        if kind is types.MethodType:
            return value.__func__, value.__self__
        if kind in (staticmethod, classmethod):
            return (value.__func__,)
        if kind is property:
            return value.fget, value.fset
        if kind is functools.cached_property:
            return (value.func,)
        if kind is functools.partial:
            return value.func, value.args, value.keywords
        own = getattr(value, "__dict__", None)
        slots = [name for cls in kind.__mro__ for name in _slots(cls)]
        if type(own) is not dict and not slots:
            return (value.tobytes(),) if hasattr(value, "tobytes") else (id(value),)
        if _package(kind) in _OF_PYTHON:
            return (id(value),)
        return own or {}, *(getattr(value, name, MISSING) for name in slots)


def _slots(kind: type) -> Collection[str]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _cells(function: types.FunctionType) -> list[Any]:
    try:
        return [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # one that is not filled yet
        return []


def plain_value(kept: Any) -> Iterator[Any]:
    """Yield what was kept if it is a number, a text or a list of those; else nothing."""
    if isinstance(kept, (bool, int, float, str)):
        yield kept
    elif isinstance(kept, Held) and kept[0] is list and isinstance(kept[1], list):
        yield kept[1]


def same(kept: Any, value: Any, memo: dict[int, Any]) -> bool:
    """Say whether a value is what was kept of it.

    Args:
        kept: what `held` gave then.
        value: the present value.
        memo: what values hold now, by identity, with the values; it serves one comparison.
    """
    if isinstance(kept, Held):
        if id(value) not in memo:
            memo[id(value)] = value, held(value)
        return kept == memo[id(value)][1]
    if kept is value:
        return True
    # 0.0 and -0.0 are equal, and not the same.
    return (
        type(kept) is type(value) and kept == value and (type(kept) is not float or repr(kept) == repr(value))
    )


class Elsewhere:
    """Attributes of a module that is not in the tree of the one that was traced.

    Args:
        module: the module.
        names: the names of the attributes.
    """

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        self._module = weakref.ref(module)
        self._kept = {name: held(attribute(module, name)) for name in names}

    def changed(self, _: nn.Module, __: nn.Module, memo: dict[int, Any]) -> bool:
        """Say whether an attribute has changed. A module that is gone doesn't count: its reader has changed itself."""
        module = self._module()
        return module is not None and not all(
            same(kept, attribute(module, name), memo) for name, kept in self._kept.items()
        )


class Mode:
    """The mode of a part of a model, as a forward read it in one of the two modes.

    Args:
        whole: mode of the module that was traced.
        part: mode of the part then, which differs where the part is frozen.
    """

    def __init__(self, whole: bool, part: bool) -> None:
        self._whole, self._part = whole, part

    def changed(self, module: nn.Module, root: nn.Module, memo: dict[int, Any]) -> bool:
        """Say whether the part has another mode now, if the traced module is in the mode of then."""
        return root.training is self._whole and module.training is not self._part


class Code:
    """The class attributes, functions and globals that a class's forward, and all that it calls, can read.

    Args:
        kind: the class.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self._packages = {_package(cls) for cls in kind.__mro__} - {"torch", "builtins", "fxgraft"}
        self._owners = [cls for cls in kind.__mro__ if _package(cls) in self._packages]
        self._found: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        self._walked: set[types.CodeType] = set()
        for cls in self._owners:
            if "forward" in vars(cls):
                self._note(vars(cls), "forward")
                break

    def walk(self, value: Any) -> None:
        """Follow a function, and what it calls, through the packages of the class."""
        inner = (
            getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", None)
        )
        if inner is not None:
            self.walk(inner)
        if not isinstance(value, types.FunctionType) or value.__code__ in self._walked:
            return
        if str(value.__module__).partition(".")[0] not in self._packages:
            return
        self._walked.add(value.__code__)
        for cell in _cells(value):
            self.walk(cell)
        for name in dict.fromkeys(_names(value.__code__)):
            owner = next((cls for cls in self._owners if name in vars(cls)), None)
            if owner is not None:
                self._note(vars(owner), name)
            if name in value.__globals__:
                self._note(value.__globals__, name)
                whole = value.__globals__[name]
                known = isinstance(whole, type) and _package(whole) in self._packages
                if known or isinstance(whole, types.ModuleType):
                    for inside in _names(value.__code__):
                        if inside in vars(whole) and not isinstance(vars(whole)[inside], types.ModuleType):
                            self._note(vars(whole), inside)

    def _note(self, holder: Mapping[str, Any], name: str) -> None:
        value = holder[name]
        function = callable(value) or isinstance(value, (property, classmethod, staticmethod))
        held_here = isinstance(value, (*_PLAIN, list, tuple, set, frozenset, dict))
        if not (function or held_here or _package(type(value)) in self._packages):
            return
        if (id(holder), name) not in self._found:
            self._found[id(holder), name] = (holder, name, _Itself(value) if function else _entries(value))
            self.walk(value)

    def changed(self, _: nn.Module, __: nn.Module, memo: dict[int, Any]) -> bool:
        """Say whether one of them has changed."""
        if id(self) in memo:
            return False
        memo[id(self)] = self
        for holder, name, kept in self._found.values():
            value = holder.get(name, MISSING)
            if isinstance(kept, _Itself):
                if value is not kept.value:
                    return True
            elif isinstance(kept, _Entries):
                if not (isinstance(value, dict) and kept.same_in(value, memo)):
                    return True
            elif not same(kept, value, memo):
                return True
        return False


class _Itself(NamedTuple):
    """A function or a class: compared by identity, since code replaces these and doesn't change them."""

    value: Any


class _Entries(dict[Any, Any]):
    """The entries of a dictionary that belongs to code. Entries that are added later count as a cache."""

    def same_in(self, value: dict[Any, Any], memo: dict[int, Any]) -> bool:
        # As a plain dictionary: transformers has one whose get() takes something else.
        return all(same(kept, dict.get(value, key, MISSING), memo) for key, kept in self.items())


def _entries(value: Any) -> Any:
    if isinstance(value, dict) and len(value) <= _MOST:
        return _Entries({key: held(item) for key, item in dict.items(value)})
    return held(value)


def _package(value: Any) -> str:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
    return str(name).partition(".")[0]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def kept_reads(
    seen: Mapping[nn.Module, Names],
    paths: Mapping[nn.Module, str],
    opened: Collection[str],
    original: Callable[[str], nn.Module],
    code: Callable[[type[nn.Module]], Code],
    training: bool,
) -> dict[str, dict[str, Any]]:
    """Return what was read, by path from the traced module, for `settings.settings_changed` to compare.

    Args:
        seen: what `noticed_reads` took down.
        paths: the paths of the modules that were looked at, which may be look-alikes.
        opened: paths of the modules whose forwards ran.
        original: a function from a path to the model's own module.
        code: a function from a class to what its code can read.
        training: the mode that was traced for.
    """
    modes = {path: module.training for module, path in paths.items()}
    kept: dict[str, dict[str, Any]] = {path: {} for path in sorted(opened)}
    for module, names in seen.items():
        read = [name for name in names if name != "training" and not _special(name)]
        path = paths.get(module)
        if path is None:
            kept[""][f"attributes of {type(module).__name__} {id(module)}"] = Elsewhere(module, read)
            continue
        own = original(path)
        if "__dict__" in names:
            read += [name for name in own.__dict__ if name not in _EMPTY]
        values = {name: attribute(own, name) for name in dict.fromkeys(read) if not _special(name)}
        read_there = {name: held(value) for name, value in values.items() if not _of_torch(value)}
        if path and "training" in names:
            flag = modes[path] if modes[""] is training else training
            read_there[f"mode in {'training' if training else 'evaluation'}"] = Mode(training, flag)
        if read_there:
            kept.setdefault(path, {}).update(read_there)
    for path in opened:
        own = original(path)
        if path and STATE not in own.__dict__:
            kept[path]["forward"] = held(attribute(own, "forward"))
        kept[path]["code"] = code(getattr(type(own), "_fxgraft_base", type(own)))
    return kept


def _special(name: str) -> bool:
    return name in ("training", STATE) or (name.startswith("__") and name.endswith("__"))


def _of_torch(value: Any) -> bool:
    """Say whether a value is a function of torch.nn.Module."""
    return isinstance(value, types.FunctionType) and vars(nn.Module).get(value.__name__) is value
