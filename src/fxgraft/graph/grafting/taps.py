"""Taps: units that record the values at sites during a pass, for whoever fetches them after it.

A tap hands its value on as it is, so the network computes what it computes without it. What it records is the
value as the site gave it: where a later operation of the pass writes over it, the tap records a copy, and only
there. Copies are decided when a model is patched, for each mode, by `inplace.fates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxgraft._torch import pytree
from fxgraft.errors import BypassError, SiteError
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Make
from fxgraft.graph.grafting.inplace import Fate, fates
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.site import Site
from fxgraft.graph.tracing.observe import tensors


class Tap(Unit):
    """Records the value at a site in each pass of its model and hands it on.

    Outside a pass (a part of the model called by itself, a region recomputed in backward) and under
    ``torch.export`` it does nothing. Holds no parameters and no buffers.

    Args:
        key: the name its value is fetched by.
        detach: cut what is recorded off the graph, instead of letting gradients flow through it.
    """

    def __init__(self, key: str, detach: bool = False) -> None:
        super().__init__()
        self.key = key
        self.detach = detach
        self.copies: tuple[bool, bool] = (True, True)

    @property
    def slot(self) -> str:
        """The name its value stands under in a pass, which several grafts share."""
        return f"{self.graft}:{self.key}"

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        run = self.current
        recording = None if run is None else run.model_pass.recording
        if run is None or recording is None or torch.compiler.is_exporting():
            return x
        # By the mode of the whole model: where parts are frozen in evaluation mode, others still train.
        copied = self.copies[run.training]

        def kept(value: Tensor) -> Tensor:
            value = value.detach() if self.detach else value
            return value.clone() if copied else value

        # Containers are rebuilt: dense networks append to a list after they passed it on.
        value = kept(x) if isinstance(x, Tensor) else pytree.tree_map_only(Tensor, kept, x)
        watched = not copied and not torch.compiler.is_compiling()
        recording[self.slot] = (value, _versions(value) if watched else None)
        return x


def _versions(value: Any) -> tuple[int | None, ...]:
    """Count the writes to every tensor of a value; those made in inference mode are not counted."""
    return tuple(None if each.is_inference() else each._version for each in tensors(value))


def tap_placements(
    backbone: Backbone,
    make: Make,
    sites: Mapping[str, Site],
    detach: bool = False,
    copy: bool = False,
    kind: Callable[[str, bool], Tap] = Tap,
    learns: bool = True,
) -> list[Placement]:
    """Put a tap at every site, in training and in evaluation.

    Args:
        backbone: the bare model.
        make: the graft's maker of units; a tap's key is its site's key in ``sites``.
        sites: where to record, by the names to fetch the values by; see `Backbone.named_sites`.
        detach: cut what is recorded off the graph.
        copy: record a copy everywhere, also where nothing is seen to write over the value.
        kind: makes a tap from its key and ``detach``.
        learns: whether the model is ever trained; planning is faster where it is not.

    Raises:
        SiteError: a site that holds no tensor, that one mode does not reach, or where no unit can be placed.
        TraceError: a module that holds a site cannot be traced.
    """
    placed: list[Placement] = []
    for key, (evaluation, training) in fates(backbone.trace, sites, learns).items():
        _check(sites[key], evaluation, training)
        unit = make(key, kind, key, detach)
        unit.bind(copies=(copy or evaluation.overwritten, copy or training.overwritten))
        placed += backbone.place(sites[key], unit, key=key)
    return placed


def _check(site: Site, evaluation: Fate, training: Fate) -> None:
    for mode, fate in (("evaluation", evaluation), ("training", training)):
        if not fate.reached:
            raise SiteError(
                f"{site.name!r} is not reached in {mode} mode.\n"
                "There would be no value to record in such a pass.\n"
                "Name a site on the way from the image to the output; fxgraft.sites(model) lists them."
            )
        if fate.value is not None and not tensors(fate.value):
            raise SiteError(
                f"{site.name!r} holds no tensor in {mode} mode: {site.op} returns "
                f"{type(fate.value).__name__}.\nfxgraft.sites(model) shows what every layer returns."
            )


def take(units: Iterable[Unit]) -> dict[str, Any]:
    """Hand over what taps recorded in the last pass of their model, which keeps nothing of it.

    Args:
        units: taps of one model; other units are passed over.

    Returns:
        The values by the taps' keys, in their order: the tensor of a site, or its tuple, list or dictionary
        of tensors.

    Raises:
        BypassError: there was no pass since the values were last fetched, or the pass went past a site or wrote
            over its value. Nothing is handed over then.
    """
    taps = [unit for unit in units if isinstance(unit, Tap)]
    found: dict[str, Any] = {}
    for tap in taps:
        recorded = _recorded(tap)
        if recorded is None:
            raise BypassError(
                f"There is nothing to fetch from {tap.graft!r}: no pass of the model was made since the last time.\n"
                "Values are handed over once, so that the model keeps none of them alive.\n"
                "Call the model first; a pass that failed, of a DataParallel replica or of torch.export leaves nothing."
            )
        if tap.slot not in recorded:
            missing = [each.key for each in taps if each.slot not in recorded]
            raise BypassError(
                f"There is no value of {', '.join(map(repr, missing))}: the last pass did not reach it, or it was "
                "fetched already.\nA part of the model does not come by every site.\n"
                "Call the whole model, and fetch once."
            )
        value, versions = recorded[tap.slot]
        if versions is not None and versions != _versions(value):
            raise BypassError(
                f"The value of {tap.key!r} was written over in place after it was recorded.\n"
                "Nothing did so when the model was patched.\n"
                "Fetch before you write to it, patch again if a layer was made in-place since, or pass copy=True."
            )
        found[tap.key] = value
    for tap in taps:
        left = tap.context.left
        if left is not None and left.recorded is not None:
            left.recorded.pop(tap.slot)
            left.recorded = left.recorded or None
    return found


def _recorded(tap: Tap) -> dict[str, Any] | None:
    left = tap.context.left
    return None if left is None else left.recorded
