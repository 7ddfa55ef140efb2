"""Positions inside blocks: finds the sites in a model for a word such as "post", "conv1_post" or "conv".

Three families: the positions of a residual join, three positions of a densely connected layer, and the
outputs of all convolutions, norms or activations of a plain stack. Names of layers narrow each of them down.
Each family has a usual position, and a network's own is that of the first family that it has blocks of. Where few of
its layers lie in the branches of residual joins, as with one join in a network of other blocks, the others come first.

A residual join has two positions beside its own four. "pre_with_projection" is "pre" where the shortcut hands the
block's input on as it is; where it projects or pools the input, it sees the changed one, too. "output" is behind the
activation that follows the sum, with what lies between; "post" where none follows in the same forward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgraft._torch import PRELU, ConvNd, NormBase, OpOverload, TorchDispatchMode
from fxgraft.errors import FxgraftError, SiteError, StructureError, TraceError, candidates
from fxgraft.graph.dataflow.graph_utils import downstream_of, upstream_of
from fxgraft.graph.dataflow.steps import steps_of
from fxgraft.graph.names import join, relative
from fxgraft.graph.structure.dense import DENSE, dense_layers
from fxgraft.graph.structure.joins import POSITIONS as OF_JOINS
from fxgraft.graph.structure.joins import (
    Join,
    candidate_sums,
    closed_blocks,
    residual_joins,
    share_in_branches,
)
from fxgraft.graph.structure.layout import images_merged, layout_of_value
from fxgraft.graph.structure.site import (
    Edits,
    Site,
    edits_of,
    layout_word,
    module_site,
    places_in,
    training_name,
)
from fxgraft.graph.structure.sites import SiteSpec, is_glob, matches, resolve
from fxgraft.graph.tracing.editing import After, Edge, Edit, Input
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.preserve import preserved_modes, preserved_random_state

RESIDUAL = (*OF_JOINS, "pre_with_projection", "output")
PLAIN = ("conv", "norm", "act")
IMAGE = "input"
USUAL = ("post", "conv1_pre", "conv")
"""Of residual, of densely connected and of plain networks."""
LEAST_SHARE = 0.2
"""How many of a network's layers lie in branches of joins, at least, where it is a residual one."""

_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_KINDS = {"conv": "convolutions", "norm": "norms", "act": "activations"}


def positions(trace: ModelTrace, position: str | None = None, layers: SiteSpec | None = None) -> list[Site]:
    """Find the sites of one position, in running order.

    Args:
        trace: the trace of the bare model.
        position: one of `RESIDUAL`, `DENSE` or `PLAIN`; the first of `usual` that the model has, if left out.
        layers: the blocks to use: names of blocks or of modules around them, globs, stage numbers, names of
            joins, "name:position" for another position of one join, "input" for the image. A name that
            holds no block with the position stands for its own output. All blocks by default, except those
            whose values have a single position (class-token blocks) or merge other things into the batch, and a
            convolution that is itself the classifier, with what follows it.

    Raises:
        StructureError: no block of the model has the position; says what there is.
        SiteError: no such layer, or one without maps or tokens.
    """

    @functools.cache  # on demand and once: with named layers it may not be needed, and it searches the whole model
    def blocks() -> tuple[str, list[Site]]:
        wanted = usual(trace) if position is None else (position,)
        for layer in wanted:
            sites = _all(trace, layer)
            if sites:
                return layer, sites
        return wanted[0], []

    if layers is None:
        where, sites = blocks()
        logits = _from_classifier_on(trace) if where in PLAIN else ()
        usable = [site for site in sites if _holds_places(site) and site.path not in logits]
        if not usable:
            raise _nowhere(trace, where, sites)
        left_out = len(sites) - len(usable) if where in RESIDUAL else 0
        closed = len(closed_blocks(trace)) if where in PLAIN and position is None else 0
        return [dataclasses.replace(site, left_out=left_out, closed=closed) for site in usable]
    words = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    chosen: dict[str, Site] = {}
    for word in words:
        for site in _named(trace, word, lambda: blocks()[1]):
            if not _holds_places(site):
                raise no_positions(site)
            chosen[site.name] = site
    if not chosen:
        raise SiteError("No layer was named.\nLeave layers= out for all blocks.")
    return list(chosen.values())


def usual(trace: ModelTrace) -> tuple[str, ...]:
    """Return the positions to look for, in this order: that of joins comes last where they hold few of the layers."""
    return USUAL if share_in_branches(trace) >= LEAST_SHARE else (*USUAL[1:], USUAL[0])


def position_sites(trace: ModelTrace) -> list[Site]:
    """List every residual join with its positions, each place once, for `fxgraft.sites`."""
    listed = []
    for residual in residual_joins(trace):
        seen: list[Edit] = []
        for position in RESIDUAL:
            try:
                site = _position(trace, residual, position)
            except FxgraftError:  # a position that depends on values outside the block is not listed
                continue
            if site is None or site.edits is None or site.edits.evaluation in seen:
                continue
            seen.append(site.edits.evaluation)
            layout = layout_word(trace, site.value)
            listed.append(dataclasses.replace(site, name=f"{residual.name}:{position}", layout=layout))
    return listed


def _all(trace: ModelTrace, position: str) -> list[Site]:
    """Find all sites of a position, once for all grafts that are planned with a trace."""
    find = _residual if position in RESIDUAL else dense_layers if position in DENSE else _plain
    return list(trace.once(("positions", position), lambda own: tuple(find(own, position))))


def _residual(trace: ModelTrace, position: str) -> list[Site]:
    sites = (_position(trace, residual, position) for residual in residual_joins(trace))
    return [site for site in sites if site is not None]


def _position(trace: ModelTrace, residual: Join, position: str) -> Site | None:
    """Return the site of one position of a join; None where the join has no such position.

    Raises:
        StructureError: the position depends on a shortcut that is made outside of the block.
    """
    site = residual.sites.get({"output": "post", "pre_with_projection": "pre"}.get(position, position))
    if site is None or site.position == position:
        return site
    if position == "output":
        node = _handed_on(trace, residual.owner, site.node)
        edits = Edits(residual.owner, After(node), After(training_name(trace, residual.owner, node)))
        site = dataclasses.replace(site, node=node, value=trace.values(residual.owner).get(node))
    else:
        pre, identity = edits_of(trace, site), edits_of(trace, residual.sites["identity"])
        graphs = [trace.graph(residual.owner, training).graph for training in (False, True)]
        edits = Edits(
            residual.owner,
            _with_projection(trace, residual, graphs[0], pre.evaluation, identity.evaluation),
            _with_projection(trace, residual, graphs[1], pre.training, identity.training),
        )
    op = site.op.replace(site.position, position, 1)
    return dataclasses.replace(site, op=op, edits=edits, position=position)


def _with_projection(trace: ModelTrace, residual: Join, graph: fx.Graph, pre: Edit, identity: Edit) -> Edit:
    """Extend the edit of a fork to the node that projects the shortcut, if there is a projection."""
    nodes = {node.name: node for node in graph.nodes}
    if not isinstance(pre, Edge) or not isinstance(identity, Edge):
        return pre
    fork, shortcut = nodes[pre.node], nodes[identity.node]
    way = {node for node in downstream_of(fork) & {*upstream_of(shortcut), shortcut} if node is not fork}
    if shortcut is not fork and not way:
        raise StructureError(
            f"The shortcut that {residual.name!r} adds is an argument of {residual.owner!r}, made by its caller.\n"
            "What it is made from cannot be changed from inside of the block.\n"
            'Pass position="pre", which leaves the shortcut as it is.'
        )
    if steps_of(trace).all_of(residual.owner, way) <= {"drop", "scale"}:
        return pre
    return Edge(pre.node, tuple(user.name for user in fork.users if user.name in pre.users or user in way))


def _handed_on(trace: ModelTrace, owner: str, total: str) -> str:
    """Follow a sum to the last activation that acts on it alone, by name; the sum itself where there is none."""
    values = trace.values(owner)
    node = next(node for node in trace.graph(owner, training=False).graph.nodes if node.name == total)
    last = node
    while len(node.users) == 1:
        before, node = node, next(iter(node.users))
        if node.op not in ("call_module", "call_function", "call_method"):
            break
        module = trace.module(join(owner, str(node.target))) if node.op == "call_module" else None
        if module is not None and is_kind(module, "norm"):
            last = node if any(is_kind(part, "act") for part in module.children()) else last
            continue
        steps = _operators(trace, module, node, values.get(before.name))
        if steps is None:
            break
        last = node if steps else last
    return last.name


# These work element by element, but torch doesn't tag them as pointwise.
_ELEMENTWISE = {"hardswish", "hardswish_", PRELU, "log_sigmoid_forward", "rrelu_with_noise"}
_BESIDE = {"view", "empty_like", "add", "sub", "mul", "div", "neg"}
"""What an activation may do as well."""


class _Recorder(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _operators(trace: ModelTrace, module: nn.Module | None, node: fx.Node, value: Any) -> list[str] | None:
    """Name the operators of an activation: a step that works element by element, and not by arithmetic alone.

    Returns:
        None where the step is something else; an empty list where it does nothing in evaluation.
    """
    inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
    if len(inputs) != 1 or node.args[:1] != (inputs[0],) or len(node.all_input_nodes) > 1:
        return None
    call: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else module or node.target
    recorder = _Recorder()

    def run(x: Tensor) -> Any:
        with recorder:
            return call(x, *node.args[1:], **node.kwargs)

    try:
        with preserved_random_state(), preserved_modes(module or nn.Identity()):
            for part in module.modules() if module is not None else ():
                part.training = False
            result = trace.observation.run(run, value)
    except Exception:  # a step that fails when it runs by itself isn't an activation
        return None
    names = [operator._schema.name.partition("::")[2] for operator in recorder.seen]
    pointwise = (torch.Tag.pointwise in operator.tags for operator in recorder.seen)
    if (
        not isinstance(result, Tensor)
        or result.shape != value.shape
        or not all(
            known or name in _ELEMENTWISE | _BESIDE for known, name in zip(pointwise, names, strict=True)
        )
    ):
        return None
    acting = [name for name in names if name.rstrip("_") not in _BESIDE]
    return acting if acting or not names else None


def _plain(trace: ModelTrace, position: str) -> list[Site]:
    sites = []
    calls = trace.observation.calls
    for path in trace.in_order():
        if not path or not is_kind(trace.module(path), position):
            continue
        value = calls[path][0].output
        if not isinstance(value, Tensor) or value.ndim < 3:
            continue
        site = module_site(trace, path)
        if site.on_module:
            sites.append(dataclasses.replace(site, position=position, block=path))
            continue
        called_as = relative(path, site.owner)
        try:
            nodes = trace.graph(site.owner, training=False).graph.nodes
        except TraceError:
            continue
        for number, node in enumerate(n for n in nodes if n.op == "call_module" and n.target == called_as):
            sites.append(
                dataclasses.replace(
                    site,
                    name=f"{path}_{number}" if number else path,
                    node=node.name,
                    value=calls[path][number].output if number < len(calls[path]) else value,
                    edits=Edits(site.owner, After(node.name), After(node.name)),
                    position=position,
                    block=site.owner,
                )
            )
    return sites


def _from_classifier_on(trace: ModelTrace) -> set[str]:
    """Find the modules from the last one with weights on, where each image's output is one vector.

    Maps there are maps of logits: a unit on them would change the predictions, not the features.
    """
    paths: set[str] = set()
    output = trace.observation.output("")
    if isinstance(output, Tensor) and output.ndim == 2:
        for path in reversed(trace.in_order()):
            paths.add(path)
            if any(True for _ in trace.module(path).parameters(recurse=False)):
                break
    return paths


def is_kind(module: nn.Module, kind: str) -> bool:
    """Say whether a module is a convolution ("conv"), a norm ("norm") or an activation ("act")."""
    if kind == "conv":
        return isinstance(module, ConvNd)
    if kind == "norm":
        return isinstance(module, _NORMS) or type(module).__name__.endswith(
            ("Norm", "Norm2d", "NormAct", "NormAct2d")
        )
    home = type(module).__module__
    return home.startswith(("torch.nn.modules.activation", "timm.layers.activations")) and not isinstance(
        module, nn.MultiheadAttention
    )


def _named(trace: ModelTrace, word: str | int, every: Callable[[], list[Site]]) -> list[Site]:
    """Resolve one word: blocks that it names or holds, else the value that it names."""
    if word == IMAGE and IMAGE not in trace.observation.calls:
        image = trace.observation.calls[""][0].args[0]
        return [Site(IMAGE, "", value=image, edits=Edits("", Input(), Input()), position=IMAGE)]
    if isinstance(word, str) and ":" in word:
        name, _, position = word.rpartition(":")
        if position not in RESIDUAL:
            raise SiteError(
                f"{word!r} names no position of a residual join.\nThey are {', '.join(map(repr, RESIDUAL))}."
            )
        sites = _all(trace, position)
        exact = [dataclasses.replace(site, name=word) for site in sites if site.name == name]
        if exact:
            return exact[:1]
        raise SiteError(
            f"There is no residual join {name!r} with a position {position!r}.\n"
            f"{candidates(name, [site.name for site in sites])}\n"
            'fxgraft.sites(model, "residual") lists all of them.'
        )
    blocks = every()
    if isinstance(word, str):
        wanted = [site for site in blocks if _holds(word, site)]
        if wanted:
            return wanted
    chosen: list[Site] = []
    for site in resolve(trace, word):
        inside = [block for block in blocks if site.path and _holds(site.path, block)]
        own = dataclasses.replace(site, block=site.path or site.owner)
        chosen += [block for block in inside if _holds_places(block)] or [own]
    return chosen


def _holds(word: str, site: Site) -> bool:
    """Say whether a word names a position of a block, the block, or a module around it."""
    if is_glob(word):
        return matches(word, site.block) or matches(word, site.name)
    return word in (site.name, site.block) or site.block.startswith(word + ".")


def no_positions(site: Site) -> SiteError:
    """Make the error that says that a value is no map or tokens of single images with more than one place."""
    return SiteError(
        f"{site.name!r} has no positions: its value is "
        f"{'no tensor' if site.shape is None else f'of shape {site.shape}'}.\n"
        "Maps or tokens of more than one position are needed, one row of the batch per image.\n"
        "Choose an earlier layer, or pass the input_size=(C, H, W) that you train at."
    )


def _holds_places(site: Site) -> bool:
    """Say whether a value is maps or tokens of single images, batch first, with more than one place."""
    value = site.value
    if (
        not isinstance(value, Tensor)
        or value.ndim < 3
        or not value.is_floating_point()
        or value.shape[0] != 2
    ):
        return False
    if images_merged(value):
        return False
    if layout_of_value(value) is not None:
        return places_in(value) > 1
    return value[0].numel() > max(value.shape[1], value.shape[-1])


def _nowhere(trace: ModelTrace, position: str, sites: list[Site]) -> StructureError | SiteError:
    model = trace.name
    if sites:
        shapes = ", ".join(f"{site.name} {site.shape or ''}".strip() for site in sites[:8])
        before = " in front of its classifier" if position in PLAIN else ""
        return SiteError(
            f"No {position!r} of {model}{before} has a map of more than one position: {shapes}.\n"
            "Statistics over positions need several of them.\n"
            "Pass input_size=(C, H, W) of larger images, or layers= with other sites."
        )
    joined = [residual.name for residual in residual_joins(trace)] if position in RESIDUAL else []
    if joined:
        have = [names for names in RESIDUAL if names != position and _all(trace, names)]
        return StructureError(
            f"No residual join of {model} has a position {position!r}: {_few(joined)}.\n"
            "They add several branches one after the other, and no value is the end of all of them.\n"
            f"Pass position= one of {', '.join(map(repr, have))}, or layers= with the name of a site at the end of one "
            "branch."
        )
    joins = len(_all(trace, "post"))
    dense = len(_all(trace, DENSE[0]))
    parts = [f"{joins} residual joins", f"{dense} dense layers"]
    parts += [f"{len(_all(trace, kind))} {plural}" for kind, plural in _KINDS.items()]
    have = [p for p, n in zip((RESIDUAL, DENSE, *([k] for k in PLAIN)), parts, strict=True) if n[0] != "0"]
    offers = ", ".join(repr(name) for group in have for name in group if name != position)
    what = "residual join" if position in RESIDUAL else "dense layer" if position in DENSE else position
    what = "dense layer of two convolutions" if position == DENSE[2] and dense else what
    sums = candidate_sums(trace) if position in RESIDUAL else []
    undecided = f" Sums that aren't joins as far as can be seen: {_few(sums)}." if sums else ""
    closed = closed_blocks(trace) if position in RESIDUAL else []
    undecided += f" Modules that cannot be looked into: {_few(closed)}." if closed else ""
    named = ", as " + repr((sums or closed)[0]) if sums or closed else ""
    return StructureError(
        f"There is no {what} in {model}, so it has no position {position!r}.\n"
        f"Found: {', '.join(parts)}.{undecided}\n"
        f"Pass position= one of {offers or 'none'}, or layers= with the names of sites{named}."
    )


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
