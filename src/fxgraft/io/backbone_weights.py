"""Weights of bare models in patched ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxgraft.errors import RecipeError
from fxgraft.graph.atomic import synchronized
from fxgraft.graph.grafting.lookup import grafts_on, own_keys, patched_parts, unwrapped
from fxgraft.graph.names import is_graft_key

M = TypeVar("M", bound=nn.Module)

WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names."""

SHOWN = 5
"""How many keys a message lists."""


class Weights:
    """The weights of a model as they are, to be put back should loading others fail half way.

    Args:
        model: any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = {
            key: value.detach().to("cpu", copy=True)
            for key, value in model.state_dict().items()
            if isinstance(value, Tensor)
        }

    def put_back(self, model: nn.Module) -> None:
        """Write them into the model, as far as it still has them."""
        for key, value in model.state_dict().items():
            if key in self._kept:
                value.detach().copy_(self._kept[key])


@synchronized
def load_backbone(model: M, state_dict: Mapping[str, Any]) -> M:
    """Load a checkpoint of the bare model into a patched one, in place.

    Every key of the bare model has to be there, and no other. What the grafts have added stays as it is, but for
    tensors that are made from the bare model's: MixMo's members from 1 on, and their offsets, start again from the
    loaded weights, as they do when the model is patched (the offsets are drawn from torch's generator). GAM's source
    network is a copy of the loaded weights where its game has not begun, and otherwise stays.

    Args:
        model: patched, wrapped or not, or with patched parts; a bare model is loaded as by ``load_state_dict``.
        state_dict: state dict of the bare model.

    Returns:
        The same model.

    Raises:
        RecipeError: it is no state dict, or keys are missing, unexpected, or of another shape; lists them. The model is
            then as it was.
    """
    inner = unwrapped(model)
    own = own_keys(inner)
    if not isinstance(state_dict, Mapping):
        raise RecipeError(
            f"load_backbone takes a state dict, got a {type(state_dict).__name__}.\n"
            "Read the file first: torch.load(path, weights_only=True), or safetensors.torch.load_file(path)."
        )
    stock = {key: value for key, value in inner.state_dict().items() if key not in own}
    misfit = differences(stock, state_dict)
    if misfit:
        raise RecipeError(
            f"The checkpoint is not that of a bare {inner._get_name()}: {misfit}.\n{_hint(stock, state_dict)}"
        )
    kept, random = Weights(inner), torch.get_rng_state()
    try:
        inner.load_state_dict(state_dict, strict=False)
        for part in patched_parts(inner).values():
            for graft in grafts_on(part):
                for unit in graft.units.values():
                    unit.restart(part)
    except BaseException:
        kept.put_back(inner)
        torch.set_rng_state(random)
        raise
    return model


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def differences(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """List what sets one state dict apart from another; empty where keys and shapes are the same.

    Args:
        wanted: the state dict of the model.
        given: the state dict of the checkpoint.
    """
    common = [key for key in wanted if key in given]
    kinds = {
        "missing": [key for key in wanted if key not in given],
        "unexpected": [key for key in given if key not in wanted],
        "of another shape": [
            f"{key} {_shape(given[key])} for {_shape(wanted[key])}"
            for key in common
            if _shape(given[key]) != _shape(wanted[key])
        ],
    }
    return "; ".join(
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', …' if len(keys) > SHOWN else ''}"
        for what, keys in kinds.items()
        if keys
    )


def _hint(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Say what the checkpoint may be instead."""
    unexpected = [key for key in given if key not in wanted]
    if any(map(is_graft_key, unexpected)):
        return "It is that of a patched model: patch this one alike, and call model.load_state_dict."
    if unexpected and all(key.startswith(WRAPPERS) for key in unexpected):
        return "It was saved with its wrapper: take the first part off its keys."
    if any(key in ("state_dict", "model", "state_dict_ema") for key in unexpected):
        return "The weights are one entry of what was saved: pass that."
    return "Build the model as it was built then (same name, num_classes and arguments)."
