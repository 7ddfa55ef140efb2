"""One unit and where it goes."""

from __future__ import annotations

from dataclasses import dataclass

from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.editing import Edit


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


def placements(
    owner: str, evaluation: Edit | None, training: Edit | None, key: str, unit: Unit
) -> list[Placement]:
    """Place a unit: once, unless it acts in both modes and their graphs name its site differently.

    Args:
        owner: the module to graft.
        evaluation: what to do there in evaluation; None where the unit does not act in it.
        training: likewise, in training.
        key: the unit's name within its graft.
        unit: the unit.
    """
    if evaluation == training and training is not None:
        return [Placement(owner, training, key, unit)]
    placed = []
    if training is not None:
        placed.append(Placement(owner, training, key, unit, evaluation=False))
    if evaluation is not None:
        placed.append(Placement(owner, evaluation, key, unit, training=False))
    return placed
