"""Places whose positions no prediction reads, since a class token alone goes on from there."""

from __future__ import annotations

from fxgraft.errors import FxgraftError, SiteError
from fxgraft.graph.structure.places import locate
from fxgraft.graph.structure.rest import span_to_output
from fxgraft.graph.structure.site import Site
from fxgraft.graph.structure.spot import Spot, spot_layout
from fxgraft.graph.structure.tokens import reads_prefix_only
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.editing import After, Edge
from fxgraft.graph.tracing.walks import downstream_of, upstream_of


def without_idle(anatomy: Anatomy, spots: list[Spot]) -> list[Spot]:
    """Leave out the places that nothing but a class token goes on from: a unit on the other tokens changes nothing.

    Args:
        anatomy: of the bare model.
        spots: in running order.

    Raises:
        SiteError: all of them are.
    """
    kept = list(spots)
    while kept and _is_idle(anatomy, kept[-1]):
        kept.pop()
    if spots and not kept:
        raise SiteError(
            f"Nothing that happens at {spots[-1].name!r} can change a prediction: the logits read its class token "
            "alone.\nChoose an earlier block, or build the model to pool by average (timm: global_pool='avg')."
        )
    return kept


def _is_idle(anatomy: Anatomy, spot: Spot) -> bool:
    if not isinstance(spot.edit, (After, Edge)):
        return False
    # At an edge only some users of a value get what the unit makes of it.
    names = spot.edit.users if isinstance(spot.edit, Edge) else (spot.edit.node,)
    try:
        prefix = spot_layout(anatomy, spot).prefix
        if not prefix:
            return False
        traced, start, logits, _ = span_to_output(anatomy, Site(spot.name, spot.owner, names[0]))
        nodes = [locate(anatomy, Site(spot.name, spot.owner, name), traced) for name in names]
    except FxgraftError:  # what cannot be followed to the output is believed
        return False
    reached = {*nodes, *(each for node in nodes for each in downstream_of(node))}
    inside = reached & (upstream_of(logits) | {logits})
    users = nodes if isinstance(spot.edit, Edge) else None
    return reads_prefix_only(anatomy.model, start, inside, prefix, users)
