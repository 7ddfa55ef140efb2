"""A spot: one place for a unit inside a block, and which dimension of its value holds channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fxgraft.errors import FxgraftError, SiteError
from fxgraft.graph.structure.layout import Layout, layout_of, named_layout
from fxgraft.graph.structure.places import site_edit, value_at
from fxgraft.graph.structure.site import Site
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.editing import Edit, Input


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

    @property
    def usable(self) -> bool:
        """Whether it holds maps or tokens of single instances, batch first, with more than one position."""
        value = self.value
        if value is None or value.ndim < 3 or not value.is_floating_point() or value.shape[0] != 2:
            return False
        return value[0].numel() > max(value.shape[1], value.shape[-1])


def direct_spot(anatomy: Anatomy, site: Site, position: str = "") -> Spot:
    """Make a spot of a site's own value."""
    owner, edit = site_edit(anatomy, site)
    value = value_at(anatomy, site)
    value = value if isinstance(value, Tensor) else None
    return Spot(site.name, position, owner, edit, edit, value, site.path, site.path or site.owner)


def spot_layout(anatomy: Anatomy, spot: Spot, name: str | None = None) -> Layout:
    """Find the layout at a spot, or check the one that the user names.

    Raises:
        SiteError: it cannot be told, or does not fit the value.
    """
    value = spot.value
    if value is None:
        raise SiteError(f"{spot.name!r} holds no tensor.\nfxgraft.sites(model) lists what there is.")
    owner_output = anatomy.observation.calls[spot.scope][0].output
    like_output = isinstance(owner_output, Tensor) and owner_output.shape == value.shape
    path = spot.path or (spot.scope if like_output else "")
    if name is None:
        if isinstance(spot.edit, Input):
            return Layout("NCHW")
        return _layout(anatomy, spot, value, path)
    return named_layout(anatomy, value, path, name, spot.name)


def _layout(anatomy: Anatomy, spot: Spot, value: Tensor, path: str) -> Layout:
    """Find the layout from the shape, else from what stays the same at the spot when the image grows."""
    known = layout_of(anatomy, value, path, strict=False)
    node = getattr(spot.edit, "node", None)
    if known is not None or node is None or value.ndim != 4:
        return known or layout_of(anatomy, value, path) or Layout("NCHW")
    try:
        other = anatomy.enlarged.values(spot.owner).get(node)
    except FxgraftError:  # a model of one fixed image size tells nothing this way
        other = None
    if isinstance(other, Tensor):
        same = [i for i in range(1, 4) if other.shape[i] == value.shape[i]]
        if same in ([1], [3]):
            return Layout("NCHW" if same == [1] else "NHWC")
    return _layout_by_layers(anatomy, spot.scope, value) or layout_of(anatomy, value, path) or Layout("NCHW")


def _layout_by_layers(anatomy: Anatomy, scope: str, value: Tensor) -> Layout | None:
    """Tell the layout from the first layer of a block that works on such a value: it knows its channels."""
    for path, calls in anatomy.observation.calls.items():
        module = anatomy.module(path)
        near = (*calls[0].args[:1], calls[0].output)
        if scope and not path.startswith(scope + "."):
            continue
        if any(isinstance(each, Tensor) and each.shape == value.shape for each in near):
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                return Layout("NCHW")
            if type(module) in (nn.Linear, nn.LayerNorm):
                return Layout("NHWC")
    return None
