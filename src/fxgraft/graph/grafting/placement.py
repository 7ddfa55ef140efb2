"""Placements: one unit and the place where it acts, as an object and as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.structure.layout import Layout
from fxgraft.graph.tracing.editing import Edge, Edit

if TYPE_CHECKING:
    from fxgraft.graph.grafting.graft import Graft

Placed: TypeAlias = "list[tuple[Graft, Placement]]"
"""Placements with their grafts, in the order in which they act."""

_EDITS = {kind.__name__: kind for kind in get_args(Edit)}


@dataclass(frozen=True)
class Placement:
    """One unit and where it goes.

    Attributes:
        owner: qualified name of the module whose graph or output is edited.
        edit: what to do there.
        key: the unit's name within its graft; a unit is kept under it when the model is planned again.
        unit: the unit.
        training, evaluation: the modes in which it acts.
    """

    owner: str
    edit: Edit
    key: str
    unit: Unit
    training: bool = True
    evaluation: bool = True


@dataclass(frozen=True)
class PlacementRecord:
    """A placement as data, by which a copy of a model repeats those of its original.

    Attributes:
        graft: the graft's name.
        unit: the unit's key among those of its graft.
        owner, edit, key, training, evaluation: of the `Placement`.
        bound: the plain values and layouts that were set by `Unit.bind`.
        whole: whether `Unit.bind` set nothing else, so that the unit can be placed without a search.
    """

    graft: str
    unit: str
    owner: str
    edit: Edit
    key: str
    training: bool
    evaluation: bool
    bound: Mapping[str, Any] = field(default_factory=dict, compare=False)
    whole: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, graft: str, placement: Placement, keys: Mapping[int, str]) -> PlacementRecord:
        """Make the record of a placement.

        Args:
            graft: the graft's name.
            placement: the placement of one of its units.
            keys: keys of the graft's units, by the identity of the unit.
        """
        p = placement
        known = p.unit.bound()
        bound = {name: value for name, value in known.items() if isinstance(value, Layout) or is_plain(value)}
        place = (p.owner, p.edit, p.key, p.training, p.evaluation)
        return cls(graft, keys[id(p.unit)], *place, bound, len(bound) == len(known))

    def placement(self, unit: Unit) -> Placement:
        """Make the placement of a unit from the record."""
        return Placement(self.owner, self.edit, self.key, unit, self.training, self.evaluation)

    def as_data(self) -> dict[str, Any]:
        """Return the record as data for JSON."""
        edit = {"kind": type(self.edit).__name__, **asdict(self.edit)}
        bound = {name: vars(v) if isinstance(v, Layout) else v for name, v in self.bound.items()}
        return {**vars(self), "edit": edit, "bound": bound}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> PlacementRecord:
        """Read what `as_data` returned.

        Raises:
            Exception: the data is something else.
        """
        edit = dict(data["edit"])
        kind = _EDITS[edit.pop("kind")]
        edit = {name: tuple(value) if isinstance(value, list) else value for name, value in edit.items()}
        bound = {name: Layout(**v) if isinstance(v, dict) else v for name, v in data["bound"].items()}
        return cls(**{**data, "edit": kind(**edit), "bound": bound})


def is_plain(value: Any) -> bool:
    """Say whether a value is a number, a text, None, or a list of those."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def by_rank(placed: Placed) -> None:
    """Sort the placements of one group at one site by rank; everything else stays where it is."""
    groups: dict[Any, list[int]] = {}
    for index, (graft, placement) in enumerate(placed):
        if graft.patch.order is not None:
            groups.setdefault((placement.edit, graft.patch.order[0]), []).append(index)
    for slots in groups.values():
        ranked = sorted((placed[i] for i in slots), key=_rank)
        for slot, edit in zip(slots, ranked, strict=True):
            placed[slot] = edit


def by_edge(placed: Placed) -> Placed:
    """Sort units on the edges of one value by edge, where several grafts act on exactly the same edges.

    Every edge then has one chain of calls. Sorted by graft, the unit of the second graft would be called once for every
    user of the value, since each user has got another unit of the first graft by then: of densely connected blocks,
    whose values have as many users as there are layers, the graph would grow with the third power of that.

    Args:
        placed: the placements that act in one mode.
    """
    values: dict[str, list[int]] = {}
    for index, (_, placement) in enumerate(placed):
        if isinstance(placement.edit, Edge):
            values.setdefault(placement.edit.node, []).append(index)
    ordered = list(placed)
    for slots in values.values():
        edges: dict[str, list[Edit]] = {}
        for index in slots:
            graft, placement = placed[index]
            edges.setdefault(graft.name, []).append(placement.edit)
        first, *others = edges.values()
        if not others or any(other != first for other in others):
            continue
        number = {edit: index for index, edit in reversed(list(enumerate(first)))}
        ranked = sorted(slots, key=lambda index: number[placed[index][1].edit])
        for slot, index in zip(slots, ranked, strict=True):
            ordered[slot] = placed[index]
    return ordered


def _rank(placed: tuple[Graft, Placement]) -> int:
    order = placed[0].patch.order
    return 0 if order is None else order[1]
