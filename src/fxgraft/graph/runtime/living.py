"""The models alive that have grafts, and when modules were last put into others.

A loop asks in every step what is on a model, and a walk through all modules would make it pay for what is untouched.
So what was found once is kept, as long as nothing here has changed.
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
    """List a model among those that grafts are put on, where it stays as long as it lives."""
    global _patched
    with _writing:
        if not _patched:
            # No parent is known by its child, so there is no other way to see a model that has grafts being put into
            # another one. Programs that patch nothing do without it.
            register_module_module_registration_hook(_put_inside)
        others = [known for known in _patched if (each := known()) is not None and each is not model]
        _patched = (*others, weakref.ref(model))
    note_change()


def noted_models() -> list[nn.Module]:
    """List the models alive that grafts were ever put on, whether they are by themselves or inside of others."""
    return [model for known in _patched if (model := known()) is not None]


def note_change() -> None:
    """Let every model be looked through again by who asks for its grafts next."""
    global _last_change
    _last_change = object()


def last_change() -> object:
    """Return an object that is another one after a module was put into a module, or grafts onto one."""
    return _last_change


def _put_inside(_parent: nn.Module, _name: str, _child: nn.Module | None) -> None:
    if not torch.compiler.is_compiling():  # modules that compiled code makes are for its own use
        note_change()
