"""A shadow of a model: new modules around the model's own tensors, to be looked at in place of the model.

Looking at a model sets modes, swaps buffers and lets forwards write on their modules. On a shadow none of that reaches
the model, which other threads may run meanwhile.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Mapping
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxgraft.graph.names import STATE
from fxgraft.graph.tracing.preserve import Reachable

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LEAVES = (*_PLAIN, Tensor, type, torch.dtype, torch.device, torch.Size, fx.Graph, types.ModuleType)
"""What is shared with the model, whatever is in it."""

_FIXED = (enum.Enum, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
"""What is compared by identity alone, since nothing in it changes."""

_DEPTH = 3
"""So many objects deep a module of the model is looked for in what isn't a module."""


class Shadow:
    """A model's look-alike: every module of the model has one, with a dictionary and containers of its own.

    Parameters, buffers and anything else that leads to no module of the model are shared with the model. What leads to
    one (bound methods, closures, partial functions, plain objects) is made again around the look-alikes, and so are
    containers. Compiled modules (TorchScript) are shared.

    Args:
        model: what to look at. It is only read.
        bases: classes of modules that are to look as they do without their state: the model's own grafted ones.
        left_out: modules that the shadow is to be without.

    Attributes:
        model: the look-alike of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        bases: Mapping[nn.Module, type[nn.Module]] | None = None,
        left_out: Collection[nn.Module] = (),
    ) -> None:
        gone = {id(module) for unit in left_out for module in unit.modules()}
        bases = bases or {}
        originals = [
            module
            for module in model.modules()
            if id(module) not in gone and not isinstance(module, torch.jit.ScriptModule)
        ]
        self._original = weakref.ref(model)
        self._originals = [weakref.ref(original) for original in originals]
        self._reachable = Reachable(originals)
        builder = _Builder(originals, bases, gone)
        self.model: nn.Module = builder.looks.get(id(model), model)
        self._read = builder.read

    def original(self, path: str) -> nn.Module:
        """Return the model's own module of that qualified name."""
        model = self._original()
        if model is None:
            raise ReferenceError("The model that was looked at is gone.")
        return model.get_submodule(path)

    def same_as(self, other: Shadow) -> bool:
        """Say whether the model was the same when two shadows of it were made.

        That is: the same modules with the same attributes, entry by entry and by identity; tensors that were not
        written to; code and globals of the modules' classes as they were. Modes of modules do not count: whoever looks
        sets them.
        """
        mine, theirs = self._originals, other._originals
        return (
            self._original() is other._original()
            and len(mine) == len(theirs)
            and all(map(_same_referent, mine, theirs))
            and len(self._read) == len(other._read)
            and all(map(_same, self._read, other._read))
            and not any(True for shadow in (self, other) for _ in shadow._reachable.changes())
        )


def _same_referent(one: weakref.ref[Any], other: weakref.ref[Any]) -> bool:
    return one() is other() is not None


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    # 0.0 and -0.0 are equal, and not the same.
    return (
        type(one) is type(other)
        and isinstance(one, (*_PLAIN, tuple))
        and one == other
        and repr(one) == repr(other)
    )


class _Builder:
    """Fills the look-alikes, and records everything that it reads of the model, in order."""

    def __init__(
        self, originals: list[nn.Module], bases: Mapping[nn.Module, type[nn.Module]], gone: set[int]
    ) -> None:
        self.gone = gone
        self.looks = {
            id(original): object.__new__(bases.get(original, type(original))) for original in originals
        }
        self.numbers = {id(original): number for number, original in enumerate(originals)}
        self.made: dict[int, tuple[Any, Any, int]] = {}
        self.read: list[Any] = [
            torch.get_default_dtype(),
            str(torch.get_default_device()),
            *sorted(map(str, get_notrace_functions())),
            *get_notrace_modules(),
        ]
        for original in originals:
            look = self.looks[id(original)]
            self.read += [type(look), getattr(type(look).forward, "__code__", type(look).forward)]
            self.fill(original, look.__dict__, bare=original in bases)

    def fill(self, module: nn.Module, own: dict[str, Any], bare: bool) -> None:
        for name, value in module.__dict__.items():
            if bare and name in (STATE, "forward"):  # a forward here is the grafted class's, bound
                continue
            if name == STATE:
                own[name] = value.with_units(lambda unit: self.looks.get(id(unit), unit))
                self.read.append(value)
            elif name == "training":
                own[name] = value
            elif name == "_modules":
                kept = {key: item for key, item in value.items() if id(item) not in self.gone}
                self.read += [name, *kept]
                own[name] = type(value)((key, self.look(item)) for key, item in kept.items())
            else:
                self.read.append(name)
                own[name] = self.look(value)

    def look(self, value: Any, depth: int = _DEPTH) -> Any:
        """Return what stands for a value in the shadow."""
        if isinstance(value, nn.Module):
            self.read.append(self.numbers.get(id(value), value))
            return self.looks.get(id(value), value)
        if isinstance(value, _LEAVES):
            self.read.append(value)
            if isinstance(value, Tensor):
                self.read += _content(value)
            return value
        if id(value) in self.made:
            _, made, number = self.made[id(value)]
            self.read.append(number)
            return made
        kind, number = type(value), len(self.read)
        if kind in _CONTAINERS:
            return self.container(value, depth)
        self.made[id(value)] = (value, value, number)  # it may lead back to itself
        made = self.other(value, kind, depth)
        self.made[id(value)] = (value, made, number)
        if made is value:
            self.note(value, depth)
        return made

    def note(self, value: Any, depth: int) -> None:
        """Record what a value shared with the model holds; where that cannot be known, it counts as changed."""
        self.read.append(value)
        if (
            isinstance(value, (*_FIXED, tuple)) or type(value) is object
        ):  # a tuple's entries are recorded already
            return
        kind = type(value)
        if kind is types.MethodType:
            held: list[Any] = [value.__func__, value.__self__]
        elif kind is functools.partial:
            held = [value.func, value.args, value.keywords]
        elif kind is weakref.ref:
            held = []
            self.read.append(id(value()))
        elif kind is types.FunctionType:
            self.read.append(value.__code__)
            held = [value.__defaults__, value.__kwdefaults__, *_cells(value), *value.__dict__.values()]
        elif type(getattr(value, "__dict__", None)) is dict and not _slotted(kind):
            held = list(vars(value).items())
        else:
            held = [object()]
        if not depth:
            held = [object()]
        for item in held:
            self.look(item, depth - 1)

    def container(self, value: Any, depth: int) -> Any:
        self.read += [type(value), len(value)]
        made = value.copy()
        self.made[id(value)] = (value, made, len(self.read))
        if isinstance(value, dict):
            for key, item in value.items():
                self.read.append(key)
                made[key] = self.look(item, depth)
            return made
        content = [self.look(item, depth) for item in value]
        made.clear()
        (made.update if isinstance(made, set) else made.extend)(content)
        return made

    def other(self, value: Any, kind: type, depth: int) -> Any:
        if isinstance(value, tuple):
            content = [self.look(item, depth) for item in value]
            if all(new is old for new, old in zip(content, value, strict=True)):
                return value
            return kind(*content) if hasattr(value, "_fields") else kind(content)
        if kind is weakref.ref:
            self.read.append(self.numbers.get(id(value())))
            known = self.looks.get(id(value()))
            return value if known is None else weakref.ref(known)
        if not depth or not self.reaches(value, depth):
            return value
        if kind is types.MethodType:
            self.read.append(value.__func__)
            return types.MethodType(value.__func__, self.look(value.__self__, depth - 1))
        if kind is functools.partial:
            args = [self.look(arg, depth - 1) for arg in value.args]
            named = {name: self.look(keyword, depth - 1) for name, keyword in value.keywords.items()}
            return functools.partial(self.look(value.func, depth - 1), *args, **named)
        if kind is types.FunctionType:
            return self.function(value, depth - 1)
        made = object.__new__(kind)
        self.made[id(value)] = (value, made, len(self.read))
        self.read.append(kind)
        for name, item in vars(value).items():
            self.read.append(name)
            made.__dict__[name] = self.look(item, depth - 1)
        return made

    def function(self, value: types.FunctionType, depth: int) -> types.FunctionType:
        cells = tuple(types.CellType(self.look(cell, depth)) for cell in _cells(value))
        defaults = (
            None
            if value.__defaults__ is None
            else tuple(self.look(default, depth) for default in value.__defaults__)
        )
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells or None)
        self.read += [value.__code__, value.__globals__]
        named = value.__kwdefaults__
        made.__kwdefaults__ = named and {name: self.look(default, depth) for name, default in named.items()}
        made.__dict__.update(value.__dict__)
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        made.__annotations__, made.__doc__ = value.__annotations__, value.__doc__
        return made

    def reaches(self, value: Any, depth: int) -> bool:
        """Say whether a module of the model can be reached through a value."""
        if isinstance(value, nn.Module):
            return id(value) in self.looks
        if isinstance(value, _LEAVES) or depth < 0:
            return False
        return any(self.reaches(part, depth - 1) for part in _parts(value))


def _content(tensor: Tensor) -> list[Any]:
    """List what tells whether a tensor, or its numbers, have changed since."""
    if is_lazy(tensor):  # without numbers or a shape as yet, and it answers nearly nothing else
        return [None, None, tensor.requires_grad, None, tensor.dtype]
    version = None if tensor.is_inference() else tensor._version
    shape = tuple(tensor.shape)
    return [version, shape, tensor.requires_grad, tensor.device.type, tensor.dtype]


def _cells(value: types.FunctionType) -> list[Any]:
    try:
        return [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # one that is not filled yet
        return []


def _parts(value: Any) -> Collection[Any]:
    """List what a value holds, if the value can be made again around other contents."""
    kind = type(value)
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, deque)):
        return value
    if kind is types.MethodType:
        return (value.__self__,)
    if kind is functools.partial:
        return (value.func, *value.args, *value.keywords.values())
    if kind is types.FunctionType:
        if len(_cells(value)) != len(value.__closure__ or ()):
            return ()
        return (*_cells(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__  # type: ignore[comparison-overlap]
    own = getattr(value, "__dict__", None)
    return own.values() if plain and type(own) is dict and not _slotted(kind) else ()


def _slotted(kind: type) -> bool:
    return any(vars(cls).get("__slots__") for cls in kind.__mro__)
