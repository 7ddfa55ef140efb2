"""In-place operations: which values of a model are written over later in the same pass.

Found by running the model once per mode on fake tensors with witnesses at the sites. Views and the tensors they
are views of count their writes together, so a witness sees a write through any of them, wherever it happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Make, Placer
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.planning import Look
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.site import Site
from fxgraft.graph.tracing.atomic import restoring
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import observe, tensors


@dataclass(frozen=True)
class Fate:
    """What happens to the value at a site in one mode.

    Attributes:
        value: the value, tensors fake; None where the mode could not be looked at.
        reached: whether the pass comes by.
        overwritten: whether something writes into the value's memory after the site; where the mode could not
            be looked at, it may.
    """

    value: Any = None
    reached: bool = True
    overwritten: bool = True


class _Witness(Unit):
    """Remembers every value that passes, and how often each tensor had been written to by then."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, list[tuple[Tensor, int]]]] = []

    def forward(self, x: Any) -> Any:
        """Return ``x`` as it is."""
        self.seen.append((x, [(tensor, tensor._version) for tensor in tensors(x)]))
        return x

    def fate(self) -> Fate:
        """Say what has become of what was seen, and forget it."""
        seen, self.seen = self.seen, []
        written = any(tensor._version != version for _, each in seen for tensor, version in each)
        return Fate(seen[-1][0] if seen else None, bool(seen), written)


class _Witnesses(Placer):
    """A patch of nothing but witnesses."""

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
    """Find out which values are written over after their site: (evaluation, training), by the keys of ``sites``.

    Args:
        trace: of the bare model. Its shadow is patched with witnesses for two fake passes, and left as it was.
        sites: where to look.
        learns: whether to look at training, which takes as long again; otherwise anything may happen there.

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
        # A model may train on what a fake batch of images is not; then every value counts as written over.
        for unit in units.values():
            unit.seen.clear()
        return dict.fromkeys(units, Fate())
    return {key: unit.fate() for key, unit in units.items()}
