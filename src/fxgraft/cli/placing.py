"""Where each method would go on a model: ``fxgraft suggest``, and the marks of ``fxgraft sites``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fxgraft.cli.method_facts import measured_costs
from fxgraft.errors import FxgraftError, StructureError
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.graft_registry import GraftRegistry
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.planning import plan
from fxgraft.graph.names import class_name, join
from fxgraft.graph.structure.layout import layout_of
from fxgraft.graph.structure.site import Site, Sites
from fxgraft.graph.structure.sites import list_sites
from fxgraft.graph.structure.stages import stages
from fxgraft.graph.tracing.editing import Input, Output, Span
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import tensors
from fxgraft.graph.tracing.preserve import preserved_random_state
from fxgraft.patches.registry import build, methods

NOTHING = frozenset((
    "Identity", "Dropout", "Dropout1d", "Dropout2d", "AlphaDropout", "DropPath", "DropBlock2d", "PatchDropout",
    "StochasticDepth", "Flatten", "Unflatten", "dropout", "getitem", "getattr", "reshape", "view", "flatten", "permute",
    "transpose", "expand", "contiguous", "unsqueeze", "squeeze", "chunk", "split", "unbind", "to", "detach",
))  # fmt: skip
"""Modules and functions that compute nothing in evaluation: they pass values on, or look at them in another shape."""

LOW, MEDIUM = 1.1, 1.5
"""Times of a pass, as multiples of the bare network's, below which a cost is low, and medium."""


@dataclass(frozen=True)
class Suggestion:
    """What a method would be on a model with its default options.

    Attributes:
        method: its name.
        sites: names of the sites that its units act at; "" stands for the model's input or output.
        maps: positions of the value at each of these sites, (H, W) or (tokens,); () where it has none.
        parameters: how many the method adds.
        cost: "low", "medium", "high", or "not measured".
        measured: times of a training step and of evaluation, as multiples of a bare ResNet-50's; empty where nobody
            has measured them.
        advised: whether it goes on the model, at maps that are large enough for it.
        reason: why it isn't advised, or what has to be said first; '' otherwise.
    """

    method: str
    sites: tuple[str, ...]
    maps: tuple[tuple[int, ...], ...]
    parameters: int
    cost: str
    measured: Mapping[str, float]
    advised: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


class Placing:
    """Asks every method where it would go on one model.

    Args:
        model: bare; it is left as it is.
        input_size: (C, H, W) of the images; None for the model's own.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, ...] | None = None) -> None:
        self.model, self.input_size = model, input_size
        self._registry, self._costs = GraftRegistry(), measured_costs()
        self._look, _ = self._registry.look(model)
        self.trace: ModelTrace = self._look.trace(input_size)
        with preserved_random_state():
            self.sites = list_sites(self.trace)
        self._by_name = {site.name: site for site in self.sites}

    def suggestions(self) -> list[Suggestion]:
        """Return what each method would be on the model, in the order of their names."""
        return [self.suggestion(name) for name in methods()]

    def suggestion(self, name: str) -> Suggestion:
        """Return what one method would be on the model."""
        method = methods()[name]
        graft = Graft(name, build(name, method.example), input_size=self.input_size)
        measured = self._costs.get(name, {})
        worst = max(measured.values(), default=0.0)
        cost = "low" if worst < LOW else "medium" if worst < MEDIUM else "high"
        price: dict[str, Any] = {"cost": cost if measured else "not measured", "measured": measured}
        try:
            with preserved_random_state():
                planned = plan(
                    self.model, [graft], self._look, self._registry, self._registry.context
                ).placed(graft)
        except FxgraftError as error:
            reason = str(error).partition("\n")[0]
            return Suggestion(name, (), (), 0, **price, advised=False, reason=reason)
        places = list(dict.fromkeys(self._site(placement) for placement in planned))
        maps = [self._positions(place) for place in places]
        least = method.smallest_map
        small = {
            place: size for place, size in zip(places, maps, strict=True) if size and _side(size) < least
        }
        reason = ""
        if small:
            smallest = min(small.values(), key=_side)
            reason = (
                f"maps of {_size(smallest)} at {first_to_last(list(small))}; it wants {least}×{least} or more"
            )
        elif method.example:
            needed = ", ".join(f"{key}=" for key in method.example)
            reason = f"you say where, as {needed}; here with {_options(method.example)}"
        count = sum(parameter.numel() for parameter in graft.parameters())
        return Suggestion(name, tuple(places), tuple(maps), count, **price, advised=not small, reason=reason)

    @cached_property
    def _stages(self) -> list[Site]:
        try:
            return stages(self.trace)
        except StructureError:
            return []

    @cached_property
    def marks(self) -> dict[str, list[str]]:
        """Return the methods that go to a site by default, by the site's name."""
        marks: dict[str, list[str]] = {}
        for name, method in methods().items():
            for site in () if method.example else self.suggestion(name).sites:
                marks.setdefault(site, []).append(name)
        return marks

    def groups(self, chosen: Sequence[Site]) -> list[tuple[str, list[Site]]]:
        """Sort sites by the stages that they are in: a heading and the sites, in running order."""
        order = {site.name: index for index, site in enumerate(self.sites)}
        ends = [(order[stage.name], stage) for stage in self._stages if stage.name in order]
        groups: dict[str, list[Site]] = {}
        for site in chosen:
            at = order.get(site.name)
            number = next((i for i, (end, _) in enumerate(ends) if at is not None and at <= end), len(ends))
            if at is None:  # a position of a block, which isn't listed by itself
                heading = ""
            elif number < len(ends):
                stage = ends[number][1]
                heading = f"stage {number}, or {number - len(ends)}: up to {stage.name}"
            else:
                heading = "behind the stages" if ends else ""
            groups.setdefault(heading, []).append(site)
        return list(groups.items())

    def _site(self, placement: Placement) -> str:
        """Name the site that a unit acts at; '' where that is the model's input or output."""
        edit, owner = placement.edit, placement.owner
        if not owner and isinstance(edit, (Input, Output)):
            return ""
        if not isinstance(edit, Span):
            return next((name for name in (placement.key, owner) if name in self._by_name), "")
        start = join(owner, edit.start)
        return start if start in self._by_name else self._given_to(owner)

    def _given_to(self, path: str) -> str:
        """Name the site whose value is an argument of a module: a stage where it is one; '' if no site is."""
        given = tensors(self.trace.observation.calls[path][0].args)
        names = [site.name for site in self.sites if any(site.value is value for value in given)]
        computed = [name for name in names if self._by_name[name].op not in NOTHING]
        ends = {stage.name for stage in self._stages}
        return next((name for name in names if name in ends), (computed or names or [""])[-1])

    def _positions(self, name: str) -> tuple[int, ...]:
        site = self._by_name.get(name)
        if site is None or not isinstance(site.value, Tensor):
            return ()
        layout = layout_of(self.trace, site.value, site.path, strict=False)
        return () if layout is None else tuple(layout.canonical(site.value).shape[2:])


def table_of(suggestions: Sequence[Suggestion], title: str) -> Table:
    """Lay suggestions out as a table."""
    table = Table(
        title=title,
        caption="Cost: of a training step and of evaluation, as multiples of a bare ResNet-50's on a CPU; "
        f"low below {LOW:g}, medium below {MEDIUM:g}.\n"
        "Advised: it goes on this model, and the maps are large enough. Whether it helps on your images is another "
        "question: fxgraft compare. When a method hurts: fxgraft info METHOD.",
        caption_justify="left",
    )
    for heading in ("method", "where", "map", "parameters", "cost", "advised"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left")
    for suggestion in suggestions:
        price = ", ".join(f"× {number:.2f}" for number in suggestion.measured.values())
        verdict = ("yes" if suggestion.advised else "no") + (
            f": {suggestion.reason}" if suggestion.reason else ""
        )
        sizes = list(dict.fromkeys(_size(size) for size in suggestion.maps if size))
        row = (
            suggestion.method,
            first_to_last([name or "(the model)" for name in suggestion.sites]),
            " to ".join([*sizes[:1], *sizes[1:][-1:]]),
            f"{suggestion.parameters:,}",
            f"{suggestion.cost}\n{price}" if price else suggestion.cost,
            verdict,
        )
        table.add_row(*map(Text, row))
    return table


def listing(
    placing: Placing, pattern: str | None, everything: bool
) -> tuple[list[tuple[str, list[Site]]], int]:
    """Choose the sites to list, by stage.

    Args:
        placing: the methods' places on the model.
        pattern: a name or a glob; what matches is listed, whatever it is.
        everything: list also what computes nothing.

    Returns:
        Headings and their sites, and how many were left out.

    Raises:
        SiteError: nothing matches.
    """
    import fxgraft

    if pattern is not None:
        return placing.groups(fxgraft.sites(placing.model, pattern, input_size=placing.input_size)), 0
    marks = placing.marks
    kept = [site for site in placing.sites if everything or site.op not in NOTHING or site.name in marks]
    return placing.groups(kept), len(placing.sites) - len(kept)


def sites_table(placing: Placing, groups: Sequence[tuple[str, list[Site]]], left_out: int) -> Table:
    """Lay sites out as a table, stage by stage, with the methods that go there by default."""
    marks = placing.marks
    more = f"{left_out} rows that compute nothing are left out; --all shows them." if left_out else ""
    table = Table(
        title=f"{class_name(placing.model)}, batch of 2", caption=more or None, caption_justify="left"
    )
    for column in ("site", "op", "shape", "layout", "default of"):
        table.add_column(column)
    for heading, members in groups:
        if heading:
            table.add_section()
            table.add_row(Text(heading, style="bold"))
        for row, site in zip(Sites(members).rows(), members, strict=True):
            name, op, shape, _, layout = row
            table.add_row(*map(Text, (name, op, shape, layout, ", ".join(marks.get(site.name, ())))))
    return table


def sites_data(placing: Placing, groups: Sequence[tuple[str, list[Site]]]) -> list[dict[str, Any]]:
    """Return sites as JSON holds them."""
    marks = placing.marks
    return [
        {
            "name": site.name,
            "op": site.op,
            "shape": None if site.shape is None else list(site.shape),
            "dtype": site.dtype,
            "layout": site.layout,
            "stage": heading,
            "default_of": marks.get(site.name, []),
        }
        for heading, members in groups
        for site in members
    ]


def _side(size: Sequence[int]) -> float:
    """Return the shorter side of a map, or that of a square with as many tokens."""
    return min(size) if len(size) > 1 else size[0] ** 0.5


def _size(size: Sequence[int]) -> str:
    return "×".join(map(str, size)) if len(size) > 1 else f"{size[0]} tokens"


def first_to_last(names: Sequence[str]) -> str:
    """Write names of modules in running order: all of a few, and of many the first, the last and how many."""
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]} ({len(names)})"


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
