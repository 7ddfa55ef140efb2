"""Presets: settings that authors published, by name, with the training that they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a published result was trained; None where the source does not say.

    Attributes:
        network: the network, and what it starts from.
        data: the data set, and how many pixels an image has.
        optimiser: the optimiser, with its learning rate.
        schedule: the schedule of the learning rate.
        epochs: how many.
        batch: images in a step.
        weight_decay: how much, on which parameters.
        augmentation: how images are changed in training.
        repetition: how often an image occurs in a batch.
        note: what else matters.

    Numbers of epochs count from 0.
    """

    network: str | None = None
    data: str | None = None
    optimiser: str | None = None
    schedule: str | None = None
    epochs: int | None = None
    batch: int | None = None
    weight_decay: str | None = None
    augmentation: str | None = None
    repetition: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        known = [(f.name.replace("_", " "), getattr(self, f.name)) for f in dataclasses.fields(self)]
        return "; ".join(f"{name}: {value}" for name, value in known if value is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """What a network is built of, as far as the places of a preset depend on it.

    Attributes:
        blocks: what the units are in: "residual blocks", "dense layers" or "convolutions".
        units: how many of them there are; None where the user chose among them.
        convolutions: number of convolutions in a block, without those of its shortcut; None where that cannot be told.
        groups: number of groups in the grouped convolutions of a block, 1 where there are none.
        instance_norm: whether there are blocks with an InstanceNorm.
    """

    blocks: str
    units: int | None
    convolutions: int | None = None
    groups: int = 1
    instance_norm: bool = False

    def __str__(self) -> str:
        parts = [self.blocks if self.units is None else f"{self.units} {self.blocks}"]
        if self.convolutions is not None:
            parts.append(f"of {self.convolutions} convolution{'' if self.convolutions == 1 else 's'}")
            parts += [f"in {self.groups} groups"] if self.groups > 1 else []
        return " ".join([*parts, *(["and InstanceNorm"] if self.instance_norm else [])])

    def like(self, other: Structure) -> bool:
        """Say whether another network is built so, where both say it."""
        mine, others = (dataclasses.astuple(preset) for preset in (self, other))
        return all(a == b for a, b in zip(mine, others, strict=True) if a is not None and b is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Options that authors published together.

    Attributes:
        name: what to pass as ``preset=``.
        options: options of the method; what the user gives wins over them.
        source: where they are from.
        training: how the result was trained. A patch changes the model alone, so the training loop has to follow this.
        needs: options without which the preset means nothing, and that only the user knows.
        structure: the structure of the network that it was published for; on one that is built otherwise
            `fxgraft.patch` warns.
    """

    name: str
    options: Mapping[str, Any]
    source: str
    training: Training = Training()
    needs: tuple[str, ...] = ()
    structure: Structure | None = None


def presets_by_name(*presets: Preset) -> Mapping[str, Preset]:
    """Return presets by their names, read-only, for `Patch.presets`."""
    return MappingProxyType({preset.name: preset for preset in presets})
