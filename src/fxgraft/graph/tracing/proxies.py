"""Proxies that keep in-place operators in place.

torch.fx records ``x += y`` as ``x + y``: a rewritten forward would then make a new tensor where the model's own
code wrote to an old one, which costs memory and time, and others who hold the old one would not see the change.
Recorded as `operator.iadd`, it would be printed as ``x += y`` again, which changes ``x`` for good where it is a
number, as sizes are. So the operators are recorded as functions of this module, which fx prints as calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


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


class InPlaceProxy(fx.Proxy):
    """A proxy whose ``+=``, ``-=``, ``*=`` and ``/=`` stay in place, and which has a length where its tracer knows it.

    Their nodes are called "add" and so on, as torch.fx and torchvision's feature extraction call them.
    """

    def _in_place(self, function: Callable[[Any, Any], Any], other: Any) -> fx.Proxy:
        name = function.__name__.removeprefix("i")
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name=name)

    def __len__(self) -> int:
        length = getattr(self.tracer, "length", lambda _: None)(self)
        return super().__len__() if length is None else length

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(itruediv, other)
