"""The living models that have grafts, and a mark that changes when a module is put into another one.

A training loop asks for the grafts of a model in every step. A walk through all modules would cost more the larger the
model is. So the answer is kept as long as nothing here has changed.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

# Replaced and never changed: threads that read them need no lock.
_patched: tuple[weakref.ref[nn.Module], ...] = ()
_last_change = object()
_writing = threading.Lock()


def note_patched(model: nn.Module) -> None:
    """Add a model to the list of patched ones, where it stays as long as it lives."""
    # On one line: an interruption between the last line and the release would leave the lock held for good.
    with _writing: _add(model)  # fmt: skip # noqa: E701
    note_change()


def _add(model: nn.Module) -> None:
    global _patched
    if not _patched:
        # A module doesn't know its parent, so only this hook shows that a patched model is put into another one.
        # It is set at the first patch: other programs don't pay for it.
        register_module_module_registration_hook(_put_inside)
    others = [known for known in _patched if (other := known()) is not None and other is not model]
    _patched = (*others, weakref.ref(model))


def noted_models() -> list[nn.Module]:
    """List all living models that were ever patched, by themselves or inside other models."""
    return [model for known in _patched if (model := known()) is not None]


def note_change() -> None:
    """Have every model searched again when its grafts are asked for next."""
    global _last_change
    _last_change = object()


def last_change() -> object:
    """Return a mark: a new object whenever a module was put into another one, or grafts were put on one."""
    return _last_change


def _put_inside(_parent: nn.Module, _name: str, _child: nn.Module | None) -> None:
    if not torch.compiler.is_compiling():  # torch.compile makes modules for itself
        note_change()
