"""Layers whose weight is made from other parameters before every call."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


def made_by_hooks(module: nn.Module) -> bool:
    """Say whether pruning, weight_norm or spectral_norm of `torch.nn.utils` makes the weight when the layer is called.

    Such a weight is an attribute that is only right within a call: written to, it is overwritten by the next one. Those
    of `torch.nn.utils.parametrizations` are right whenever they are read.
    """
    return any(isinstance(hook, _HOOKS) for hook in module._forward_pre_hooks.values())


def is_derived(module: nn.Module) -> bool:
    """Say whether a layer's weight is made from other parameters, in whichever way, so that it cannot be written."""
    return hasattr(module, "parametrizations") or made_by_hooks(module)


def sharers(model: nn.Module, module: nn.Module) -> Iterator[str]:
    """Name the other modules of a model that hold a parameter of this one."""
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    for name, other in model.named_modules():
        if other is not module and any(id(parameter) in own for parameter in other.parameters(recurse=False)):
            yield name
