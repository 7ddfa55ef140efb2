"""What looking at a model must leave as it was: modes, attributes, random state, checkpointing."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from fxgraft.graph.tracing.whole import afterwards


@contextlib.contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every submodule on exit, one by one.

    ``model.train()`` on the way out would thaw a BatchNorm that the user froze in evaluation mode.
    """
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, flag in flags:
            if module.training is not flag:
                module.training = flag

    with afterwards(restore):
        yield


# What is registered, and what a graft keeps: no forward pass sets them, and planning anew may.
_LASTING = ("_modules", "_parameters", "_fxgraft")


@contextlib.contextmanager
def preserved_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back on exit whatever a forward pass sets on modules.

    Some keep what they computed once (attention biases, position grids). What they compute here is fake, or
    symbolic, and must not be found there by a pass that is not.
    """
    kept = []
    for module in modules:
        own = {k: v for k, v in module.__dict__.items() if k not in _LASTING}
        inner = {k: copy.copy(v) for k, v in own.items() if type(v) in (dict, list)}
        kept.append((module, own, inner))

    def restore() -> None:
        for module, own, inner in kept:
            for name in [k for k in module.__dict__ if k not in own and k not in _LASTING]:
                del module.__dict__[name]
            module.__dict__.update(own)
            for name, value in inner.items():
                if isinstance(value, dict):
                    own[name].clear()
                    own[name].update(value)
                else:
                    own[name][:] = value

    with afterwards(restore):
        yield


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global generators on exit: a trace executes the user's own Python code.

    They are the process's, so what other threads draw meanwhile is drawn again.
    """
    state = random.getstate()
    torch_state = torch.get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    cuda_states = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore() -> None:
        random.setstate(state)
        torch.set_rng_state(torch_state)
        for device, kept in cuda_states:
            torch.cuda.set_rng_state(kept, device)

    with afterwards(restore):
        yield


_CHECKPOINT_OPTIONS = (
    "use_reentrant",
    "context_fn",
    "determinism_check",
    "debug",
    "preserve_rng_state",
    "early_stop",
)


@contextlib.contextmanager
def replaced_checkpoint(run: Callable[..., Any]) -> Iterator[None]:
    """Route ``torch.utils.checkpoint.checkpoint`` to ``run(function, args, kwargs)`` for the time of the block.

    Only for calls from this thread: others go on checkpointing.
    """
    original = torch.utils.checkpoint.checkpoint
    here = threading.get_ident()

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return original(function, *args, **kwargs)
        for name in _CHECKPOINT_OPTIONS:
            kwargs.pop(name, None)
        return run(function, args, kwargs)

    def restore() -> None:
        torch.utils.checkpoint.checkpoint = original

    with afterwards(restore):
        torch.utils.checkpoint.checkpoint = checkpoint  # type: ignore[assignment]
        yield
