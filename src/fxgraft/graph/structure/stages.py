"""Stages: finds the values at which the stages of a network end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import takewhile
from typing import Any

from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.dataflow.flow import mark_of
from fxgraft.graph.dataflow.steps import is_addition
from fxgraft.graph.names import ancestors, inside, join
from fxgraft.graph.structure.blocks import block_ends, is_block
from fxgraft.graph.structure.heads.stem_and_classifier import ACTIVATIONS
from fxgraft.graph.structure.layout import layout_of_value
from fxgraft.graph.structure.main_path import (
    MainMap,
    before_the_heads,
    gives_maps,
    is_composite,
    main_nodes,
    main_path,
)
from fxgraft.graph.structure.site import Site, entry_site, last_called, module_site, node_sites, places_in
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import tensors
from fxgraft.graph.tracing.values import node_name


def stage_at(trace: ModelTrace, index: int) -> Site:
    """Return the stage of that number; negative numbers count from the last.

    Raises:
        SiteError: there is none; lists those there are.
    """
    listed = stages(trace)
    if not -len(listed) <= index < len(listed):
        raise SiteError(
            f"There is no stage {index} in {trace.name}, which has {len(listed)}.\n"
            f"They are numbered 0 to {len(listed) - 1} (or from -1 backwards): "
            f"{', '.join(repr(site.name) for site in listed)}."
        )
    return listed[index]


def stages(trace: ModelTrace) -> list[Site]:
    """List the stages of a backbone, in running order.

    They are the entries of timm's ``feature_info`` that give a map or tokens; of several values, the first with the
    declared number of channels. Without any, a stage ends in the last module at each number of places on the main path,
    which everything goes through, and behind the activations and sums that follow it as functions. Of plain layers, any
    function counts as a module does. Where the number never changes, every block is a stage, also where the blocks'
    sums stand in the forward around them (``x = x + attention(x)`` in a loop). A module that runs several stages is
    looked into. A norm behind a stage isn't one itself.

    Raises:
        StructureError: there is none.
    """
    return list(trace.once("stages", _stages))


def _stages(trace: ModelTrace) -> list[Site]:
    sites = _declared_stages(trace)
    if not sites:
        ends = trace.once("stages by places", _by_places)
        sites = [_behind(trace, site) for site in ends]
        # A sum behind the last module has the blocks that come after it as branches.
        if sites == ends and not isinstance(trace.model, fx.GraphModule):
            _check_blocks(trace, ends)
    if not sites:
        raise StructureError(
            f"{trace.name} has no feature_info and no feature maps to number stages by.\n"
            "Name the layer instead; fxgraft.sites(model) lists all of them."
        )
    return sites


def _declared_stages(trace: ModelTrace) -> list[Site]:
    info = getattr(trace.model, "feature_info", None)
    entries = getattr(info, "info", info)
    declared = [entry for entry in entries or () if isinstance(entry, dict) and entry.get("module")]
    named = {(entry["module"], entry.get("num_chs")) for entry in declared}
    sites = []
    if len(named) == len(declared):  # two entries of one name don't say where their stages end
        sites = [
            site
            for entry in declared
            if (site := _declared(trace, entry["module"], entry.get("num_chs"))) is not None
        ]
    return sorted({site.name: site for site in sites}.values(), key=lambda site: _made(trace, site))


def main_stages(trace: ModelTrace, count: int = 4) -> list[Site]:
    """List the last stages of a backbone, as the four of a ResNet behind its stem, in running order.

    If the number of places falls at least ``count`` times, there is one stage for each number. Else these are all
    stages; of more than ``count``, those at equal distances, such as every third of twelve blocks.

    Raises:
        StructureError: there is none.
    """
    listed = stages(trace)
    shrinking = list({places_in(site.value): site for site in listed}.values())
    if len(shrinking) >= count or len(listed) <= count:
        return (shrinking if len(shrinking) >= count else listed)[-count:]
    return [listed[len(listed) * (number + 1) // count - 1] for number in range(count)]


def stem_output(trace: ModelTrace) -> Site | None:
    """Find the output of the last module before the first of the `main_stages`.

    None where that stage takes in the image, or is known by its last layer alone.
    """
    calls, sources = trace.observation.calls, trace.observation.flow.sources
    places = places_in(main_stages(trace)[0].value)
    known = _declared_stages(trace) or trace.once("stages by places", _by_places)
    first = next(site for site in known if places_in(site.value) == places)
    stage = first.path or first.owner
    if not is_composite(trace, stage):
        return None
    stage = _first_alike(trace, stage)
    made = {
        call[0].made[0]: path  # of nested modules that return one value, the outermost: its call begins first
        for path, call in reversed(calls.items())
        if len(call) == 1 and isinstance(call[0].output, Tensor) and path and not inside(path, stage)
    }
    marks = (
        trace.observation.flow.settled(value) for value in tensors(calls[stage][0].args) if places_in(value)
    )
    number = next((mark.number for mark in marks if mark is not None), 0)
    while number and number not in made and len(sources[number]) == 1:
        (number,) = sources[number]
    return _behind(trace, module_site(trace, made[number]), pooled=True) if number in made else None


def _first_alike(trace: ModelTrace, stage: str) -> str:
    """Go back from the block in which a stage ends to the first of its blocks, where no module holds all of them.

    Blocks are of one class, called by the same module, and have as many places.
    """
    main = main_path(trace)
    cls, end = type(trace.module(stage)), main.get(stage)
    if cls is nn.Sequential or end is None:
        return stage
    beside = [path for path in main if trace.caller(path) == trace.caller(stage) and not inside(path, stage)]
    order = trace.observation.calls
    for path in reversed([path for path in beside if order[path][0].order < order[stage][0].order]):
        value = main[path]
        if type(trace.module(path)) is not cls or value is None or value.places != end.places:
            break
        stage = path
    return stage


def _behind(trace: ModelTrace, site: Site, pooled: bool = False) -> Site:
    """Follow a module's value through the functions right behind it that all of it goes through.

    These are activations and sums, as ``F.relu(bn(x))`` and ``F.relu(x + block(x))``. The next module ends them, or
    another number of places.

    Args:
        trace: the trace of the model.
        site: the output of a module, called once.
        pooled: whether poolings count as well, as in a stem.
    """
    if not site.path or site.calls > 1 or not isinstance(site.value, Tensor):
        return site
    try:
        main, values = main_nodes(trace, site.owner), trace.values(site.owner)
    except TraceError:
        return site
    last = None
    start = next((node for node in main if join(site.owner, str(node.target)) == site.path), None)
    for node in main[main.index(start) + 1 :] if start is not None and start.op == "call_module" else ():
        if node.op not in ("call_function", "call_method"):
            break
        value, name = values.get(node.name), node_name(node, trace.module(site.owner)).rstrip("_")
        if not isinstance(value, Tensor) or value.ndim != site.value.ndim or not places_in(value):
            break
        if name not in ACTIVATIONS and not is_addition(node) and not (pooled and "pool" in name):
            break
        if not pooled and places_in(value) != places_in(site.value):
            break
        last = node.name
    if last is None:
        return site
    return next(other for other in node_sites(trace, site.owner) if other.node == last)


def _declared(trace: ModelTrace, name: str, channels: int | None = None) -> Site | None:
    """Find the map of a stage that ``feature_info`` names; None where that module gives none.

    Of several values it is the first map with the declared number of channels: branches have fewer than their sum.
    """
    lists = (nn.Sequential, nn.ModuleList)
    path = name if name in trace.observation.calls else last_called(trace, name, lists)
    if path is None:
        return None
    output = trace.observation.output(path)
    if isinstance(output, Tensor):
        return module_site(trace, path) if places_in(output) else None

    def as_said(value: Any) -> bool:
        layout = layout_of_value(value) if places_in(value) else None
        return layout is not None and channels in (None, layout.canonical(value).shape[1])

    return entry_site(trace, path, as_said)


def _made(trace: ModelTrace, site: Site) -> int:
    """Return when a stage's value is made. What the pass wrote to it behind the stage doesn't count."""
    calls = trace.observation.calls.get(site.path or site.owner, ())
    made = (each for call in calls for each in zip(tensors(call.output), call.made, strict=True))
    mark = mark_of(site.value)
    later = 0 if mark is None else mark.number
    return next((number for value, number in made if value is site.value and number is not None), later)


def _by_places(trace: ModelTrace) -> list[Site]:
    """Find the last value of the main path at each number of places, or the blocks where that number is one."""
    if isinstance(trace.model, fx.GraphModule):
        return _last_of_each(_graph_path(trace))
    main = main_path(trace)
    # Between plain layers, functions such as F.relu are what modules are elsewhere.
    parts = {path for path in trace.in_order()[:-1] if not trace.caller(path) and is_composite(trace, path)}
    if not any(gives_maps(trace, path) for path in trace.in_order() if {path, *ancestors(path)} & parts):
        with suppress(TraceError):
            if found := _last_of_each(_graph_path(trace)):
                return found
    opened = {""}
    for path in sorted(main, key=lambda path: path.count(".")):
        if trace.caller(path) in opened and (main[path] is None or _holds_stages(trace, path, main)):
            opened.add(path)
    outer: dict[int, str] = {}
    for path, value in main.items():
        if value is not None and trace.caller(path) in opened:
            known = outer.setdefault(value.made, path)
            # Of nested modules that return one value, the outermost, if it returns nothing else.
            if value.alone and path.count(".") < known.count("."):
                outer[value.made] = path
    paths = _last_of_each(
        (
            (path, value.places)
            for _, path in sorted(outer.items())
            if (value := main[path]) is not None and _declared(trace, path) is not None
        ),
        lambda path, before: not is_composite(trace, path) and is_composite(trace, before),
    )
    if len(paths) < 2:
        blocks = [path for path in main if main[path] and is_composite(trace, path) and is_block(trace, path)]
        outermost = [
            path for path in blocks if not any(inside(path, other) for other in blocks if other != path)
        ]
        if not outermost and (ends := [site for site in block_ends(trace) if places_in(site.value) > 1]):
            return ends
        paths = outermost or paths
    return [site for path in paths if (site := _declared(trace, path)) is not None]


def _check_blocks(trace: ModelTrace, found: list[Site]) -> None:
    """Raise where all stages that were found end before the blocks, whose values are not understood.

    That is so where one block is called over and over, or its tokens have an order of their own.
    """
    calls = trace.observation.calls
    blocks = {
        path: path
        for path in before_the_heads(trace, trace.in_order()[:-1])
        if path in calls and is_composite(trace, path) and (len(calls[path]) > 1 or is_block(trace, path))
    }
    values = {path: calls[path][-1].output for path in blocks}
    for site in () if blocks else block_ends(trace):
        blocks[site.name], values[site.name] = site.owner, site.value
    blocks = {
        name: path
        for name, path in blocks.items()
        if isinstance(value := values[name], Tensor) and sum(size > 1 for size in value.shape) > 2
    }
    paths = [site.path or site.owner for site in found]
    known = any(inside(path, block) or inside(block, path) for path in paths for block in blocks.values())
    end = max((calls[path][-1].order for path in paths), default=-1)
    late = [name for name, path in blocks.items() if calls[path][0].order > end]
    if late and not known:
        shape, times = tuple(values[late[0]].shape), len(calls[blocks[late[0]]])
        why = f"it is called {times} times" if times > 1 else "which dimensions are positions isn't seen"
        raise StructureError(
            f"The stages of {trace.name} cannot be told: {late[0]!r} gives a value of shape {shape}, and {why}.\n"
            f"Without it the stages would end at {found[-1].name if found else 'the image'!r}.\n"
            "Name the layer, as fxgraft.sites(model) lists it."
        )


def _last_of_each(
    counted: Iterable[tuple[Any, int]], belongs: Callable[[Any, Any], bool] = lambda item, before: False
) -> list[Any]:
    """Keep the last thing at each number of places. Numbers that differ by a cut-off border count as one.

    Args:
        counted: things with their places.
        belongs: a function that says whether a thing right behind another belongs to it and doesn't replace it, as a
            norm behind a stage.
    """
    last: list[tuple[Any, int]] = []
    for item, places in counted:
        near = [0.7 < count / places < 1 / 0.7 for _, count in last]
        if near and near[-1] and belongs(item, last[-1][0]):
            continue
        last = [pair for pair, close in zip(last, near, strict=True) if not close]
        last.append((item, places))
    return [item for item, _ in last]


def _holds_stages(trace: ModelTrace, path: str, main: dict[str, MainMap | None]) -> bool:
    """Say whether a module runs more than one stage.

    It does if some value in it has a number of places that neither its input nor its output has. It also does if it
    returns fewer places and has blocks before that: any in a plain sequence, in other modules those that keep the
    number of channels.
    """
    own = {name: value for name, value in main.items() if value and inside(name, path) and name != path}
    out = main[path]
    first_input = next(
        (value for value in tensors(trace.observation.calls[path][0].args) if places_in(value) > 1), None
    )
    if out is None or first_input is None:
        return bool(own)
    before = places_in(first_input)
    if len(
        _last_of_each([("", before), ("", out.places), *(("", value.places) for value in own.values())])
    ) > (1 + (len(_last_of_each([("", before), ("", out.places)])) > 1)):
        return True
    if before == out.places:
        return False
    blocks = [own[name] for name in own if own[name].places == before and is_composite(trace, name)]
    if type(trace.module(path)) is nn.Sequential:
        return bool(blocks)
    return any(value.shape == first_input.shape for value in blocks)


def _graph_path(trace: ModelTrace) -> list[tuple[Site, int]]:
    """Find the main path as `main_path` does, for a model that is a graph of layers and functions, by its nodes."""
    values = trace.values("")
    names = {node.name for node in main_nodes(trace, "")}
    features = {"", *before_the_heads(trace, trace.in_order()[:-1])}
    sites = [site for site in node_sites(trace, "")[:-1] if site.node in names]
    sites = [*takewhile(lambda site: site.path in features, sites)]
    return [(site, count) for site in sites if (count := places_in(values.get(site.node))) > 1]
