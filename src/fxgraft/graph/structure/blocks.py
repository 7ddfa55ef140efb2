"""Blocks: modules of one class in a list, or the sums in a loop around lists of layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxgraft.graph.names import join
from fxgraft.graph.structure.joins import Join, residual_joins
from fxgraft.graph.structure.main_path import main_nodes, main_operations, main_path
from fxgraft.graph.structure.site import Site, entry_site, module_site, node_sites
from fxgraft.graph.tracing.model_trace import ModelTrace


def is_block(trace: ModelTrace, path: str) -> bool:
    """Say whether a module is one of several of its class in one `torch.nn.Sequential` or ``ModuleList``."""
    parent = trace.module(path.rpartition(".")[0])
    module = trace.module(path)
    alike = sum(type(child) is type(module) for child in parent.children())
    return bool(path) and isinstance(parent, (nn.Sequential, nn.ModuleList)) and alike > 1


def blocks_before(trace: ModelTrace, site: Site) -> list[Site]:
    """List the blocks that run before a site and give as many dimensions and channels, the nearest first.

    A block is one of several modules of the same class in one `torch.nn.Sequential` or ``ModuleList`` on the main
    path; a module on a parallel branch is part of a block. Blocks that lie inside others, and have parts themselves,
    come last. Where no module is a block, the sums count in which blocks end in a forward. Of several values that a
    block returns, such as a map and its size, the first that is like the site's counts.
    """
    main = main_path(trace)
    calls = trace.observation.calls
    blocks = [site.path] if is_block(trace, site.path) else []
    outer, inner = [], []
    for path in reversed(trace.in_order()):
        if path == site.path or main.get(path) is None or not is_block(trace, path):
            continue
        if site.path in calls and calls[path][0].order > calls[site.path][0].order:
            continue
        inside = any(path.startswith(other + ".") for other in blocks)
        if inside and next(trace.module(path).children(), None) is None:
            continue
        value = _value_like(trace, path, site.shape or (0,))
        if value is not None:
            blocks.append(path)
            (inner if inside else outer).append(value)
    # No module is one, but perhaps the site's own. A search for sums opens all modules, so it comes last.
    if not is_block(trace, site.path) and all(value.value is site.value for value in (*outer, *inner)):
        inner += _block_ends_before(trace, site)
    return [*outer, *inner]


def block_ends(trace: ModelTrace) -> list[Site]:
    """Find the sums in which blocks end that are no modules: ``x = x + attention(x)``, ``x = x + mlp(x)`` in a loop.

    A block is what repeats: the shortest run of sums whose branches call, again and again, modules of the same classes.
    """
    return trace.once("block ends", _repeated_sums)


def _repeated_sums(trace: ModelTrace) -> list[Site]:
    main = main_operations(trace)
    passed_by = {
        path
        for path, calls in trace.observation.calls.items()
        if not path or (len(calls) == 1 and main.issuperset(calls[0].made))
    }
    owners: dict[str, list[Join]] = {}
    for residual in residual_joins(trace):
        if residual.kind == "block" and residual.owner in passed_by:
            owners.setdefault(residual.owner, []).append(residual)
    sites = []
    for owner, joins in owners.items():
        passed = {join(owner, node.name) for node in main_nodes(trace, owner)}
        joins = [residual for residual in joins if residual.name in passed]
        kinds = [_classes_of_branch(trace, residual) for residual in joins]
        run = next((size for size in range(1, len(kinds)) if kinds == kinds[:size] * (len(kinds) // size)), 0)
        ends = {residual.name for residual in joins[run - 1 :: run]} if run else set()
        sites += [site for site in node_sites(trace, owner) if site.name in ends]
    return sites


def _classes_of_branch(trace: ModelTrace, residual: Join) -> list[type]:
    modules = [part for path in residual.branch for part in trace.module(path).modules()]
    return [type(module) for module in modules if next(module.parameters(), None) is not None]


def _block_ends_before(trace: ModelTrace, site: Site) -> list[Site]:
    """List the `block_ends` that come before a site and are like it, the nearest first."""
    calls = trace.observation.calls
    ends = block_ends(trace)
    names = [end.name for end in ends]
    if site.name in names:
        ends = ends[: names.index(site.name)]
    elif site.path in calls:
        ends = [end for end in ends if calls[end.owner][0].order <= calls[site.path][0].order]
    return [end for end in reversed(ends) if _is_like(end.value, site.shape or (0,))]


def _value_like(trace: ModelTrace, path: str, shape: tuple[int, ...]) -> Site | None:
    """Return where a module's output is, or the first of them that has as many dimensions and channels."""
    if _is_like(trace.observation.output(path), shape):
        return module_site(trace, path)
    return entry_site(trace, path, lambda value: _is_like(value, shape))


def _is_like(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.ndim == len(shape) and value.shape[-1] == shape[-1]
