"""Positions inside blocks: from "post", "conv1_post" or "conv" to the places in a model that are called so.

Three families: the four positions of a residual join, three positions of a densely connected layer, and the
outputs of all convolutions, norms or activations of a plain stack. Names of layers narrow each of them down.
Each family has a usual position, and a network's own is that of the first family that it has blocks of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError, candidates
from fxgraft.graph.structure.joins import POSITIONS as RESIDUAL
from fxgraft.graph.structure.joins import residual_joins
from fxgraft.graph.structure.layout import layout_of
from fxgraft.graph.structure.places import site_edit, value_at
from fxgraft.graph.structure.sites import Site, Words, is_glob, matches, module_site, resolve
from fxgraft.graph.structure.spot import Spot
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.editing import After, Edge, Input
from fxgraft.graph.tracing.names import join, relative
from fxgraft.graph.tracing.values import shape_of
from fxgraft.graph.tracing.walks import placeholders

DENSE = ("conv1_pre", "conv1_post", "conv2_post")
PLAIN = ("conv", "norm", "act")
IMAGE = "input"
USUAL = ("post", "conv1_pre", "conv")
"""Of residual, of densely connected and of plain networks."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_KINDS = {"conv": "convolutions", "norm": "norms", "act": "activations"}


def spots(anatomy: Anatomy, position: str | None = None, layers: Words | None = None) -> list[Spot]:
    """Find the places of one position, in running order.

    Args:
        anatomy: of the bare model.
        position: one of `RESIDUAL`, `DENSE` or `PLAIN`; the first of `USUAL` that the model has, if left out.
        layers: the blocks to use: names of blocks or of modules around them, globs, stage numbers, names of
            joins, "name:position" for another position of one join, "input" for the image. A name that
            holds no block with the position stands for its own output. All blocks by default, except those
            whose values have a single position (class-token blocks) or merge other things into the batch, and a
            convolution that is itself the classifier, with what follows it.

    Raises:
        StructureError: no block of the model has the position; says what there is.
        SiteError: no such layer, or one without maps or tokens.
    """

    @functools.cache
    def blocks() -> tuple[str, list[Spot]]:
        for each in USUAL if position is None else (position,):
            found = _all(anatomy, each)
            if found:
                return each, found
        return position or USUAL[0], []

    if layers is None:
        where, found = blocks()
        logits = _from_classifier_on(anatomy) if where in PLAIN else ()
        usable = [spot for spot in found if spot.usable and spot.path not in logits]
        if not usable:
            raise _nowhere(anatomy, where, found)
        return usable
    words = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    chosen: dict[str, Spot] = {}
    for word in words:
        for spot in _named(anatomy, word, lambda: blocks()[1]):
            if not spot.usable:
                raise SiteError(
                    f"{spot.name!r} has no positions: its value is "
                    f"{'no tensor' if spot.value is None else f'of shape {tuple(spot.value.shape)}'}.\n"
                    "Maps or tokens of more than one position are needed, one row of the batch per image.\n"
                    "Choose an earlier layer, or pass the input_size=(C, H, W) that you train at."
                )
            chosen[spot.name] = spot
    if not chosen:
        raise SiteError("No layer was named.\nLeave layers= out for all blocks.")
    return list(chosen.values())


def position_sites(anatomy: Anatomy) -> list[Site]:
    """List every residual join with its positions, for `fxgraft.sites`."""
    listed = []
    for each in residual_joins(anatomy):
        values = anatomy.values(each.owner)
        for position in RESIDUAL:
            if position not in each.edits:
                continue
            node = each.values[position]
            value = values.get(node)
            layout = layout_of(anatomy, value, "", strict=False) if isinstance(value, Tensor) else None
            listed.append(
                Site(
                    f"{each.name}:{position}",
                    each.owner,
                    node,
                    op=position,
                    shape=shape_of(value),
                    dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "",
                    layout=str(layout) if layout else "",
                )
            )
    return listed


def _all(anatomy: Anatomy, position: str) -> list[Spot]:
    if position in RESIDUAL:
        return _residual(anatomy, position)
    return _dense(anatomy, position) if position in DENSE else _plain(anatomy, position)


def _residual(anatomy: Anatomy, position: str) -> list[Spot]:
    found = []
    for each in residual_joins(anatomy):
        if position in each.edits:
            value = anatomy.values(each.owner).get(each.values[position])
            value = value if isinstance(value, Tensor) else None
            edits = each.edits[position], each.training_edits.get(position, each.edits[position])
            found.append(Spot(each.name, position, each.owner, *edits, value, "", each.owner))
    return found


def _dense(anatomy: Anatomy, position: str) -> list[Spot]:
    """Find layers that join their inputs and run two convolutions on them, one after the other."""
    found = []
    for owner in anatomy.in_order():
        module = anatomy.module(owner)
        if not any(isinstance(child, nn.Conv2d) for child in module.children()):
            continue
        try:
            edits = [_dense_edit(anatomy, owner, position, training) for training in (False, True)]
        except (TraceError, SiteError):
            continue
        if edits[0] is not None and edits[1] is not None:
            node = edits[0].node
            value = anatomy.values(owner).get(node)
            value = value if isinstance(value, Tensor) else None
            name = f"{owner}.{node}"
            onward = _onward(anatomy, owner, name) if position == "conv1_pre" else ()
            found.append(Spot(name, position, owner, edits[0], edits[1], value, "", owner, onward))
    return found


def _dense_edit(anatomy: Anatomy, owner: str, position: str, training: bool) -> After | None:
    joined, convs = _joined(anatomy, owner, training)
    if len(joined) != 1 or len(convs) != 2:
        return None
    if position == "conv1_pre":
        return After(joined[0].name)
    return After(convs[0 if position == "conv1_post" else 1].name)


def _joined(anatomy: Anatomy, owner: str, training: bool) -> tuple[list[fx.Node], list[fx.Node]]:
    """List where a forward joins inputs of its own, and its convolutions."""
    graph = anatomy.graph(owner, training).graph
    joined = [n for n in graph.nodes if n.target in (torch.cat, torch.concat) and _of_inputs(n)]
    convs = [
        node
        for node in graph.nodes
        if node.op == "call_module" and isinstance(anatomy.module(join(owner, str(node.target))), nn.Conv2d)
    ]
    return joined, convs


def _onward(anatomy: Anatomy, owner: str, name: str) -> tuple[Spot, ...]:
    """Find the values that a layer joins as the module around it uses them after the layer."""
    block = anatomy.caller(owner)
    try:
        evaluation, training = (_edges(anatomy, owner, block, mode) for mode in (False, True))
    except (TraceError, SiteError) as error:
        raise StructureError(
            f"{owner!r} joins its inputs, and {block or 'the model'!r} goes on using them in a way that cannot be "
            f"followed: {str(error).splitlines()[0]}\n"
            "What replaces its input before the first norm has to be what is concatenated onwards.\n"
            'Pass position="conv1_post" or "conv2_post", or layers= with names of sites.'
        ) from error
    values = anatomy.values(block)
    return tuple(
        Spot(f"{name}:{i}", "conv1_pre", block, edges[0], edges[1], values.get(edges[0].node), "", block)
        for i, edges in enumerate(zip(evaluation, training, strict=True))
    )


def _edges(anatomy: Anatomy, owner: str, block: str, mode: bool) -> list[Edge]:
    """Return, for each value that a layer joins, the edges to what uses it after the layer."""
    inner = anatomy.graph(owner, mode).graph
    called_as = relative(owner, block)
    graph = anatomy.graph(block, mode).graph
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == called_as]
    given = calls[0].all_input_nodes if len(calls) == 1 else []
    inputs = placeholders(inner)
    if len(given) != len(inputs):
        raise SiteError(
            f"it is called {len(calls)} times, with {len(given)} values for {len(inputs)} inputs."
        )
    joined = _joined(anatomy, owner, mode)[0][0].all_input_nodes
    sources = [given[inputs.index(each)] for each in joined]
    return [Edge(x.name, tuple(user.name for user in sorted(x.users) if calls[0] < user)) for x in sources]


def _of_inputs(node: fx.Node) -> bool:
    """Say whether a value is made of the module's own inputs and nothing else."""
    return all(source.op == "placeholder" for source in node.all_input_nodes)


def _plain(anatomy: Anatomy, position: str) -> list[Spot]:
    found = []
    calls = anatomy.observation.calls
    for path in anatomy.in_order():
        if not path or not is_kind(anatomy.module(path), position):
            continue
        value = calls[path][0].output
        if not isinstance(value, Tensor) or value.ndim < 3:
            continue
        site = module_site(anatomy, path)
        if site.on_module:
            found.append(_direct(anatomy, site, position))
            continue
        called_as = relative(path, site.owner)
        try:
            nodes = anatomy.graph(site.owner, training=False).graph.nodes
        except TraceError:
            continue
        for number, node in enumerate(n for n in nodes if n.op == "call_module" and n.target == called_as):
            edit = After(node.name)
            name = f"{path}_{number}" if number else path
            output = calls[path][number].output if number < len(calls[path]) else value
            found.append(Spot(name, position, site.owner, edit, edit, output, path, site.owner))
    return found


def _from_classifier_on(anatomy: Anatomy) -> set[str]:
    """Find the modules from the last one with weights on, where each image's output is one vector.

    Maps there are maps of the logits: a unit on them would change what is predicted, not what that is read from.
    """
    found: set[str] = set()
    output = anatomy.observation.output("")
    if isinstance(output, Tensor) and output.ndim == 2:
        for path in reversed(anatomy.in_order()):
            found.add(path)
            if any(True for _ in anatomy.module(path).parameters(recurse=False)):
                break
    return found


def is_kind(module: nn.Module, kind: str) -> bool:
    """Say whether a module is a convolution ("conv"), a norm ("norm") or an activation ("act")."""
    if kind == "conv":
        return isinstance(module, nn.modules.conv._ConvNd)
    if kind == "norm":
        return isinstance(module, _NORMS) or type(module).__name__.endswith(
            ("Norm", "Norm2d", "NormAct", "NormAct2d")
        )
    home = type(module).__module__
    return home.startswith(("torch.nn.modules.activation", "timm.layers.activations")) and not isinstance(
        module, nn.MultiheadAttention
    )


def _direct(anatomy: Anatomy, site: Site, position: str = "") -> Spot:
    owner, edit = site_edit(anatomy, site)
    value = value_at(anatomy, site)
    value = value if isinstance(value, Tensor) else None
    return Spot(site.name, position, owner, edit, edit, value, site.path, site.path or site.owner)


def _named(anatomy: Anatomy, word: str | int, every: Callable[[], list[Spot]]) -> list[Spot]:
    """Resolve one word: blocks that it names or holds, else the value that it names."""
    if word == IMAGE and IMAGE not in anatomy.observation.calls:
        image = anatomy.observation.calls[""][0].args[0]
        return [Spot(IMAGE, IMAGE, "", Input(), Input(), image, "", "")]
    if isinstance(word, str) and ":" in word:
        name, _, position = word.rpartition(":")
        if position not in RESIDUAL:
            raise SiteError(
                f"{word!r} names no position of a residual join.\nThey are {', '.join(map(repr, RESIDUAL))}."
            )
        exact = [spot for spot in _residual(anatomy, position) if spot.name == name]
        if exact:
            return [Spot(word, *list(vars(exact[0]).values())[1:])]
        raise SiteError(
            f"There is no residual join {name!r} with a position {position!r}.\n"
            f"{candidates(name, [spot.name for spot in _residual(anatomy, position)])}\n"
            'fxgraft.sites(model, "residual") lists all of them.'
        )
    blocks = every()
    if isinstance(word, str):
        wanted = [spot for spot in blocks if _holds(word, spot)]
        if wanted:
            return wanted
    sites = resolve(anatomy, word)
    found: list[Spot] = []
    for site in sites:
        inside = [spot for spot in blocks if site.path and _holds(site.path, spot)]
        found += [spot for spot in inside if spot.usable] or [_direct(anatomy, site)]
    return found


def _holds(word: str, spot: Spot) -> bool:
    """Say whether a word names a spot, its block, or a module around it."""
    if is_glob(word):
        return matches(word, spot.scope) or matches(word, spot.name)
    return word in (spot.name, spot.scope) or spot.scope.startswith(word + ".")


def _nowhere(anatomy: Anatomy, position: str, found: list[Spot]) -> StructureError | SiteError:
    model = anatomy.name
    if found:
        shapes = ", ".join(
            f"{spot.name} {tuple(spot.value.shape) if spot.value is not None else ''}".strip()
            for spot in found[:8]
        )
        before = " in front of its classifier" if position in PLAIN else ""
        return SiteError(
            f"No {position!r} of {model}{before} has a map of more than one position: {shapes}.\n"
            "Statistics over positions need several of them.\n"
            "Pass input_size=(C, H, W) of larger images, or layers= with other sites."
        )
    joins = len(_residual(anatomy, "post"))
    parts = [f"{joins} residual joins", f"{len(_dense(anatomy, 'conv1_post'))} dense layers"]
    parts += [f"{len(_plain(anatomy, kind))} {plural}" for kind, plural in _KINDS.items()]
    have = [p for p, n in zip((RESIDUAL, DENSE, *([k] for k in PLAIN)), parts, strict=True) if n[0] != "0"]
    offers = ", ".join(repr(each) for group in have for each in group)
    what = "residual join" if position in RESIDUAL else "dense layer" if position in DENSE else position
    return StructureError(
        f"There is no {what} in {model}, so it has no position {position!r}.\n"
        f"Found: {', '.join(parts)}.\n"
        f"Pass position= one of {offers or 'none'}, or layers= with the names of sites."
    )
