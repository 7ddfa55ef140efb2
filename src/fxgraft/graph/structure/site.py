"""One site, how a place in a model becomes one, and a list of them that prints as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from rich.table import Table
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgraft.errors import TraceError
from fxgraft.graph.structure.layout import Layout, layout_of, layout_of_value
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.names import join
from fxgraft.graph.tracing.values import shape_of


@dataclass(frozen=True)
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
        shape: (batch of 2, ...) at the listing's input size, None when it is no tensor.
        dtype: of the value, without the ``torch.`` prefix.
        layout: which dimension holds the channels; see `Layout`.
    """

    name: str
    owner: str
    node: str
    path: str = ""
    calls: int = 1
    checkpointed: bool = False
    op: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    layout: str = ""

    @property
    def on_module(self) -> bool:
        """Whether a unit can sit on the module itself: one call, not recomputed in backward."""
        return bool(self.path) and self.calls == 1 and not self.checkpointed


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

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
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
        for row in self._rows():
            table.add_row(*row)
        return table

    def __repr__(self) -> str:
        rows = [("site", "op", "shape", "dtype", "layout"), *self._rows()]
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


def _describe(trace: ModelTrace, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {}
    layout = layout_of(trace, value, path, strict=False)
    return {
        "shape": shape_of(value),
        "dtype": str(value.dtype).removeprefix("torch."),
        "layout": str(layout) if isinstance(layout, Layout) else "",
    }


def module_site(trace: ModelTrace, path: str, call: int = 0) -> Site:
    """Describe the output of a module's call as a site."""
    calls = trace.observation.calls[path]
    record = calls[call]
    owner = trace.caller(path)
    return Site(
        name=path if call == 0 else f"{path}_{call}",
        owner=owner,
        node="",
        path=path,
        calls=len(calls),
        checkpointed=record.checkpointed,
        op=type(trace.module(path)).__name__,
        **_describe(trace, record.output, path),
    )


def node_sites(trace: ModelTrace, owner: str) -> list[Site]:
    """List the values in one module's forward, in running order: children's calls and what is between them.

    Args:
        trace: of the bare model.
        owner: the module whose forward is looked at.
    """
    values = trace.values(owner)
    found = []
    for node in trace.graph(owner, training=False).graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        name = call_name(node)
        value = values.get(node.name)
        if node.op == "call_module":
            path = join(owner, str(node.target))
            if name == str(node.target) and path in trace.observation.calls:
                found.append(dataclasses.replace(module_site(trace, path), owner=owner, node=node.name))
                continue
            op = type(trace.module(path)).__name__
        elif isinstance(value, Tensor):
            op = getattr(node.target, "__name__", str(node.target))
        else:
            continue
        found.append(Site(join(owner, name), owner, node.name, op=op, **_describe(trace, value, "")))
    return found


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
    """Find the first of several values that a module returns that is as wanted; None where it cannot be told apart."""
    output = trace.observation.output(path)
    if not any(wanted(value) for value in pytree.tree_leaves(output)):
        return None
    try:
        graph = trace.graph(path, training=False).graph
    except TraceError:
        return None
    returned = pytree.tree_leaves(next(node.args[0] for node in graph.nodes if node.op == "output"))
    values = pytree.tree_leaves(output)
    if len(returned) != len(values):
        return None
    name = next(node.name for node, value in zip(returned, values, strict=True) if wanted(value))
    return next((site for site in node_sites(trace, path) if site.node == name), None)


def places_in(value: Any) -> int:
    """Count the places that a map or tokens have of each image; 0 for anything else, as for attention weights."""
    layout = layout_of_value(value) if isinstance(value, Tensor) else None
    return 0 if layout is None or layout.name == "NC" else layout.canonical(value)[0, 0].numel()
