"""A spot: one place for a unit inside a block, and which dimension of its value holds channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxgraft.errors import SiteError
from fxgraft.graph.structure.layout import Layout, images_merged, layout_of, layout_of_value, named_layout
from fxgraft.graph.structure.locate import site_edit, value_at
from fxgraft.graph.structure.site import Site, places_in
from fxgraft.graph.tracing.editing import Edit, Input
from fxgraft.graph.tracing.model_trace import ModelTrace


@dataclass(frozen=True)
class Spot:
    """One place for a unit.

    Attributes:
        name: what to pass to ``layers=``, with the position where the name stands for several.
        position: which position of its block it is; "" for a named layer.
        owner: qualified name of the module to graft.
        edit, training_edit: what to do there in evaluation's and in the training graph.
        value: fake tensor found there, batch of 2; None where it is no tensor.
        path: the module whose output it is, or "".
        scope: qualified name of the block it belongs to.
        onward: the values that this one was joined from, as what runs after the block goes on using them: a unit
            that replaces the joined value has to hand its parts on there. Empty where nothing else uses them.
        kind: what the block is where it is no usual one, as a `Join` says; "" otherwise.
        left_out: how many joins were left out: their values have other rows than one per image, or a single position,
            or no prediction reads them.
    """

    name: str
    position: str
    owner: str
    edit: Edit
    training_edit: Edit
    value: Tensor | None
    path: str
    scope: str
    onward: tuple[Spot, ...] = ()
    kind: str = ""
    left_out: int = 0

    @property
    def usable(self) -> bool:
        """Whether it holds maps or tokens of single instances, batch first, with more than one position."""
        value = self.value
        if value is None or value.ndim < 3 or not value.is_floating_point() or value.shape[0] != 2:
            return False
        if images_merged(value):
            return False
        if layout_of_value(value) is not None:
            return places_in(value) > 1
        return value[0].numel() > max(value.shape[1], value.shape[-1])


def direct_spot(trace: ModelTrace, site: Site, position: str = "") -> Spot:
    """Make a spot of a site's own value."""
    owner, edit = site_edit(trace, site)
    value = value_at(trace, site)
    value = value if isinstance(value, Tensor) else None
    return Spot(site.name, position, owner, edit, edit, value, site.path, site.path or site.owner)


def spot_layout(trace: ModelTrace, spot: Spot, name: str | None = None) -> Layout:
    """Find the layout at a spot, or check the one that the user names.

    Raises:
        SiteError: it cannot be told, or does not fit the value.
    """
    value = spot.value
    if value is None:
        raise SiteError(f"{spot.name!r} holds no tensor.\nfxgraft.sites(model) lists what there is.")
    if name is not None:
        return named_layout(trace, value, spot.path, name, spot.name)
    if isinstance(spot.edit, Input) and value.ndim == 4:
        return Layout("NCHW")
    node = getattr(spot.edit, "node", None)
    again = None if node is None else lambda other: other.values(spot.owner).get(node)
    return layout_of(trace, value, spot.path, again=again) or Layout("NCHW")
