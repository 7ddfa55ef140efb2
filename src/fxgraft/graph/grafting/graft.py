"""A patch on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxgraft.graph.grafting.unit import Unit


@dataclass
class Graft:
    """A patch on a model.

    Attributes:
        name: under which it can be taken off.
        patch: the settings, as given.
        units: what it inserted, by key.
        input_size: (C, H, W) that its sites were resolved at, None for the model's own.
    """

    name: str
    patch: Any
    units: dict[str, Unit] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters that the graft added, for an optimiser."""
        return [p for unit in self.units.values() for p in unit.parameters()]

    def make(self, key: str, build: Callable[[], Unit]) -> Unit:
        """Return the unit of that key, building it the first time."""
        if key not in self.units:
            self.units[key] = build()
        unit = self.units[key]
        unit.graft = self.name
        return unit

    def __repr__(self) -> str:
        return f"Graft({self.name!r}, {self.patch!r})"
