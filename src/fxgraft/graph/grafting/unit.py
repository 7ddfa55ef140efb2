"""What a graft inserts into a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fxgraft.errors import BypassError, SiteError
from fxgraft.graph.grafting.forward_context import Context, ForwardContext


def recomputed() -> bool:
    """Say whether this runs within a backward pass, as what activation checkpointing runs again does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateImportUsage]


class Unit(nn.Module):
    """What a graft inserts: a module called with the value at its site.

    A unit runs only in the graphs it was placed in, so it holds no branch on the mode. One with parameters
    or buffers is registered beside the module it serves, under a name that starts with ``graft_``; one
    without is not registered at all and leaves no trace in ``children()``.

    Attributes:
        context: what the grafts of the model share; set when the unit is installed.
        graft: the name of its graft.
        optional: whether calls of a part of the model may go around it, since others tell what then happens.
        built_with: the whole numbers that the unit was built with, such as a width.
        restarts: bound in planning where the layer that the unit serves was replaced by one of other weights; once the
            plan is carried out, `restart` is called and what the unit had is reported as lost.
    """

    _fxgraft_unit: ClassVar[bool] = True  # `names.UNIT`: tracing, below, tells units by it

    context: Context
    graft: str = ""
    optional: bool = False
    built_with: tuple[int, ...] | None = None
    restarts: bool = False

    @property
    def current(self) -> ForwardContext | None:
        """The pass that is running in this thread; None outside of one (a part of the model called by itself)."""
        return self.context.current

    def running(self) -> ForwardContext:
        """Return the pass that is running in this thread.

        Raises:
            SiteError: there is none: a part of the model was called by itself.
            BypassError: there is none any more: activation checkpointing runs a part of the model again.
        """
        found = self.context.current
        if found is None:
            self.refuse_recomputation()
            raise SiteError(
                f"{self.graft!r} acts inside a pass of its model.\nCall the model, not its parts."
            )
        return found

    def refuse_recomputation(self) -> None:
        """Raise where activation checkpointing runs a part of the model again, in the backward pass.

        Raises:
            BypassError: it does; what the unit did in the pass is gone by then.
        """
        if recomputed():
            raise BypassError(
                f"{self.graft!r} acts inside a pass of its model, and activation checkpointing runs a part of it again "
                "when that pass is over: not as it ran before.\n"
                "Switch checkpointing off, or leave the part that the graft acts in out of it."
            )

    def bind(self, **found: Any) -> None:
        """Set attributes that are found again on every model: they do not travel with copies and pickles.

        Modules among them do not become children of the unit.
        """
        self.__dict__["_bound"] = tuple(dict.fromkeys((*self.__dict__.get("_bound", ()), *found)))
        self.__dict__.update(found)

    def bound(self) -> dict[str, Any]:
        """Return what `bind` has set."""
        return {name: self.__dict__[name] for name in self.__dict__.get("_bound", ())}

    def set_progress(self, fraction: float) -> None:
        """Follow a schedule. Keep what depends on it in plain attributes: compiled code guards on those."""

    def restart(self, model: nn.Module) -> None:
        """Take up new weights of the network, where tensors of the unit are made from them."""

    def counterparts(self) -> Mapping[str, str]:
        """Name the parameter of the model that each parameter of the unit is another one of, by qualified name.

        Rules for parameters that go by name then hold for both alike.
        """
        return {}

    def stale(self, model: nn.Module) -> bool:
        """Say whether what the unit knows about ``model`` no longer holds, so that it must be planned again."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the model the unit sits in; it is set again when a copy is grafted."""
        out = {"context", "_bound", *self.bound()}
        return {key: value for key, value in self.__dict__.items() if key not in out}

    @property
    def registered(self) -> bool:
        """Whether the unit holds tensors, and so belongs into the module tree."""
        return any(True for _ in self.parameters()) or any(True for _ in self.buffers())


class Capture(Unit):
    """Hands the value at a site to the other units of its graft, and on.

    Args:
        key: the name to hand it over by.
    """

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        run = self.current
        if run is not None:
            run.put(self.graft, self.key, x)
        return x
