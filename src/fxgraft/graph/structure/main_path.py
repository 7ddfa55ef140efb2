"""The main path of a network: the maps that all of the image goes through on its way to a head."""

from __future__ import annotations

import dataclasses

from torch import Tensor, fx

from fxgraft.errors import StructureError
from fxgraft.graph.dataflow.flow import passed_by_all
from fxgraft.graph.dataflow.graph_utils import downstream_of
from fxgraft.graph.dataflow.steps import PROJECTIONS
from fxgraft.graph.names import ancestors, inside
from fxgraft.graph.structure.heads.outputs import take_logits
from fxgraft.graph.structure.heads.pooling import is_classifier
from fxgraft.graph.structure.heads.stem_and_classifier import ends_in_features
from fxgraft.graph.structure.site import places_in
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import Call, tensors


@dataclasses.dataclass(frozen=True)
class MainMap:
    """A map that a module returns: its places, what made it, whether it is all that is returned, and its shape."""

    places: int
    made: int
    alone: bool
    shape: tuple[int, ...]


def main_path(trace: ModelTrace) -> dict[str, MainMap | None]:
    """Find the map that each module returns, in running order, where all of the image goes through it.

    With several heads, each has a path of its own. Where no map is on a main path, as in networks of several branches,
    the maps of all modules count. A module that returns no map, but holds modules that do, has None. The classifier is
    left out.
    """
    return trace.once("main path", _main_path)


def _main_path(trace: ModelTrace) -> dict[str, MainMap | None]:
    observation = trace.observation
    calls = {path: calls[0] for path, calls in observation.calls.items() if path and len(calls) == 1}
    ordered = [path for path in before_the_heads(trace, trace.in_order()[:-1]) if path in calls]
    maps = {path: first_map for path in ordered if (first_map := _first_map(calls[path])) is not None}
    main = main_operations(trace)
    kept = {path: first_map for path, first_map in maps.items() if first_map.made in main} or maps
    around = {ancestor for path in kept for ancestor in ancestors(path)}
    return {
        path: kept.get(path)
        for path in trace.in_order()
        if path in kept or (path in around and path in calls)
    }


def main_operations(trace: ModelTrace) -> set[int]:
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


def _first_map(call: Call) -> MainMap | None:
    for value, made in zip(tensors(call.output), call.made, strict=True):
        count = places_in(value)
        if count > 1 and made is not None:
            return MainMap(count, made, isinstance(call.output, Tensor), tuple(value.shape))
    return None


def main_nodes(trace: ModelTrace, owner: str) -> list[fx.Node]:
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


def before_the_heads(trace: ModelTrace, ordered: list[str]) -> list[str]:
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
    return ordered if ordered and gives_maps(trace, ordered[-1]) else ordered[:-1]


def is_composite(trace: ModelTrace, path: str) -> bool:
    """Say whether a module has parts."""
    return next(trace.module(path).children(), None) is not None


def gives_maps(trace: ModelTrace, path: str) -> bool:
    """Say whether a module returns a value with more than one place."""
    return any(places_in(value) > 1 for value in tensors(trace.observation.output(path)))
