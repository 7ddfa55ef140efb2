"""What a graft inserts into a network."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxgraft.graph.grafting.passes import Context


class Unit(nn.Module):
    """What a graft inserts: a module called with the value at its site.

    A unit runs only in the graphs it was placed in, so it holds no branch on the mode. One with parameters
    or buffers is registered beside the module it serves, under a name that starts with ``graft_``; one
    without is not registered at all and leaves no trace in ``children()``.

    Attributes:
        context: the state of the model's current pass; set when the unit is placed.
        graft: the name of its graft.
        transient: attributes that are found again for every model, and do not travel with copies.
        replays: whether the graft runs the model again on the arguments of the last training pass.
        optional: whether calls of a part of the model may go around it, since others tell what then happens.
    """

    context: Context
    graft: str = ""
    transient: tuple[str, ...] = ()
    replays: bool = False
    optional: bool = False

    def set_progress(self, fraction: float) -> None:
        """Follow a schedule. Keep what depends on it in plain attributes: compiled code guards on those."""

    def installed(self, anatomy: Any) -> None:
        """Look at the model once all grafts are on it; called where some of them act in evaluation."""

    def stale(self, model: nn.Module) -> bool:
        """Say whether what the unit knows about ``model`` no longer holds, so that it must be planned again."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the model the unit sits in; it is set again when a copy is grafted."""
        return {k: v for k, v in self.__dict__.items() if k not in ("context", *self.transient)}

    @property
    def registered(self) -> bool:
        """Whether the unit holds tensors, and so belongs into the module tree."""
        return any(True for _ in self.parameters()) or any(True for _ in self.buffers())


class Capture(Unit):
    """Record the value at a site in the context of the pass and hand it on."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        self.context.values[self.key] = x
        return x
