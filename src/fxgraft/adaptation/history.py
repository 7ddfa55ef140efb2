"""The record of an adaptation: losses and accuracies by step, and the warnings that they give rise to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import ConfigError, FxgraftWarning

WINDOW = 200
"""Steps over which a discriminator has to be perfect, or at chance, to be called collapsed."""
PERFECT, CHANCE = 0.995, 0.01


@dataclass
class AdaptationHistory:
    """The record of an adaptation, one value per step.

    Attributes:
        losses: "discriminator", "mapping" and the named parts of both.
        accuracy: share of samples that the discriminator of each tap told apart, by tap.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, list[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return max((len(values) for values in self.losses.values()), default=0)


class Recorder:
    """Collects the values of every step on their device, and reads many at once."""

    def __init__(self, history: AdaptationHistory, done: int) -> None:
        self.history, self.done = history, done
        self.pending: list[dict[str, Tensor]] = []
        self.warned: set[tuple[str, str]] = set()

    def add(self, game: Any) -> None:
        """Add the losses and accuracies of a step."""
        values = {"discriminator": game.discriminator, "mapping": game.mapping, **game.parts}
        named = {("losses", name): value for name, value in values.items()}
        named |= {("accuracy", name): value for name, value in game.accuracy.items()}
        self.pending.append({key: torch.as_tensor(value).detach() for key, value in named.items()})  # type: ignore[misc]

    def read(self) -> dict[str, float]:
        """Move what is pending into the history; return the latest values by name."""
        if self.pending:
            names = list(self.pending[0])
            dtypes = {value.dtype for value in self.pending[0].values()}
            dtype = reduce(
                torch.promote_types, dtypes, torch.float32
            )  # the losses of float64 networks as they are
            table = torch.stack([torch.stack([row[n].to(dtype) for n in names]) for row in self.pending])
            self.pending.clear()
            for row in table.tolist():
                self._note(dict(zip(names, row, strict=True)))  # type: ignore[arg-type]
        latest = {name: values[-1] for name, values in self.history.losses.items()}
        return latest | {f"accuracy.{tap}": values[-1] for tap, values in self.history.accuracy.items()}

    def _note(self, row: Mapping[tuple[str, str], float]) -> None:
        self.done += 1
        broken = [name for (_, name), value in row.items() if value - value != 0.0]
        if broken:
            # The sums are broken with any part; the part is what says where to look.
            parts = [name for name in broken if name not in ("discriminator", "mapping")] or broken
            raise ConfigError(
                f"Not finite in step {self.done}: {', '.join(map(repr, parts))}.\n"
                "The weights are spoilt from there on; a checkpoint holds those before.\n"
                "Look for images that aren't finite first. Otherwise try a lower lr, or "
                'matching="gaussian", which keeps the scale of what discriminators see.'
            )
        for (kind, name), value in row.items():
            getattr(self.history, kind).setdefault(name, []).append(value)
        for tap, values in self.history.accuracy.items():
            self._diagnose(tap, values[-WINDOW:])

    def _diagnose(self, tap: str, recent: list[float]) -> None:
        if len(recent) < WINDOW:
            return
        mean = sum(recent) / len(recent)
        if mean > PERFECT:
            what = "perfect: it always tells the two apart, and its loss hardly says how to get closer"
            hint = (
                'Try matching="gaussian", gan="lsgan", a lower lr for the discriminators, or a later layer.'
            )
        elif abs(mean - 0.5) < CHANCE:
            what = "at chance: it tells nothing apart, and the target network learns nothing from it"
            hint = "Either the activations match by now, or it does not learn: try a higher lr for it."
        else:
            return
        if (tap, what) in self.warned:
            return
        self.warned.add((tap, what))
        warnings.warn(
            f"The discriminator at {tap!r} was {what} (steps {self.done - WINDOW + 1} to {self.done}).\n{hint}",
            FxgraftWarning,
            stacklevel=5,
        )
