"""What looking at a model must leave as it was: modes, attributes, random state, checkpointing."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn


@contextlib.contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every submodule on exit, one by one.

    ``model.train()`` on the way out would thaw a BatchNorm that the user froze in evaluation mode.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            if module.training is not flag:
                module.training = flag


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
    try:
        yield
    finally:
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


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the CPU generators on exit: a trace executes the user's own Python code."""
    state = random.getstate()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state)
        torch.set_rng_state(torch_state)


@contextlib.contextmanager
def replaced_checkpoint(run: Callable[..., Any]) -> Iterator[None]:
    """Route ``torch.utils.checkpoint.checkpoint`` to ``run(function, args, kwargs)`` for the time of the block."""
    original = torch.utils.checkpoint.checkpoint

    def checkpoint(
        function: Callable[..., Any],
        *args: Any,
        use_reentrant: bool | None = None,
        context_fn: Any = None,
        determinism_check: Any = None,
        debug: Any = None,
        preserve_rng_state: Any = None,
        early_stop: Any = None,
        **kwargs: Any,
    ) -> Any:
        return run(function, args, kwargs)

    torch.utils.checkpoint.checkpoint = checkpoint  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = original
