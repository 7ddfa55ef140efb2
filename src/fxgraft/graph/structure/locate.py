"""Places: from a site to the node that holds its value, in whichever graph and mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxgraft.errors import SiteError
from fxgraft.graph.structure.site import Site, entry_site, module_site
from fxgraft.graph.structure.stages import is_block, main_path
from fxgraft.graph.tracing.editing import After, Edit, Output, is_unit
from fxgraft.graph.tracing.graph_utils import scope_of
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.names import relative
from fxgraft.graph.tracing.trace import HOOKED, Traced


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


def alike(nodes: list[fx.Node], index: int, node: fx.Node) -> bool:
    """Say whether the node at a place of another trace does what ``node`` does; traces may differ in branches."""
    if index >= len(nodes) or nodes[index].op != node.op:
        return False
    return node.op == "call_module" or nodes[index].target == node.target


def value_at(trace: ModelTrace, site: Site) -> Any:
    """Return the fake value at a site, batch of 2; None where it cannot be told."""
    if site.path:
        return trace.observation.output(site.path)
    return trace.values(site.owner).get(site.node)


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
        index = own_nodes(owner.graph, None).index(local[0])
        matching = own_nodes(traced.graph, site.owner)
        if alike(matching, index, local[0]):
            return matching[index]
    raise SiteError(
        f"{site.name!r} is not part of the model's forward pass in evaluation mode.\n"
        "The rest of the network after it cannot be evaluated.\nfxgraft.sites(model) lists what is."
    )


def site_edit(trace: ModelTrace, site: Site) -> tuple[str, Edit]:
    """Say where a unit acts on a site's value: on the module itself where that is possible.

    Returns:
        The module to graft and the edit. A module called once, outside activation checkpointing, is grafted
        on its output, so that every way of calling it passes the unit; anything else inside its owner's graph.
    """
    if site.on_module:
        return site.path, Output()
    if site.node:
        return site.owner, After(training_name(trace, site.owner, site.node))
    called_as = relative(site.path, site.owner)
    for node in trace.graph(site.owner, training=True).graph.nodes:
        if node.op == "call_module" and node.target == called_as:
            return site.owner, After(node.name)
    raise SiteError(
        f"{site.name!r} runs under activation checkpointing, in a region that cannot be opened.\n"
        "What a patch draws must not be drawn again when the region is recomputed in backward.\n"
        "Switch checkpointing off (model.set_grad_checkpointing(False)) or name a site outside the region."
    )


def site_edits(trace: ModelTrace, site: Site) -> tuple[str, Edit, Edit]:
    """Say where a unit that acts in both modes acts on a site's value.

    Returns:
        The module to graft, and what to do there in evaluation and in training; see `site_edit`.
    """
    owner, training = site_edit(trace, site)
    if not isinstance(training, After):
        return owner, training, training
    name = site.node
    if not name:
        called_as = relative(site.path, site.owner)
        nodes = trace.graph(site.owner, training=False).graph.nodes
        name = next(n.name for n in nodes if n.op == "call_module" and n.target == called_as)
    return owner, After(name), training


def training_name(trace: ModelTrace, owner: str, name: str) -> str:
    """Return the name that a node of a module's evaluation graph has in its training graph.

    What only one mode does (a dropout, a clamp) shifts the numbers that fx gives to nodes of one kind.

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


def blocks_before(trace: ModelTrace, site: Site) -> list[Site]:
    """List the blocks that run before a site and give as many dimensions and channels, the nearest first.

    A block is one of several modules of the same class in one `torch.nn.Sequential` or ``ModuleList``, on the main
    path: branches that something goes around are parts of one. Those that lie inside of others, and have parts
    themselves, come behind the rest. Of several values that a block gives, as a map and its size, the first is meant
    that is like the site's.
    """
    main = main_path(trace)
    calls = trace.observation.calls
    found = [site.path] if is_block(trace, site.path) else []
    outer, inner = [], []
    for path in reversed(trace.in_order()):
        if path == site.path or main.get(path) is None or not is_block(trace, path):
            continue
        if site.path in calls and calls[path][0].order > calls[site.path][0].order:
            continue
        inside = any(path.startswith(each + ".") for each in found)
        if inside and next(trace.module(path).children(), None) is None:
            continue
        value = _value_like(trace, path, site.shape or (0,))
        if value is not None:
            found.append(path)
            (inner if inside else outer).append(value)
    return [*outer, *inner]


def _value_like(trace: ModelTrace, path: str, shape: tuple[int, ...]) -> Site | None:
    """Return where a module's output is, or the first of them that has as many dimensions and channels."""

    def alike(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == len(shape) and value.shape[-1] == shape[-1]

    if alike(trace.observation.output(path)):
        return module_site(trace, path)
    return entry_site(trace, path, alike)
