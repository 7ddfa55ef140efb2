"""Plans and summaries: what a patch would do to a model, and what its grafts do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from fxgraft.errors import ConfigError, MethodError
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.lookup import named_grafts
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.names import class_name
from fxgraft.patches.base import Patch, mean_of


@dataclass(frozen=True)
class Plan:
    """The plan of a patch: the result of ``patch(..., dry_run=True)``.

    Attributes:
        name: the graft's name.
        patch: its settings.
        actions: (module, what happens there, modes) of each unit.
        description: the method's own summary of it.
    """

    name: str
    patch: Patch
    actions: tuple[tuple[str, str, str], ...]
    description: str

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.description}".rstrip(": ")]
        lines += [f"  {owner or '(the model)'}: {what}, in {modes}" for owner, what, modes in self.actions]
        return "\n".join(lines)


def plan_of(graft: Graft, placed: Iterable[Placement]) -> Plan:
    """Describe what a graft would do by its placements."""
    return Plan(graft.name, graft.patch, tuple(map(_action, placed)), graft.patch.describe(graft))


def _action(placement: Placement) -> tuple[str, str, str]:
    edit = placement.edit
    entries = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)}
    fields = ", ".join(
        name if value is True else str(value) for name, value in entries.items() if value is not False
    )
    modes = [m for m, on in (("training", placement.training), ("evaluation", placement.evaluation)) if on]
    unit = type(placement.unit).__name__
    return (
        placement.owner,
        f"{unit} {type(edit).__name__.lower()}{f' {fields}' if fields else ''}",
        " and ".join(modes),
    )


@dataclass(frozen=True)
class GraftSummary:
    """A line of the summary: one graft of a model.

    Attributes:
        name: name of the graft, with the part's name before it where it is on a part.
        method: its name.
        options: those that are not at their defaults.
        where: what it does and where, in a line; of many units the first and the last are named.
        units: all of them.
        parameters: how many it has added.
        notes: what to look out for.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    where: str
    units: tuple[str, ...]
    parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """The grafts of a model, which print as a list or, in rich, as a table.

    Attributes:
        model: the class of the model.
        grafts: in the order in which they act.
    """

    model: str
    grafts: tuple[GraftSummary, ...]

    @property
    def rows(self) -> tuple[tuple[str, str, str, str, str], ...]:
        """The cells of the table: name, method, what it does, new parameters, notes."""
        return tuple(
            (graft.name, graft.method, graft.where, f"{graft.parameters:,}", ", ".join(graft.notes))
            for graft in self.grafts
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain dictionaries, lists, texts and numbers, as JSON and YAML hold them."""
        return {
            "model": self.model,
            "grafts": [
                {
                    **vars(graft),
                    "options": dict(graft.options),
                    "units": [*graft.units],
                    "notes": [*graft.notes],
                }
                for graft in self.grafts
            ],
        }

    @property
    def _head(self) -> str:
        count = len(self.grafts)
        return f"{self.model}: {count} graft{'s, in order of action' if count > 1 else ''}"

    def __rich__(self) -> Table:
        table = Table(title=self._head)
        for column in ("name", "method", "where", "parameters", "notes"):
            table.add_column(column)
        for row in self.rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        if not self.grafts:
            return f"{self.model}: no grafts"
        lines = [self._head]
        for name, method, where, parameters, notes in self.rows:
            lines.append(
                f"  {name} = {method}: {where}; {parameters} new parameters{f'; {notes}' if notes else ''}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def summary_of(model: nn.Module, grafts: Mapping[str, Graft], optimizers: Sequence[Any] = ()) -> Summary:
    """Describe the grafts of a model, by name.

    Args:
        model: the model.
        grafts: its grafts and those of its parts.
        optimizers: with ``param_groups``; which parameters of grafts they do not hold is noted. None: no notes.
    """
    held = _held(model, optimizers)
    summaries = []
    for name, graft in grafts.items():
        notes = []
        if graft.patch.needs_labels:
            notes.append("needs labels in training")
        if graft.patch.train_only:
            notes.append("absent in evaluation")
        notes += [f"{option} {_progress(graft)}" for option in graft.patch.schedules()]
        own = graft.parameters()
        trained = [p for p in own if p.requires_grad]
        left_out = [] if held is None else [p for p in trained if id(p) not in held]
        if left_out:
            which = (
                "parameters"
                if len(left_out) == len(trained)
                else f"{len(left_out)} of {len(trained)} parameters"
            )
            notes.append(
                f"{which} of it are not in the optimizer: build it after the patch, or add them to it"
            )
        options = {key: value for key, value in graft.patch.to_dict().items() if key != "method"}
        count = sum(p.numel() for p in own)
        where = graft.patch.describe(graft)
        made = GraftSummary(name, graft.patch.method, options, where, tuple(graft.units), count, tuple(notes))
        summaries.append(made)
    return Summary(class_name(model), tuple(summaries))


def _held(model: nn.Module, optimizers: Sequence[Any]) -> set[int] | None:
    """Return the identities of the parameters that optimizers hold; None where there is no optimizer.

    Raises:
        ConfigError: something else than an optimizer, or optimizers of another model.
    """
    if not optimizers:
        return None
    for optimizer in optimizers:
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise ConfigError(
                f"An optimizer has param_groups, and this {type(optimizer).__name__} has none.\n"
                "The summary compares the parameters in them with those of the grafts.\n"
                "Pass the optimizer, or several in a list: fxgraft.summary(model, [one, other])."
            )
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ConfigError(
            f"No parameter of this {class_name(model)} is in the optimizer.\n"
            "It was built for another model, or for parameters that were replaced since (by FSDP, by a copy).\n"
            "Pass the optimizer that trains this model."
        )
    return held


def _progress(graft: Graft) -> str:
    # A copy or what was loaded has the progress of its original.
    if graft.context is None or not (graft.context.progress_watch.fed or graft.context.progress):
        return "waits for fxgraft.set_progress, which was never called"
    return f"follows fxgraft.set_progress, now {graft.context.progress:g}"


def diagnostics(model: nn.Module) -> dict[str, float]:
    """Return what the grafts of a model did in its last training pass, as scalars for any logger.

    >>> import fxgraft, timm, torch
    >>> model = fxgraft.patch(timm.create_model("test_resnet", num_classes=4), "rsc")
    >>> out = model(torch.randn(8, 3, 96, 96), target=torch.arange(8) % 4)
    >>> for name, value in fxgraft.diagnostics(model).items():  # writer.add_scalar(name, value, step)
    ...     print(name, 0 < value < 1)
    rsc.muted True
    rsc.samples True

    A step computes nothing for this and waits for no device; this call does. Passes in evaluation leave it alone.
    What the names mean: ``fxgraft info METHOD``.

    Args:
        model: the model, as in `loss`: patched, wrapped (DistributedDataParallel, torch.compile), or with patched
            parts.

    Returns:
        Numbers by ``"<graft>.<name>"``, with the part's name before it where a graft is on a part:
        ``"backbone.rsc.muted"``. Empty before the first training pass; a graft that did nothing has no entries.

    Raises:
        MethodError: what a method returns isn't a dictionary of numbers.
    """
    scalars: dict[str, float] = {}
    for graft_name, graft in named_grafts(model).items():
        measured = graft.patch.diagnostics(graft)
        try:
            scalars |= {f"{graft_name}.{name}": mean_of([value]) for name, value in measured.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise MethodError(
                f"{type(graft.patch).__name__}.diagnostics returned {measured!r}.\n"
                "It returns a dictionary of numbers, or of tensors of which the mean is taken."
            ) from error
    return scalars
