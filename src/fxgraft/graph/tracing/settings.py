"""What decides, beyond its class, what a module computes: attributes, hooks, and a forward set on the instance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxgraft._torch import (
    GLOBAL_BACKWARD_HOOKS,
    GLOBAL_BACKWARD_PRE_HOOKS,
    GLOBAL_FORWARD_HOOKS,
    GLOBAL_FORWARD_HOOKS_WITH_KWARGS,
    GLOBAL_FORWARD_PRE_HOOKS,
)
from fxgraft.graph.tracing.reads import Code, Elsewhere, Mode, attribute, same

_ONLY_LOOK = ("torch.utils.", "torch.distributed.fsdp", "torch.distributed._composable")
"""Where hooks are from that change no value: they count, shard, gather or recompute."""


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """Collect the attributes of a module that is not traced which its Python code may branch on.

    ``training`` is left out, since there is a graph for each mode, and so is PyTorch's own note on hooks.
    """
    kinds = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in ("training", "_is_full_backward_hook")
        and (
            isinstance(value, kinds)
            or (isinstance(value, tuple) and all(isinstance(v, kinds) for v in value))
        )
    }


def settings_changed(root: nn.Module, kept: Mapping[str, Mapping[str, Any]], memo: dict[int, Any]) -> bool:
    """Say whether anything that a trace read of modules and their code has changed.

    Args:
        root: the module whose forward was traced.
        kept: for each module, by its path from the root, what its attributes held, or how to compare it.
        memo: what was compared before, with the same result.
    """
    for path, settings in kept.items():
        try:
            module = root.get_submodule(path) if path else root
        except AttributeError:  # it was removed
            return True
        for name, value in settings.items():
            if isinstance(value, (Baked, OnDevice, Elsewhere, Mode, Code)):
                if value.changed(module, root, memo):
                    return True
            elif not same(value, attribute(module, name), memo):
                return True
    return False


@dataclass(frozen=True)
class Baked:
    """A tensor of a module whose numbers are part of a trace's constants.

    Attributes:
        name: the name of the buffer or attribute.
        version: the version of its numbers, as `tensor_version` gives it.
    """

    name: str
    version: Any

    def changed(self, module: nn.Module, root: nn.Module, memo: dict[int, Any]) -> bool:
        """Say whether the numbers may have changed."""
        return tensor_version(module, self.name) != self.version


@dataclass(frozen=True)
class OnDevice:
    """The type of device that a forward was traced on, kept where the forward reads it."""

    kind: str

    def changed(self, module: nn.Module, root: nn.Module, memo: dict[int, Any]) -> bool:
        """Say whether the module is on another by now."""
        tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
        return tensor is not None and tensor.device.type != self.kind


def tensor_version(module: nn.Module, name: str) -> Any:
    """Return a value that changes whenever the numbers of a module's tensor do."""
    tensor = module._buffers.get(name, vars(module).get(name))
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        return None
    return id(tensor), tensor._version


def acted_on(module: nn.Module) -> bool:
    """Say whether a call of a module runs more than the forward of its class.

    It does with hooks, forward or backward, of the module or of all modules, and with a forward or ``__call__`` set on
    the instance. Whether a hook changes a value cannot be known. Hooks of torch's own tools that never do don't count.
    """
    hooks = (
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        GLOBAL_FORWARD_PRE_HOOKS,
        GLOBAL_BACKWARD_HOOKS,
        GLOBAL_BACKWARD_PRE_HOOKS,
    )
    return (
        "forward" in module.__dict__
        or type(module).__call__ is not nn.Module.__call__
        or output_hooked(module)
        or any(_counts(hook) for registered in hooks for hook in registered.values())
    )


def input_hooked(module: nn.Module) -> bool:
    """Say whether a call of the module runs forward pre-hooks, of the module or of all modules."""
    return any(_counts(hook) for _, hook in _pre_hooks(module))


def output_hooked(module: nn.Module) -> bool:
    """Say whether a call of the module runs forward hooks, of the module or of all modules."""
    return any(_counts(hook) for _, hook in _hooks(module))


def hooked_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as the module's forward pre-hooks leave them, as `torch.nn.Module` does it."""
    for key, hook in _pre_hooks(module):
        if not _counts(hook):
            continue
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            continue
        changed = hook(module, args)
        if changed is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def hooked_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Return what a call returned as the module's forward hooks leave it, as `torch.nn.Module` does it."""
    named = (GLOBAL_FORWARD_HOOKS_WITH_KWARGS, module._forward_hooks_with_kwargs)
    for key, hook in _hooks(module):
        if not _counts(hook):
            continue
        full = any(key in options for options in named)
        changed = hook(module, args, kwargs, out) if full else hook(module, args, out)
        out = out if changed is None else changed
    return out


def _pre_hooks(module: nn.Module) -> list[tuple[int, Any]]:
    return [*GLOBAL_FORWARD_PRE_HOOKS.items(), *module._forward_pre_hooks.items()]


def _hooks(module: nn.Module) -> list[tuple[int, Any]]:
    return [*GLOBAL_FORWARD_HOOKS.items(), *module._forward_hooks.items()]


def _counts(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(_ONLY_LOOK)
