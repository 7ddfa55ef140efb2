"""Branches on shapes and dtypes: a trace takes them as the observed pass did, and its graph refuses other calls.

torch.fx stops at ``if x.shape[1] != self.channels: raise ...``, since a proxy has no shape. The recorded
calls have one. A branch on the numbers in a tensor stays untraceable: fake tensors have no numbers.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode

from fxgraft._torch import function_modes, pytree
from fxgraft.errors import BypassError


def held(condition: Any, taken: bool, where: str) -> None:
    """Raise unless a condition is what it was when its branch was traced.

    Args:
        condition: the condition of the branch, on the input of this call.
        taken: whether it held when the branch was traced.
        where: file, line and text of the branch.

    Raises:
        BypassError: it has changed, and the graph has only the other branch.
    """
    if bool(condition) is not taken:
        raise BypassError(
            f"A branch on shapes or dtypes goes another way for this input than it did when the model was patched: "
            f"{where}\nThe patched graph holds the one that was taken then.\n"
            "Patch with input_size=(C, H, W) of the images you train on, or bring images to the size and dtype that "
            "the model was patched for."
        )


has_side_effect(held)  # a check has no users, and torch.fx would drop it as dead code


_OF_AUTOGRAD = {"requires_grad", "is_leaf", "grad", "grad_fn", "retains_grad"}
"""Attributes of tensors that depend on whether gradients are computed."""


class Known:
    """The values of a trace that is being made, as far as they are known.

    Args:
        root: the module that is traced.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._values: dict[fx.Node, Any] = {}

    def note(self, node: fx.Node, value: Any) -> None:
        """Store the value of a node, whose tensors are fake."""
        self._values[node] = value

    def truth(self, node: fx.Node) -> bool | None:
        """Return the truth of a value computed from sizes and dtypes alone; None for any other value."""
        value = self._scalar(node)
        return None if value is None else bool(value)

    def length(self, node: fx.Node) -> int | None:
        """Return the length of a shape, or of a part of one; None for any other value."""
        value = self._scalar(node)
        return len(value) if isinstance(value, tuple) else None

    def device_type(self, node: fx.Node) -> str | None:
        """Return the type of device of a tensor; None where it is not known."""
        try:
            value = self._value(node)
        except Exception:  # as in `_scalar`
            return None
        return value.device.type if isinstance(value, Tensor) else None

    def _scalar(self, node: fx.Node) -> Any:
        try:
            value = self._value(node)
        except Exception:  # whatever cannot be computed from shapes alone is not known
            return None
        return None if isinstance(value, Tensor) else value

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    @torch.no_grad()
    def _computed(self, node: fx.Node) -> Any:
        if node.target is getattr and node.args[1] in _OF_AUTOGRAD:
            raise LookupError(node.name)  # the pass that was observed had no gradients
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._value)  # type: ignore[misc]
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            module = self._root.get_submodule(path)
            # Not by getattr, which makes proxies of parameters while torch.fx traces.
            return next(
                kind[name] for kind in (module._parameters, module._buffers, vars(module)) if name in kind
            )
        raise LookupError(node.name)


def user_line() -> str:
    """Name the line of the user's code that is being traced: the innermost that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "fxgraft/graph" not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def iadd(a: Any, b: Any) -> Any:
    """Return ``a`` after ``a += b``."""
    a += b
    return a


def isub(a: Any, b: Any) -> Any:
    """Return ``a`` after ``a -= b``."""
    a -= b
    return a


def imul(a: Any, b: Any) -> Any:
    """Return ``a`` after ``a *= b``."""
    a *= b
    return a


def itruediv(a: Any, b: Any) -> Any:
    """Return ``a`` after ``a /= b``."""
    a /= b
    return a


class _Sized:
    """A part of a proxy: its length, where its tracer knows it."""

    def __len__(self) -> int:
        length = getattr(self.tracer, "length", lambda _: None)(self)  # type: ignore[attr-defined]
        return super().__len__() if length is None else length  # type: ignore[misc]


class InPlaceProxy(_Sized, fx.Proxy):
    """A proxy whose ``+=``, ``-=``, ``*=`` and ``/=`` stay in place, and which has a length where its tracer knows it.

    Their nodes are called "add" and so on, as torch.fx and torchvision's feature extraction call them.
    """

    def _in_place(self, function: Callable[[Any, Any], Any], other: Any) -> fx.Proxy:
        name = function.__name__.removeprefix("i")
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name=name)

    def __getattr__(self, name: str) -> Any:
        return (_Device if name == "device" else _Attribute)(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        if self.node.op != "get_attr":
            raise TypeError(f"{type(self).__name__!r} object does not support item assignment")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(itruediv, other)


class _Attribute(_Sized, Attribute):
    """An attribute, such as a shape: ``*x.shape`` asks for its length."""


class _Device(_Attribute):
    """A device, whose ``type`` is text where the tracer knows it: contexts take no proxy for it."""

    def __getattr__(self, name: str) -> Any:
        kind = getattr(self.tracer, "device_type", lambda _: None)(self.root.node) if name == "type" else None
        return super().__getattr__(name) if kind is None else kind


class BakedBuffers(TorchFunctionMode):
    """Finds the constants that a trace computes from tensors of modules: tensors that aren't proxies while it runs.

    Args:
        modules: the modules that the trace opens.
        buffers: whether buffers are read as tensors. Tensors in plain attributes always are.
    """

    def __init__(self, modules: Iterable[nn.Module], buffers: bool) -> None:
        super().__init__()
        self._from: dict[int, set[tuple[nn.Module, str]]] = {}
        self._alive: list[Tensor] = []
        self._away = 0
        for module in modules:
            for name, value in (*(module._buffers.items() if buffers else ()), *vars(module).items()):
                if isinstance(value, Tensor) and not value.is_inference():
                    self._from.setdefault(id(value), set()).add((module, name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._away += 1  # a mode is off the stack while it acts
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._away -= 1
        sources = {
            origin for leaf in pytree.tree_leaves((args, kwargs)) for origin in self._from.get(id(leaf), ())
        }
        for leaf in pytree.tree_leaves(out) if sources else ():
            if isinstance(leaf, Tensor):
                self._from.setdefault(id(leaf), set()).update(sources)
                self._alive.append(leaf)
        return out

    def depth(self) -> int:
        """Count the torch function modes, with this one also while it acts and torch has it off the stack."""
        return function_modes() + self._away

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        """Return the mode, or a context that does nothing where there is nothing to find."""
        return self if self._from else contextlib.nullcontext()

    def sources(self, constants: Iterable[Any]) -> set[tuple[nn.Module, str]]:
        """Return the modules and names of the tensors that constants come from."""
        return {origin for value in constants for origin in self._from.get(id(value), ())}
