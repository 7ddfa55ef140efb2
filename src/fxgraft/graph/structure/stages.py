"""Stages: finds the values at which the stages of a network end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import takewhile
from typing import Any

from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.dataflow.flow import mark_of, passed_by_all
from fxgraft.graph.dataflow.graph_utils import downstream_of
from fxgraft.graph.dataflow.steps import PROJECTIONS, is_addition
from fxgraft.graph.names import ancestors, inside, join
from fxgraft.graph.structure.heads.outputs import take_logits
from fxgraft.graph.structure.heads.pooling import is_classifier
from fxgraft.graph.structure.heads.stem_and_classifier import ACTIVATIONS, ends_in_features
from fxgraft.graph.structure.layout import layout_of_value
from fxgraft.graph.structure.site import Site, entry_site, last_called, module_site, node_sites, places_in
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import Call, tensors
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
    function counts as a module does. Where the number never changes, every block is a stage. A module that runs several
    stages is looked into. A norm behind a stage isn't one itself.

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
            _check_blocks(trace, [site.path for site in ends if site.path])
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
    if not _is_composite(trace, stage):
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
        main, values = _main_nodes(trace, site.owner), trace.values(site.owner)
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
    parts = {path for path in trace.in_order()[:-1] if not trace.caller(path) and _is_composite(trace, path)}
    if not any(_gives_maps(trace, path) for path in trace.in_order() if {path, *ancestors(path)} & parts):
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
        lambda path, before: not _is_composite(trace, path) and _is_composite(trace, before),
    )
    if len(paths) < 2:
        blocks = [
            path for path in main if main[path] and _is_composite(trace, path) and is_block(trace, path)
        ]
        paths = [
            path for path in blocks if not any(inside(path, other) for other in blocks if other != path)
        ] or paths
    return [site for path in paths if (site := _declared(trace, path)) is not None]


def _check_blocks(trace: ModelTrace, found: list[str]) -> None:
    """Raise where all stages that were found end before the blocks, whose values are not understood.

    That is so where one block is called over and over, or its tokens have an order of their own.
    """
    calls = trace.observation.calls
    blocks = [
        path
        for path in _before_the_heads(trace, trace.in_order()[:-1])
        if path in calls
        and _is_composite(trace, path)
        and (len(calls[path]) > 1 or is_block(trace, path))
        and isinstance(value := calls[path][-1].output, Tensor)
        and sum(size > 1 for size in value.shape) > 2
    ]
    known = [path for path in found if any(inside(path, block) or inside(block, path) for block in blocks)]
    end = max((calls[path][-1].order for path in found), default=-1)
    late = [path for path in blocks if calls[path][0].order > end]
    if late and not known:
        shape, times = tuple(calls[late[0]][-1].output.shape), len(calls[late[0]])
        why = f"it is called {times} times" if times > 1 else "which dimensions are positions isn't seen"
        raise StructureError(
            f"The stages of {trace.name} cannot be told: {late[0]!r} gives a value of shape {shape}, and {why}.\n"
            f"Without it the stages would end at {found[-1] if found else 'the image'!r}.\n"
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


@dataclasses.dataclass(frozen=True)
class _Map:
    """A map that a module returns: its places, what made it, whether it is all that is returned, and its shape."""

    places: int
    made: int
    alone: bool
    shape: tuple[int, ...]


def main_path(trace: ModelTrace) -> dict[str, _Map | None]:
    """Find the map that each module returns, in running order, where all of the image goes through it.

    With several heads, each has a path of its own. Where no map is on a main path, as in networks of several branches,
    the maps of all modules count. A module that returns no map, but holds modules that do, has None. The classifier is
    left out.
    """
    return trace.once("main path", _main_path)


def _main_path(trace: ModelTrace) -> dict[str, _Map | None]:
    observation = trace.observation
    calls = {path: calls[0] for path, calls in observation.calls.items() if path and len(calls) == 1}
    ordered = [path for path in _before_the_heads(trace, trace.in_order()[:-1]) if path in calls]
    maps = {path: first_map for path in ordered if (first_map := _first_map(calls[path])) is not None}
    main = _main_operations(trace)
    kept = {path: first_map for path, first_map in maps.items() if first_map.made in main} or maps
    around = {ancestor for path in kept for ancestor in ancestors(path)}
    return {
        path: kept.get(path)
        for path in trace.in_order()
        if path in kept or (path in around and path in calls)
    }


def _main_operations(trace: ModelTrace) -> set[int]:
    """List the operations that all of the image goes through on its way to a head, by number in the pass's `Flow`.

    Each head, and each of several pooled vectors that a head reads together, has a path of its own.
    """
    observation = trace.observation
    flow = observation.flow
    made = [number for number in observation.calls[""][0].made if number is not None]
    waiting = _read_by_the_heads(trace, made[0]) if made else []
    main: set[int] = set()
    joined: set[int] = set()
    while waiting:
        end = start = waiting.pop()
        while start not in flow.vectors and len(flow.sources[start]) == 1:
            (start,) = flow.sources[start]
        if start in flow.vectors:
            waiting += [source for source in flow.sources[start] if start not in joined]
            joined.add(start)
        else:
            main |= passed_by_all(flow.sources, end)
    return main


def _first_map(call: Call) -> _Map | None:
    for value, made in zip(tensors(call.output), call.made, strict=True):
        count = places_in(value)
        if count > 1 and made is not None:
            return _Map(count, made, isinstance(call.output, Tensor), tuple(value.shape))
    return None


def _holds_stages(trace: ModelTrace, path: str, main: dict[str, _Map | None]) -> bool:
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
    blocks = [own[name] for name in own if own[name].places == before and _is_composite(trace, name)]
    if type(trace.module(path)) is nn.Sequential:
        return bool(blocks)
    return any(value.shape == first_input.shape for value in blocks)


def _is_composite(trace: ModelTrace, path: str) -> bool:
    return next(trace.module(path).children(), None) is not None


def _gives_maps(trace: ModelTrace, path: str) -> bool:
    return any(places_in(value) > 1 for value in tensors(trace.observation.output(path)))


def _main_nodes(trace: ModelTrace, owner: str) -> list[fx.Node]:
    """List the nodes of a module's forward that all of its inputs go through, in running order."""
    nodes = list(trace.graph(owner, training=False).graph.nodes)
    carrying = {
        node for start in nodes if start.op == "placeholder" for node in (start, *downstream_of(start))
    }
    number = {node: index for index, node in enumerate(nodes)}
    sources = [
        tuple(number[source] for source in node.all_input_nodes if source in carrying) for node in nodes
    ]
    main = passed_by_all(sources, len(nodes) - 1)
    return [node for node in nodes if number[node] in main]


def _graph_path(trace: ModelTrace) -> list[tuple[Site, int]]:
    """Find the main path as `main_path` does, for a model that is a graph of layers and functions, by its nodes."""
    values = trace.values("")
    names = {node.name for node in _main_nodes(trace, "")}
    features = {"", *_before_the_heads(trace, trace.in_order()[:-1])}
    sites = [site for site in node_sites(trace, "")[:-1] if site.node in names]
    sites = [*takewhile(lambda site: site.path in features, sites)]
    return [(site, count) for site in sites if (count := places_in(values.get(site.node))) > 1]


def _logits(trace: ModelTrace) -> Tensor | None:
    try:
        logits = take_logits(trace.observation.output(""))
    except StructureError:
        return None
    return logits if isinstance(logits, Tensor) and logits.ndim > 1 else None


def _dense_heads(trace: ModelTrace, logits: Tensor) -> list[str] | None:
    """List the modules that give maps of classes at the end of a dense predictor; None for another model.

    There may be several, an auxiliary one or one at each scale. A dense predictor is known by logits as large as the
    image; their channels are the classes.
    """
    if logits.ndim not in (4, 5) or logits.shape[2:] != trace.image_size[1:]:
        return None
    heads: list[str] = []
    for path in (call for call in reversed(trace.in_order()[:-1]) if trace.caller(call) == ""):
        value = trace.observation.output(path)
        if not isinstance(value, Tensor) or value.ndim != logits.ndim or value.shape[1] != logits.shape[1]:
            break
        heads.append(path)
    return heads


def _read_by_the_heads(trace: ModelTrace, end: int) -> list[int]:
    """List the operations that made what the heads read, or the last one where the logits do not come from heads alone.

    In a dense predictor, heads are the modules that give maps of classes. Elsewhere they are the last linear layers or
    convolutions on the ways to the logits, with as many channels as these.

    Args:
        trace: the trace of the model.
        end: the operation that made the logits.
    """
    observation, logits = trace.observation, _logits(trace)
    if logits is None or ends_in_features(trace):
        return [end]
    heads = set(_dense_heads(trace, logits) or ())
    if not heads:
        layers: dict[int | None, str] = {}
        for path, calls in observation.calls.items():
            value = calls[0].output
            if len(calls) > 1 or not isinstance(trace.module(path), PROJECTIONS):
                continue
            if isinstance(value, Tensor) and logits.shape[1] in value.shape[1:]:
                layers[calls[0].made[0]] = path
        waiting, seen = [end], {end}
        while waiting:
            number = waiting.pop()
            if number in layers:
                heads.add(layers[number])
                continue
            if number == 0:  # from the images past all of them
                return [end]
            new = set(observation.flow.sources[number]) - seen
            seen |= new
            waiting += new
    inputs = (value for path in heads for value in tensors(observation.calls[path][0].args))
    marks = (observation.flow.settled(value) for value in inputs)
    return [mark.number for mark in marks if mark is not None] or [end]


def _before_the_heads(trace: ModelTrace, ordered: list[str]) -> list[str]:
    """Leave out the classifier and what follows it, and of a dense predictor all that gives maps of classes."""
    logits = _logits(trace)
    if logits is None:
        return ordered[:-1]
    heads = _dense_heads(trace, logits)
    if heads is not None:
        kept = [path for path in ordered[:-1] if not any(inside(path, head) for head in heads)]
        return kept or ordered[:-1]
    classes = logits.shape[1]
    weighted = [path for path in ordered if next(trace.module(path).parameters(False), None) is not None]
    last = weighted[-1] if weighted else ""
    value = trace.observation.output(last)
    if (
        last
        and is_classifier(trace.module(last))
        and not ends_in_features(trace)
        and isinstance(value, Tensor)
        and classes in value.shape[1:]
    ):
        return ordered[: ordered.index(last)]
    # What gives a map at the end is the last stage, with a head of functions behind it.
    return ordered if ordered and _gives_maps(trace, ordered[-1]) else ordered[:-1]


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
    come last. Of several values that a block returns, such as a map and its size, the first that is like the site's
    counts.
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
    return [*outer, *inner]


def _value_like(trace: ModelTrace, path: str, shape: tuple[int, ...]) -> Site | None:
    """Return where a module's output is, or the first of them that has as many dimensions and channels."""

    def alike(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == len(shape) and value.shape[-1] == shape[-1]

    if alike(trace.observation.output(path)):
        return module_site(trace, path)
    return entry_site(trace, path, alike)
