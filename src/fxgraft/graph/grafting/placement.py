"""One unit and where it goes."""

from __future__ import annotations

from dataclasses import dataclass

from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.editing import Edit


def both_modes(
    owner: str, edit: Edit, training_edit: Edit, key: str, unit: Unit, order: tuple[str, int] | None = None
) -> list[Placement]:
    """Place a unit that acts in both modes: once, unless the two graphs name its site differently."""
    if edit == training_edit:
        return [Placement(owner, edit, key, unit, order=order)]
    return [
        Placement(owner, training_edit, key, unit, evaluation=False, order=order),
        Placement(owner, edit, key, unit, training=False, order=order),
    ]


@dataclass(frozen=True)
class Placement:
    """One unit and where it goes.

    Attributes:
        owner: qualified name of the module whose graph or output is edited.
        edit: what to do there.
        key: the unit's name within its graft; a unit is kept under it when the model is planned again.
        unit: the unit.
        training, evaluation: the modes in which it acts.
        order: (group, rank): units of one group at one site run by rank, whichever graft was added first.
    """

    owner: str
    edit: Edit
    key: str
    unit: Unit
    training: bool = True
    evaluation: bool = True
    order: tuple[str, int] | None = None
