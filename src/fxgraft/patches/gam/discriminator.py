"""Discriminators: small networks that tell the activations of two domains apart, position by position."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.extend import ConfigError, preserved_modes

Activation = Literal["relu", "leaky"]


class Discriminator(nn.Module):
    """Layers over the channels: an MLP for vectors, 1×1 convolutions for maps, the same for tokens.

    By default two hidden layers of 500, as Huang, Huang and Krähenbühl (ECCV 2018) use. On maps and tokens
    there is one decision for every position.

    Args:
        channels: number of channels of the activation.
        outputs: numbers per decision.
        positions: how many dimensions follow the channels where these are dimension 1: 3 for (B, C, D, H, W), 2
            for (B, C, H, W), 1 for (B, C, L); 0 where channels are the last dimension, as in vectors, tokens and
            (B, H, W, C).
        hidden: width of the two hidden layers.
        activation: "relu", as the authors' scripts ask for, or "leaky" (slope 0.1), their code's default.
    """

    def __init__(
        self,
        channels: int,
        outputs: int = 2,
        positions: int = 0,
        *,
        hidden: int = 500,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.activation = activation
        widths = [channels, hidden, hidden, outputs]
        made: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            if positions == 0:
                made.append(nn.Linear(inner, outer))
            else:
                made.append((nn.Conv1d, nn.Conv2d, nn.Conv3d)[positions - 1](inner, outer, 1))
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        """Return the decisions: shaped as ``x``, with ``outputs`` in place of its channels."""
        for layer in self.layers[:-1]:
            x = layer(x)
            x = F.relu(x) if self.activation == "relu" else F.leaky_relu(x, 0.1)
        return self.layers[-1](x)

    def extra_repr(self) -> str:
        """Show the activation."""
        return f"activation={self.activation!r}"


@torch.no_grad()
def _tried(module: nn.Module, value: Tensor) -> Any:
    with preserved_modes(module):
        module.eval()
        return module(value)


def check_discriminator(module: Any, value: Tensor, outputs: int, dim: int, name: str) -> None:
    """Raise unless a module makes decisions about a value.

    Args:
        module: the discriminator, on the device and in the dtype of ``value``; it is run once.
        value: (B, ...), real or fake.
        outputs: numbers per decision.
        dim: the dimension of the channels in ``value``, 1 or -1; also of the numbers of a decision, unless it is (B,
            K).
        name: name of the tap, for messages.

    Raises:
        ConfigError: it isn't a module, does not run, or returns another shape.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"The discriminator for {name!r} must be a torch.nn.Module, got {module!r}.\n"
            "What discriminator= names is called with the shape of a tap, and has to return one."
        )
    try:
        decisions = _tried(module, value)
    except Exception as error:
        raise ConfigError(
            f"The discriminator for {name!r} does not take a value of shape {tuple(value.shape)}: {error}\n"
            f"Build it for the shape without the batch, {tuple(value.shape[1:])}."
        ) from error
    shaped = isinstance(decisions, Tensor) and decisions.ndim > 1 and decisions.shape[0] == value.shape[0]
    if not shaped or decisions.shape[1 if decisions.ndim == 2 else dim] != outputs:
        shape = tuple(decisions.shape) if isinstance(decisions, Tensor) else type(decisions).__name__
        raise ConfigError(
            f"The discriminator for {name!r} returns {shape} for a value of shape {tuple(value.shape)}.\n"
            f"A decision has {outputs} number(s) here.\n"
            f"Return (B, {outputs}), or {outputs} in place of the channels for one decision per position."
        )


class ByTap(nn.ModuleDict):
    """Modules by the name of a tap, which may contain dots."""

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(self._key(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(self._key(key), module)

    def __contains__(self, key: str) -> bool:
        return super().__contains__(self._key(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:  # type: ignore[override]
        """List the names of the taps."""
        return [key.replace("/", ".") for key in self._modules]

    def items(self) -> list[tuple[str, nn.Module]]:  # type: ignore[override]
        """List (name of the tap, module)."""
        return list(zip(self.keys(), self.values(), strict=True))
