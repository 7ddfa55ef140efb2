"""The base of methods that change whole maps in training, each of their units with a probability."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from fxgraft.errors import SiteError
from fxgraft.graph.grafting.backbone import Backbone
from fxgraft.graph.grafting.graft import Graft, Make
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.unit import PassView, Unit, recomputed
from fxgraft.graph.structure.layout import Layout
from fxgraft.graph.structure.site import Site
from fxgraft.graph.structure.sites import SiteSpec
from fxgraft.patches import draws
from fxgraft.patches.base import LayeredPatch
from fxgraft.patches.options import check_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapPatch(LayeredPatch):
    """Base of methods that change maps by those of the other images of the batch, in training.

    A method implements ``change`` and, for a default of its own, ``default_sites``. A batch of one, and at probability
    0 every batch, stays as it is and nothing is drawn; so does a part of the model that is called by itself.

    Args:
        layers: where, by name, glob or stage number. Default: where the method was published with units.
        layer: the same, for one.
        p: probability that a unit changes the maps of a pass; each draws for itself.
    """

    smallest_map: ClassVar[int] = 2
    measures = MappingProxyType({"on": "share of the units that acted"})
    train_only: ClassVar[bool] = True

    p: float = 0.5

    def __post_init__(self, layer: SiteSpec | None) -> None:
        super().__post_init__(layer)
        check_share(self, "p")

    def default_sites(self, backbone: Backbone) -> Iterable[Site]:
        """Return where units go without ``layers``, where there are maps; by default behind the last four stages."""
        return backbone.main_stages()

    def change(self, x: Tensor, run: PassView) -> Tensor:
        """Return maps (B, C, *positions) changed, B at least 2, shaped and typed as they are."""
        raise NotImplementedError

    def place(self, backbone: Backbone, make: Make) -> Iterator[list[Placement]]:
        """Put a unit at every site, for training alone."""
        layouts: dict[str, Layout] = {}
        if self.layers is None:
            sites = list(self.default_sites(backbone))
            for (
                site
            ) in sites:  # one that holds no maps or tokens of one image each is left out, if another is left
                with contextlib.suppress(SiteError):
                    layouts[site.name] = backbone.layout(site, places=True)
            sites = [site for site in sites if site.name in layouts] or sites
        else:
            sites = backbone.sites(self.layers)
        for site in backbone.read(sites):
            unit = make(site.name, MapUnit, self)
            unit.bind(layout=layouts.get(site.name) or backbone.layout(site, places=True))
            yield backbone.place(site, unit, evaluation=False)

    def describe(self, graft: Graft) -> str:
        """Say where the units are and how often they act."""
        return f"at {graft.where()}, each with probability {self.p:g}"


class MapUnit(Unit):
    """Lets a `MapPatch` change the maps at one site. Holds no parameters and no buffers."""

    layout: Layout

    def __init__(self, config: MapPatch) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Any:
        """Return ``x``, shaped as it is, changed if the unit is on in this pass."""
        config, layout, run = self.config, self.layout, self.current
        alone = run is None and not recomputed()  # a part of the model that is called by itself
        if alone or not config.p or x.shape[0] < 2:
            return x
        on = draws.coin(config.p, x.device)
        if run is not None:  # checkpointing, which runs a part of it again, draws the same again
            run.check_images_alone("Statistics of channels would count padding.", all_positions=True)
            run.measure("on", on)
        return draws.choose(on, lambda: layout.restore(x, config.change(layout.canonical(x), self.run)), x)
