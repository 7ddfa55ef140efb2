"""Refuses a model that something has wrapped already, as DDP or torch.compile do: patch first, wrap after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxgraft._torch import OpOverload
from fxgraft.errors import WrappedModelError, no_module

_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "DataParallel": "DataParallel",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP2 (fully_shard)",
    "OptimizedModule": "torch.compile",
    "ScriptModule": "TorchScript",
}


_AROUND = frozenset({"DistributedDataParallel", "DataParallel", "OptimizedModule"})
"""Those that are a module of their own, whose one child is the model."""


def _wrapper(module: nn.Module) -> str | None:
    return next((_WRAPPERS[c.__name__] for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)


def without_wrappers(model: Any) -> nn.Module:
    """Return the model inside of what is wrapped around it.

    Raises:
        WrappedModelError: it is no model, or one of TorchScript, which holds none.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        check_model(model)
    while any(c.__name__ in _AROUND for c in type(model).__mro__) and len(model._modules) == 1:
        model = next(iter(model._modules.values()))
    return model


def check_model(model: Any) -> None:
    """Raise unless the model can be patched: a plain module that nothing has wrapped yet."""
    if not isinstance(model, nn.Module):
        if type(model).__name__ == "ExportedProgram":
            raise WrappedModelError(
                "The model is an exported program, whose graph is fixed.\nPatch the model first, export after."
            )
        raise no_module(model)
    for path, module in model.named_modules():
        wrapper = _wrapper(module)
        if wrapper is None and module._compiled_call_impl is not None:
            wrapper = "module.compile()"
        nodes = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
        if wrapper is None and any(isinstance(node.target, OpOverload) for node in nodes):
            wrapper = "torch.export"
        if wrapper is not None:
            where = f"its part {path!r}" if path else "it"
            raise WrappedModelError(
                f"{model._get_name()} cannot be patched: {where} is already wrapped by {wrapper}.\n"
                "The wrapper has taken hold of the bare forward, parameters and hooks, and would miss the patch.\n"
                "Patch first, wrap after."
            )
