"""Sites: values in a model's forward pass, the edits by which units act on them, and a list that prints as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from fxgraft._torch import pytree
from fxgraft.errors import SiteError, TraceError
from fxgraft.graph.dataflow.graph_utils import scope_of
from fxgraft.graph.names import inside, join, relative
from fxgraft.graph.structure.layout import Layout, layout_of, layout_of_value, named_layout
from fxgraft.graph.tracing.editing import After, Edit, Output, is_unit
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.tracer import HOOKED
from fxgraft.graph.tracing.values import shape_of


@dataclass(frozen=True)
class Edits:
    """The edits by which a unit acts on a value, one for each mode.

    Attributes:
        module: qualified name of the module to graft.
        evaluation, training: what to do there in that mode, since nodes may be named otherwise in its graph.
    """

    module: str
    evaluation: Edit
    training: Edit


@dataclass(frozen=True, repr=False)
class Site:
    """One value in a model's forward pass.

    Attributes:
        name: what to pass to ``layer=``.
        owner: qualified name of the smallest module whose forward contains the value ('' is the model).
        node: name of the value's node in the owner's graph; '' when it is known as a module's output only.
        path: qualified name of the module whose output it is, or '' for the value of a function.
        calls: how often that module is called in one pass.
        checkpointed: whether the call runs under activation checkpointing.
        op: the module's class, or the function.
        value: the value, of fake tensors, for a batch of 2; None where it isn't known.
        layout: which dimension holds the channels, where that is seen at once; see `Backbone.layout`.
        edits: the edits by which a unit acts there, if the search that found the site knows them; see `edits_of`.
        position: which position of a block it is ("post", "conv", ...); "" for a value that was named itself.
        block: qualified name of that block.
        kind: the kind of an unusual block, as in `Join`; "" otherwise.
        onward: edges to later users of the parts that this value was joined from: a unit that replaces the joined value
            has to hand its parts on to these. Empty where nothing else uses them.
        closed: how many modules the same search could not look into, among which there may be residual blocks; told
            where it then went on to other positions.
        left_out: how many positions the same search left out: values that don't have one row per image, have a single
            place, or that no prediction reads.
    """

    name: str
    owner: str
    node: str = ""
    path: str = ""
    calls: int = 1
    checkpointed: bool = False
    op: str = ""
    value: Any = field(default=None, compare=False)
    layout: str = ""
    edits: Edits | None = None
    position: str = ""
    block: str = ""
    kind: str = ""
    onward: tuple[Site, ...] = ()
    left_out: int = field(default=0, compare=False)
    closed: int = field(default=0, compare=False)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(batch of 2, ...) at the listing's input size; None when the value isn't a tensor."""
        return shape_of(self.value)

    @property
    def dtype(self) -> str:
        """Of the value, without the ``torch.`` prefix; "" when it isn't a tensor."""
        return str(self.value.dtype).removeprefix("torch.") if isinstance(self.value, Tensor) else ""

    @property
    def on_module(self) -> bool:
        """Whether a unit can sit on the module itself: one call, not recomputed in backward."""
        return bool(self.path) and self.calls == 1 and not self.checkpointed

    def hands_on(self, other: Site) -> bool:
        """Say whether a module gives the output of one inside it, at most turned round, flattened or written to."""
        values = self.value, other.value
        if not (
            self.path and inside(other.path, self.path) and all(isinstance(each, Tensor) for each in values)
        ):
            return False
        own, others = (each.untyped_storage()._cdata for each in values)
        return bool(own == others)

    def __repr__(self) -> str:
        shown = ("op", "shape", "dtype", "layout", "position")
        said = [f"{name}={value!r}" for name in shown if (value := getattr(self, name))]
        return f"Site({', '.join([repr(self.name), *said])})"

    def __getstate__(self) -> dict[str, Any]:
        # A fake value belongs to a pass, which can neither be pickled nor copied.
        return {**self.__dict__, "value": pytree.tree_map_only(Tensor, _without_pass, self.value)}


def _without_pass(fake: Tensor) -> Tensor:
    return torch.empty(fake.shape, dtype=fake.dtype, device="meta")


class Sites(Sequence[Site]):
    """The result of `fxgraft.sites`: a sequence of `Site` that prints as a table."""

    def __init__(self, sites: Iterable[Site], title: str = "") -> None:
        self._sites = tuple(sites)
        self.title = title

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> Site | Sites:
        if isinstance(index, slice):
            return Sites(self._sites[index], self.title)
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    @property
    def names(self) -> list[str]:
        """What to pass to ``layer=``, one name per site."""
        return [site.name for site in self._sites]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return the cells of the table: site, op, shape, dtype and layout of each."""
        return [
            (
                s.name or "(the model)",
                s.op,
                "×".join(map(str, s.shape)) if s.shape else "–",
                s.dtype,
                s.layout,
            )
            for s in self._sites
        ]

    def __rich__(self) -> Table:
        table = Table(title=self.title or None)
        for column in ("site", "op", "shape", "dtype", "layout"):
            table.add_column(column)
        for row in self.rows():
            table.add_row(*row)
        return table

    def __repr__(self) -> str:
        rows = [("site", "op", "shape", "dtype", "layout"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join(([self.title] if self.title else []) + lines)


def call_name(node: fx.Node) -> str:
    """Name a node as users write it: a child's own name (``name_1`` for its second call), else its fx name."""
    if node.op != "call_module":
        return node.name
    earlier = [
        n for n in node.graph.nodes if n.op == "call_module" and n.target == node.target and n is not node
    ]
    rank = sum(1 for n in earlier if n < node)
    return f"{node.target}_{rank}" if rank else str(node.target)


def layout_word(trace: ModelTrace, value: Any, path: str = "") -> str:
    """Return the layout of a value for listings; "" where it is not seen at once."""
    layout = layout_of(trace, value, path, strict=False) if isinstance(value, Tensor) else None
    return "" if layout is None else str(layout)


def module_site(trace: ModelTrace, path: str) -> Site:
    """Describe the output of a module's first call as a site."""
    calls = trace.observation.calls[path]
    record = calls[0]
    owner = trace.caller(path)
    return Site(
        name=path,
        owner=owner,
        path=path,
        calls=len(calls),
        checkpointed=record.checkpointed,
        op=type(trace.module(path)).__name__,
        value=record.output,
        layout=layout_word(trace, record.output, path),
    )


def node_sites(trace: ModelTrace, owner: str) -> list[Site]:
    """List the values in one module's forward, in running order: children's calls and what is between them.

    Args:
        trace: the trace of the bare model.
        owner: the module whose forward is looked at.
    """
    values = trace.values(owner)
    sites = []
    for node in trace.graph(owner, training=False).graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        name = call_name(node)
        value = values.get(node.name)
        if node.op == "call_module":
            path = join(owner, str(node.target))
            if name == str(node.target) and path in trace.observation.calls:
                sites.append(dataclasses.replace(module_site(trace, path), owner=owner, node=node.name))
                continue
            op = type(trace.module(path)).__name__
        elif isinstance(value, Tensor):
            op = getattr(node.target, "__name__", str(node.target))
        else:
            continue
        layout = layout_word(trace, value)
        sites.append(Site(join(owner, name), owner, node.name, op=op, value=value, layout=layout))
    return sites


def last_called(trace: ModelTrace, path: str, containers: tuple[type, ...] = (nn.Sequential,)) -> str | None:
    """Follow a Sequential whose children are called one by one to the child that gives its output."""
    module: Any
    try:
        module = trace.module(path) if path else None
    except AttributeError:
        return None
    while isinstance(module, containers) and len(module):
        name = list(module._modules)[-1]
        path = f"{path}.{name}"
        if path in trace.observation.calls:
            return path
        module = module._modules[name]
    return None


def entry_site(trace: ModelTrace, path: str, wanted: Callable[[Any], bool]) -> Site | None:
    """Find the first of a module's returned values that fits; None where its place in the output cannot be named."""
    values = pytree.tree_leaves(trace.observation.output(path))
    if not any(wanted(value) for value in values):
        return None
    try:
        graph = trace.graph(path, training=False).graph
    except TraceError:
        return None
    returned = pytree.tree_leaves(next(node.args[0] for node in graph.nodes if node.op == "output"))
    if len(returned) != len(values):
        return None
    name, value = next(
        (node.name, value) for node, value in zip(returned, values, strict=True) if wanted(value)
    )
    site = next((site for site in node_sites(trace, path) if site.node == name), None)
    # The value as the pass gave it: its mark says when it was made.
    return site and dataclasses.replace(site, value=value)


def places_in(value: Any) -> int:
    """Count the places that a map or tokens have of each image; 0 for anything else, as for attention weights."""
    layout = layout_of_value(value) if isinstance(value, Tensor) else None
    return 0 if layout is None or layout.name == "NC" else layout.canonical(value)[0, 0].numel()


def layout_at(trace: ModelTrace, site: Site, name: str | None = None) -> Layout:
    """Find the layout of a site's value, or check the one that the user names.

    Raises:
        SiteError: no tensor, a layout that cannot be told, or one that does not fit the value.
    """
    value = site.value
    if not isinstance(value, Tensor):
        raise SiteError(
            f"{site.name!r} holds no tensor: {site.op} returns {type(value).__name__}.\n"
            "fxgraft.sites(model) shows what every layer returns."
        )
    if name is not None:
        return named_layout(trace, value, site.path, name, site.name)
    inner = site.node and not site.on_module
    again = (lambda other: other.values(site.owner).get(site.node)) if inner else None
    return layout_of(trace, value, site.path, again=again, name=site.name) or Layout("NCHW")


def edits_of(trace: ModelTrace, site: Site) -> Edits:
    """Return the edits by which a unit acts on a site's value: on the module itself where that is possible.

    A module called once, outside activation checkpointing, is grafted on its output, so that every way of calling it
    passes the unit; anything else is done inside its owner's graph.

    Raises:
        SiteError: the two modes differ in what leads there, or the site runs in a region that cannot be opened.
    """
    if site.edits is not None:
        return site.edits
    if site.on_module:
        return Edits(site.path, Output(), Output())
    if site.node:
        evaluation, training = site.node, training_name(trace, site.owner, site.node)
    else:
        evaluation, training = (_node_of_call(trace, site, mode) for mode in (False, True))
    return Edits(site.owner, After(evaluation), After(training))


def _node_of_call(trace: ModelTrace, site: Site, training: bool) -> str:
    called_as = relative(site.path, site.owner)
    for node in trace.graph(site.owner, training).graph.nodes:
        if node.op == "call_module" and node.target == called_as:
            return node.name
    raise SiteError(
        f"{site.name!r} runs under activation checkpointing, in a region that cannot be opened.\n"
        "What a patch draws must not be drawn again when the region is recomputed in backward.\n"
        "Switch checkpointing off (model.set_grad_checkpointing(False)) or name a site outside the region."
    )


def training_name(trace: ModelTrace, owner: str, name: str) -> str:
    """Return the name that a node of a module's evaluation graph has in its training graph.

    A call that only one mode makes (a dropout, a clamp) shifts the numbers in the names that fx gives to nodes of a
    kind.

    Raises:
        SiteError: the modes differ in how often they do this, so that it is not clear which is meant.
    """
    graphs = [list(trace.graph(owner, training=mode).graph.nodes) for mode in (False, True)]
    wanted = next(node for node in graphs[0] if node.name == name)
    same = [[n for n in nodes if n.op == wanted.op and n.target == wanted.target] for nodes in graphs]
    if len(same[0]) != len(same[1]):
        raise SiteError(
            f"{name!r} in {owner or 'the model'!r} is not the same in training and in evaluation.\n"
            f"It happens {len(same[1])} times in one mode and {len(same[0])} times in the other.\n"
            "Choose a module's output as the site; fxgraft.sites(model) lists them."
        )
    return same[1][same[0].index(wanted)].name


def own_nodes(graph: fx.Graph, scope: str | None) -> list[fx.Node]:
    """List the computing nodes of one module's forward; grafts that were placed there and hooks do not count."""
    return [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "output", "get_attr")
        and (scope is None or scope_of(node) == scope)
        and not is_unit(node)
        and HOOKED not in node.meta
    ]


def counterpart(node: fx.Node, own: list[fx.Node], others: list[fx.Node]) -> fx.Node | None:
    """Find the node of another trace of a forward that corresponds to ``node``; None where that cannot be told.

    Traces differ in branches, and in nodes that unpack the result of a closed module, which an opened one lacks.

    Args:
        node: one of ``own``.
        own: the computing nodes of the forward (`own_nodes`).
        others: those of the other trace.
    """

    def same(nodes: list[fx.Node]) -> list[fx.Node]:
        if node.op != "call_module":
            return [
                candidate
                for candidate in nodes
                if candidate.op == node.op and candidate.target == node.target
            ]
        return [
            candidate for candidate in nodes if candidate.op == node.op and _child(candidate) == _child(node)
        ]

    mine, theirs = same(own), same(others)
    return theirs[mine.index(node)] if len(mine) == len(theirs) else None


def _child(node: fx.Node) -> str:
    """Name the called module as the forward around it does."""
    return relative(str(node.target), scope_of(node))


def locate(trace: ModelTrace, site: Site, traced: Traced) -> fx.Node:
    """Find a site's node in a trace of the whole model that opened the modules around it."""
    if site.path and site.calls == 1:
        for node in traced.graph.nodes:
            if node.op == "call_module" and node.target == site.path:
                return node
    owner = trace.graph(site.owner, training=False)
    local = [
        node
        for node in own_nodes(owner.graph, None)
        if node.name == site.node or (not site.node and node.target == relative(site.path, site.owner))
    ]
    if local:
        node = counterpart(local[0], own_nodes(owner.graph, None), own_nodes(traced.graph, site.owner))
        if node is not None:
            return node
    around = site.owner
    while around and len(trace.observation.calls.get(around, ())) < 2:
        around = around.rpartition(".")[0]
    if around:
        raise SiteError(
            f"{site.name!r} stands inside of {around!r}, which the model calls "
            f"{len(trace.observation.calls[around])} times in one pass.\n"
            "There is no single value of it, behind which the rest of the network could be looked at.\n"
            f'Name the call that you mean: {around!r}, "{around}_1" and so on, as fxgraft.sites(model) lists them.'
        )
    raise SiteError(
        f"{site.name!r} is not part of the model's forward pass in evaluation mode.\n"
        "The rest of the network after it cannot be evaluated.\nfxgraft.sites(model) lists what is."
    )
