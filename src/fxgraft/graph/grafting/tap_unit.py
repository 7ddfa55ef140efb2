"""Taps: units that record the values at sites during a pass, for whoever fetches them after it.

A tap hands its value on as it is, so the network computes what it computes without it. What it records is the
value as the site gave it: where a later operation of the pass writes over it, the tap records a copy, and only
there. Copies are decided when a model is patched, for each mode, by `fates`: the model runs on fake tensors with
witnesses at the sites. Views and the tensors they are views of count their writes together, so a witness sees a write
through any of them, wherever it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxgraft._torch import pytree
from fxgraft.errors import BypassError, SiteError
from fxgraft.graph.atomic import restoring
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Make, Placer
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.planning import Look
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.site import Site
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import observe, tensors


@dataclass(frozen=True)
class Fate:
    """What happens to the value at a site in one mode.

    Attributes:
        value: the value, tensors fake; None where the mode could not be looked at.
        reached: whether the pass computes the value.
        overwritten: whether something writes into the value's memory after the site; where the mode could not
            be looked at, it may.
        repeated: whether the pass comes by the site more than once: inside a module that is called again.
    """

    value: Any = None
    reached: bool = True
    overwritten: bool = True
    repeated: bool = False


class _Witness(Unit):
    """Remembers every value that passes, and how often its tensors had been written to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, list[tuple[Tensor, int]]]] = []

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        self.seen.append((x, [(tensor, tensor._version) for tensor in tensors(x)]))
        return x

    def fate(self) -> Fate:
        """Return what happened to the values since, and forget them."""
        seen, self.seen = self.seen, []
        written = any(tensor._version != version for _, versions in seen for tensor, version in versions)
        return Fate(seen[-1][0] if seen else None, bool(seen), written, len(seen) > 1)


class _Witnesses(Placer):
    """A patch that only places witnesses."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites

    def place(self, backbone: Backbone, make: Make) -> list[Placement]:
        """Put one witness at every site, in both modes."""
        return [
            placement
            for key, site in self.sites.items()
            for placement in backbone.place(site, make(key, _Witness), key=key)
        ]


def fates(trace: ModelTrace, sites: Mapping[str, Site], learns: bool = True) -> dict[str, tuple[Fate, Fate]]:
    """Find out which values are overwritten after their site: one table for evaluation, one for training, by site key.

    Args:
        trace: the trace of the bare model. Its shadow is patched with witnesses for two fake passes, and left as it
            was.
        sites: where to look.
        learns: whether to look at training too, which doubles the time; otherwise every value may be overwritten there.

    Raises:
        SiteError: a site that no unit can be placed at.
        TraceError: a module that holds a site cannot be traced.
    """
    model = trace.model
    graft = Graft("witness", _Witnesses(sites), input_size=trace.input_size)
    registry = GraftRegistry()
    with restoring(lambda: registry.install(model, [])):
        registry.install(model, [graft], look=Look(trace.shadow, {trace.input_size: trace}))
        evaluation = _pass(trace, graft, training=False)
        training = _pass(trace, graft, training=True) if learns else dict.fromkeys(sites, Fate())
    return {key: (evaluation[key], training[key]) for key in sites}


def _pass(trace: ModelTrace, graft: Graft, training: bool) -> dict[str, Fate]:
    units = {key: unit for key, unit in graft.units.items() if isinstance(unit, _Witness)}
    try:
        observe(trace.model, trace.image_size, training=training)
    except Exception:
        # A model may need training inputs that aren't a batch of images. Then every value counts as overwritten.
        for unit in units.values():
            unit.seen.clear()
        return dict.fromkeys(units, Fate())
    return {key: unit.fate() for key, unit in units.items()}


class Tap(Unit):
    """Records the value at a site in each pass of its model and hands it on.

    Outside a pass (a part of the model called by itself, a region recomputed in backward) and under
    ``torch.export`` it does nothing. Holds no parameters and no buffers.

    Args:
        key: the name its value is fetched by.
        detach: cut what is recorded off the graph, instead of letting gradients flow through it.

    Attributes:
        copies: whether to record a copy, in evaluation and in training.
        repeated: whether a pass comes by more than once. What is recorded is then a tuple, of one value for each time.
    """

    def __init__(self, key: str, detach: bool = False) -> None:
        super().__init__()
        self.key = key
        self.detach = detach
        self.copies: tuple[bool, bool] = (True, True)
        self.repeated = False

    @property
    def slot(self) -> str:
        """The name of its value in a pass, unique among the grafts of the model."""
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
        if self.repeated:
            value = (*recording.get(self.slot, ((), None))[0], value)
        watched = not copied and not torch.compiler.is_compiling()
        recording[self.slot] = (value, _versions(value) if watched else None)
        return x


def _versions(value: Any) -> tuple[int | None, ...]:
    """Count the writes to every tensor of a value; those made in inference mode are not counted."""
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors(value))


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
        unit.bind(
            copies=(copy or evaluation.overwritten, copy or training.overwritten),
            repeated=evaluation.repeated or training.repeated,
        )
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
    """Return what taps recorded in the last pass of their model, and drop it there.

    Args:
        units: taps of one model; other units are passed over.

    Returns:
        The values by the taps' keys, in their order: the tensor of a site, or its tuple, list or dictionary
        of tensors; a tuple of these, one for each time, where a pass comes by the site more than once.

    Raises:
        BypassError: there was no pass since the values were last fetched, or the pass went past a site or wrote
            over its value. Nothing is handed over then.
    """
    taps = [unit for unit in units if isinstance(unit, Tap)]
    taken: dict[str, Any] = {}
    for tap in taps:
        recorded = _recorded(tap)
        if recorded is None:
            raise BypassError(
                f"There is nothing to fetch from {tap.graft!r}: no pass of the model was made since the last time.\n"
                "Values are handed over once, so that the model keeps none of them alive.\n"
                "Call the model first; a pass that failed, of a DataParallel replica or of torch.export leaves nothing."
            )
        if tap.slot not in recorded:
            missing = [wanted.key for wanted in taps if wanted.slot not in recorded]
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
        taken[tap.key] = value
    for tap in taps:
        left = tap.context.left
        if left is not None and left.recorded is not None:
            left.recorded.pop(tap.slot)
            left.recorded = left.recorded or None
    return taken


def _recorded(tap: Tap) -> dict[str, Any] | None:
    left = tap.context.left
    return None if left is None else left.recorded
