"""Weights of bare models in patched ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxgraft.errors import WeightsError
from fxgraft.graph.grafting.lookup import grafts_on, own_keys, patched_parts, unwrapped
from fxgraft.graph.tracing.names import is_graft_key
from fxgraft.graph.tracing.whole import alone

M = TypeVar("M", bound=nn.Module)

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


@alone
def load_backbone(model: M, state_dict: Mapping[str, Any]) -> M:
    """Load a checkpoint of the bare model into a patched one, in place.

    Every key of the bare model has to be there, and no other. What the grafts have added stays as it is, but for
    tensors that are made from the bare model's: MixMo's members from 1 on, and their offsets, start anew from the
    loaded weights, as they do when the model is patched (the offsets are drawn from torch's generator). GAM's source
    network is one of its own and stays.

    Args:
        model: patched, wrapped or not, or with patched parts; a bare model is loaded as by ``load_state_dict``.
        state_dict: of the bare model.

    Returns:
        The same model.

    Raises:
        WeightsError: keys are missing, unexpected, or of another shape; lists them. The model is then as it was.
    """
    inner = unwrapped(model)
    present = inner.state_dict()
    stock = present.keys() - own_keys(inner)
    shapes = [key for key in stock & state_dict.keys() if _shape(present[key]) != _shape(state_dict[key])]
    _check(
        inner._get_name(),
        [key for key in present if key in stock and key not in state_dict],
        [key for key in state_dict if key not in stock],
        [f"{key} {_shape(state_dict[key])} for {_shape(present[key])}" for key in present if key in shapes],
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


def _check(model: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    """Raise unless all lists are empty; says what the checkpoint may be instead."""
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if not any(wrong.values()):
        return
    listed = "; ".join(
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', …' if len(keys) > SHOWN else ''}"
        for what, keys in wrong.items()
        if keys
    )
    if any(map(is_graft_key, unexpected)):
        hint = "It is that of a patched model: patch this one alike, and call model.load_state_dict."
    elif unexpected and all(key.startswith(("module.", "_orig_mod.")) for key in unexpected):
        hint = "It was saved with its wrapper: take the first part off its keys."
    elif any(key in ("state_dict", "model", "state_dict_ema") for key in unexpected):
        hint = "The weights are one entry of what was saved: pass that."
    else:
        hint = "Build the model as it was built then (same name, num_classes and arguments)."
    raise WeightsError(f"The checkpoint is not that of a bare {model}: {listed}.\n{hint}")
