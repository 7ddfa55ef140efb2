"""A head applied at every position of its map instead of to the average, for a score per class and position.

Pooling and a linear classifier may change places: the average of the scores at all positions is the classifier's
answer for the average. Layers between the two are run on the positions as if each were a pooled vector.
What must not differ from position to position does not: dropout draws one mask per image, and norms have the
statistics of the pooled vectors (which is what BatchNorm keeps), so both commute with the average exactly. An
activation does not: it acts on every position, and the average is another number than the network's. That is what
`PositionwiseHead.inexact` names.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, fx, nn

from fxgraft._torch import NormBase
from fxgraft.errors import BypassError, SiteError, StructureError
from fxgraft.graph.dataflow.graph_utils import cut, modules_in, placeholders, upstream_of
from fxgraft.graph.names import class_name, join
from fxgraft.graph.structure.heads import pooled_vectors
from fxgraft.graph.structure.heads.head import Head, token_grid
from fxgraft.graph.structure.heads.linear import made_by_hooks
from fxgraft.graph.structure.heads.pooling import (
    DROPOUTS,
    SCALES,
    SHAPES,
    SUMS,
    HeadTrace,
    is_classifier,
    is_vector,
    only_reshapes,
    opened_head,
)
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.preserve import preserved_modes
from fxgraft.graph.tracing.settings import acted_on, plain_settings, settings_changed
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.values import Values, describe_node, node_name

Positions = Callable[..., Tensor]
"""``f(module, rows, positions) -> rows``: layers on (B·N, ...) rows, the N positions of an image together."""


Pairwise = Callable[..., tuple[Any, Tensor]]
"""``f(layer, pooled, rows, positions, ...) -> (pooled, rows)``: a layer on the pooled vectors and on all positions."""

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d)
_REDUCTIONS = {
    "mean",
    "sum",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "vector_norm",
    "amax",
    "amin",
    "logsumexp",
}
_LINEAR = {"sub", "isub", "rsub", "float", "half", "double", "bfloat16", "to", "type", "type_as"}


class PositionwiseHead:
    """Computes class scores at every position of the value that a head pools, with the layers a model has then.

    Args:
        path: the module in whose trace the head was found.
        head: the head there.
        traced: the trace.
        grid: (H, W) or (T, H, W) of a map of tokens.
        trace: the trace of the model.

    Attributes:
        inexact: the steps between pooling and classifier that don't commute with the average, for messages. If there
            are none, the scores of all positions average to the logits exactly.
    """

    def __init__(
        self, path: str, head: HeadTrace, traced: Traced, grid: tuple[int, ...] | None, trace: ModelTrace
    ) -> None:
        self.path = path
        self.head = head
        self.grid = grid
        self.classifiers = tuple(str(node.target) for node in head.classifiers)
        values = trace.values(path, traced)
        owner = values.owner  # kept no longer than this: they hold the model
        self.between: Positions | None = None
        self.inexact: tuple[str, ...] = ()
        if not _only_shapes(head, owner):
            self.between, self.inexact = _per_position(head, traced, owner, values)
        passed = {*modules_in([head.pool, *head.between, *head.classifiers, head.end])}
        self.bypassed = tuple(sorted(passed))
        names = sorted({*modules_in([head.pool, *head.between])} - {*self.classifiers})
        self.identities = {name: trace.original(join(path, name)) for name in names}
        self.settings = {name: plain_settings(owner.get_submodule(name)) for name in names}

    def stale(self, model: nn.Module) -> bool:
        """Say whether layers of the head, other than its classifier, were replaced or set otherwise."""
        try:
            owner = model.get_submodule(self.path)
            layers = [owner.get_submodule(name) for name in self.classifiers]
            if not all(is_classifier(layer) and not made_by_hooks(layer) for layer in layers):
                return True
            if any(owner.get_submodule(name) is not module for name, module in self.identities.items()):
                return True
        except AttributeError:
            return True
        return any(settings_changed(self.identities[n], {"": kept}, {}) for n, kept in self.settings.items())

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return class scores (B, K, H, W), of clips and volumes (B, K, T, H, W), for what the head pools.

        Args:
            model: the model, whose layers are looked up by name.
            x: in the layout of the head: a map or volume, channels first or last, or tokens (B, N, C).
        """
        space, positions = self._space(x)
        owner = model.get_submodule(self.path)
        self._check_bypassed(model, owner)
        pooling = self.head.pooling
        if not self.classifiers:
            return x if pooling.channel == 1 else x.movedim(pooling.channel, 1)
        if self.between is None and pooling.channel == 1 and x.ndim > 3:
            weight, bias = self._matrix(owner)
            # Faster than a matrix product, which would have to bring channels to the end first.
            convolve = F.conv2d if x.ndim == 4 else F.conv3d
            return convolve(x, weight.view(*weight.shape[:2], *[1] * (x.ndim - 2)), bias)
        rows = x.movedim(pooling.channel, -1).flatten(0, -2)
        if self.between is not None:
            if pooling.keeps:
                rows = rows.view(
                    -1, *(rows.shape[1] if d == pooling.channel else 1 for d in range(1, x.ndim))
                )
            rows = self.between(owner, rows, positions).flatten(1)
        if len(self.classifiers) == 1:
            weight, bias = self._matrix(owner)
            rows = F.linear(rows, weight.flatten(1), bias)
        return rows.view(x.shape[0], *space, rows.shape[1]).movedim(-1, 1)

    def _check_bypassed(self, model: nn.Module, owner: nn.Module) -> None:
        """Raise where hooks or the like act on calls of the layers: these run here without being called."""
        acting = [name for name in self.bypassed if acted_on(owner.get_submodule(name))]
        if acting:
            names = ", ".join(repr(join(self.path, name)) for name in acting)
            raise BypassError(
                f"{names} of this {model._get_name()} has hooks or a forward of its own, and the head runs its layers "
                "at every position instead of calling them.\n"
                "What these change would be missing here and act everywhere else.\n"
                "Remove the hooks for the training (handle.remove()), or write what they do as a layer of the model."
            )

    def _matrix(self, owner: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the one classifier, as it is now."""
        layer: Any = owner.get_submodule(self.classifiers[0])
        return gathered(layer.weight), None if layer.bias is None else gathered(layer.bias)

    def _space(self, x: Tensor) -> tuple[tuple[int, ...], int]:
        sizes = [size for d, size in enumerate(x.shape) if d not in (0, self.head.pooling.channel)]
        window = self.head.pooling.window
        if window is not None and tuple(sizes) != window:
            raise SiteError(
                f"A map of {'×'.join(map(str, sizes))} reaches the head, whose window averages maps of "
                f"{'×'.join(map(str, window))} whole, and leaves out positions of this one.\n"
                "A score per position stands for the average of all positions.\n"
                "Train on images of one size, patched with input_size= of these, or pool by "
                f"nn.AdaptiveAvgPool{len(window)}d(1)."
            )
        if len(sizes) > 1:
            return tuple(sizes), math.prod(sizes)
        known = self.grid
        if known is not None and math.prod(known) == sizes[0]:
            return known, sizes[0]
        if known is not None and known[0] == 1:  # a row, as of a signal, of another length
            return (1, sizes[0]), sizes[0]
        side = round(sizes[0] ** 0.5)
        if side * side != sizes[0] or (known is not None and len(known) > 2):
            seen = "" if known is None else f" (the model was looked at with {'×'.join(map(str, known))})"
            raise SiteError(
                f"{sizes[0]} tokens reach the head, and they aren't a grid{seen}.\n"
                "A score per position needs the place of every token; patch dropout loses it.\n"
                "Switch patch dropout off, or pass input_size= of the images you train on."
            )
        return (side, side), sizes[0]


def gathered(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, whole where its layer is a shard of its own (FSDP2).

    A layer that is not called is not gathered by FSDP2. The gradients of its shards are averaged, as FSDP2 does.
    """
    gather = getattr(parameter, "full_tensor", None)
    if gather is None:
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor) or not parameter.requires_grad:
        return gather()
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def _only_shapes(head: HeadTrace, owner: nn.Module) -> bool:
    """Say whether nothing between pooling and classifier computes anything."""
    if not head.neutral:
        return False
    calls = [owner.get_submodule(str(node.target)) for node in head.between if node.op == "call_module"]
    dropouts = any(getattr(node.target, "__name__", "").startswith("dropout") for node in head.between)
    return not dropouts and all(map(only_reshapes, calls))


@dataclass
class _Roles:
    """The roles of the nodes between pooling and classifier: which run at every position, and which once.

    Attributes:
        varying: nodes whose values differ between positions.
        statistics: nodes with one value per image: statistics over a vector's channels, and what depends on them alone.
        special: how to run layers that, run row by row, would not commute with the average.
        rows: nodes that are needed at every position.
        pooled: nodes that are needed for the pooled vectors.
        inexact: nodes that don't commute with the average.
    """

    varying: set[fx.Node]
    statistics: set[fx.Node]
    special: dict[fx.Node, Pairwise]
    rows: set[fx.Node]
    pooled: set[fx.Node]
    inexact: list[fx.Node]

    @classmethod
    def of(cls, order: list[fx.Node], pool: fx.Node, end: fx.Node, values: Values) -> _Roles:
        """Give every node its role, in running order.

        Statistics are taken of the pooled vector alone: a norm at a position then has the pooled vector's mean and
        deviation, is linear in the position, and commutes with the average. If another step doesn't commute, that
        gains nothing, and every position has statistics of its own.
        """
        roles = cls._with(order, pool, end, values, True)
        if not roles.inexact and end in roles.varying:
            return roles
        return replace(cls._with(order, pool, end, values, False), inexact=roles.inexact or [end])

    @classmethod
    def _with(cls, order: list[fx.Node], pool: fx.Node, end: fx.Node, values: Values, shared: bool) -> _Roles:
        varying, statistics = {pool}, set[fx.Node]()
        for node in order:
            inputs = [source for source in node.all_input_nodes if source in varying or source in statistics]
            tensors = [source for source in inputs if not _is_size(values(source))]
            if inputs:
                alone = bool(tensors) and all(tensor in statistics for tensor in tensors)
                frozen = alone or (shared and _reduces(node, tensors, values))
                (statistics if frozen else varying).add(node)
        special = {node: _special(node, values.owner) for node in order if node in varying}
        known = {node: run for node, run in special.items() if run and (shared or run not in _BY_IMAGE)}
        rows, pooled = {end}, set[fx.Node]()
        for node in reversed(order):
            seeing = known.get(node) in _SEEING
            for source in node.all_input_nodes:
                if node in rows and source in varying:
                    rows.add(source)
                if node in pooled or (node in rows and (seeing or source in statistics)):
                    pooled.add(source)
        inexact = [node for node in order if node in rows and not _commutes(node, varying, values)]
        return cls(varying, statistics, known, rows, pooled, inexact)


def _is_size(value: object) -> bool:
    return isinstance(value, (int, torch.Size, torch.dtype, torch.device))


def _reduces(node: fx.Node, inputs: list[fx.Node], values: Values) -> bool:
    """Say whether a node reduces a vector's channels to one number."""
    if not inputs or node_name(node, values.owner) not in _REDUCTIONS:
        return False
    value, out = values(inputs[0]), values(node)
    out = out[0] if isinstance(out, tuple) else out
    if not is_vector(value) or not isinstance(out, Tensor) or not out.ndim:
        return False
    return len(out) == len(value) and out.numel() < value.numel()


def _commutes(node: fx.Node, varying: set[fx.Node], values: Values) -> bool:
    """Say whether a node's results at all positions average to its result for the average."""
    owner = values.owner
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        layer = _special(node, owner) is not None or is_classifier(module)
        plain = layer or only_reshapes(module) or isinstance(module, FrozenBatchNormAct2d)
        return plain and _inert(getattr(module, "act", None))
    name = node_name(node, owner)
    inputs = [source for source in node.all_input_nodes if source in varying and not _is_size(values(source))]
    if name in SCALES | {"matmul"}:
        divided = name in ("div", "truediv", "itruediv") and [
            source for source in node.args[1:] if source in inputs
        ]
        return len(inputs) == 1 and not divided
    if name == "linear":
        return inputs == [node.args[0] if node.args else node.kwargs["input"]]
    return name in SHAPES | DROPOUTS | SUMS | _LINEAR or node.target in pooled_vectors.NORMS


def _inert(module: object) -> bool:
    return module is None or type(module) is nn.Identity


def _per_position(
    head: HeadTrace, traced: Traced, owner: nn.Module, values: Values
) -> tuple[Positions, tuple[str, ...]]:
    """Compile what follows the pooling into a function of rows: up to the classifier, or to the logits of several.

    Returns:
        The function, and what in it does not commute with the average, for messages.
    """
    end = head.end if head.classifier is None else next(iter(head.classifier.all_input_nodes))
    # Parameters that are read in front of the pooling may be read again behind it.
    before = {node for node in upstream_of(head.pool) if node.op != "get_attr"}
    order = sorted(({end} | upstream_of(end)) - {head.pool} - before)
    roles = _Roles.of(order, head.pool, end, values)
    graph = fx.Graph()
    at_rows = {head.pool: graph.placeholder(head.pool.name)}
    positions = graph.placeholder("positions")
    once: dict[fx.Node, fx.Node] = {}
    if head.pool in roles.pooled:
        once[head.pool] = graph.call_function(pooled_vectors.average, (at_rows[head.pool], positions))

    def find(node: fx.Node) -> fx.Node:
        """Return a value at every position; statistics are repeated for the positions."""
        if node in roles.statistics and node not in at_rows:
            at_rows[node] = graph.call_function(pooled_vectors.repeated, (once[node], positions))
        return at_rows[node] if node in at_rows else once[node]

    for node in order:
        run = roles.special.get(node) if node in roles.rows else None
        if run is None:
            if node in roles.pooled or node not in roles.varying | roles.statistics:
                once[node] = graph.node_copy(node, once.__getitem__)
            if node in roles.rows & roles.varying:
                at_rows[node] = graph.node_copy(node, find)
            continue
        what, arguments, named = _call_of(graph, node, once)
        source = _source(node)
        pair = graph.call_function(
            run, (what, once.get(source), at_rows[source], positions, *arguments), named
        )
        once[node] = graph.call_function(operator.getitem, (pair, 0))
        at_rows[node] = graph.call_function(operator.getitem, (pair, 1))
    graph.output(at_rows[end])
    label = f"layers behind the pooling of {type(owner).__name__}"
    inexact = dict.fromkeys(describe_node(node, values) for node in roles.inexact)
    return compile_graph(graph, traced.runnable().constants, label), tuple(inexact)


def _source(node: fx.Node) -> fx.Node:
    """Return what a dropout or a norm is called with."""
    return node.args[0] if node.args else node.kwargs["input"]  # type: ignore[return-value]


def _call_of(
    graph: fx.Graph, node: fx.Node, once: dict[fx.Node, fx.Node]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return what is called, a layer or the name of a function, and its further arguments."""
    if node.op == "call_module":
        return graph.get_attr(str(node.target)), (), {}
    named = {key: value for key, value in node.kwargs.items() if key != "input"}
    args, kwargs = fx.map_arg((node.args[1:], named), once.__getitem__)  # type: ignore[misc]
    return getattr(node.target, "__name__", ""), args, kwargs


def _special(node: fx.Node, owner: nn.Module) -> Pairwise | None:
    """Choose how a layer is run where running it row by row would not commute with the average.

    Raises:
        StructureError: a layer that keeps statistics, which would be those of positions.
    """
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if name in ("batch_norm", "instance_norm"):
            raise _keeps_statistics(f"{name}()", owner)
        return (
            pooled_vectors.dropped_alike
            if node.target in _DROPOUTS
            else pooled_vectors.normed_alike
            if node.target in pooled_vectors.NORMS
            else None
        )
    if node.op != "call_module":
        return None
    module = owner.get_submodule(str(node.target))
    forward = type(module).forward
    if forward in (nn.Dropout.forward, nn.Dropout1d.forward, nn.Dropout2d.forward, nn.Dropout3d.forward):
        return _shared_dropout
    if forward in _BATCH_NORMS:
        return _batch_norm
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward, nn.GroupNorm.forward):
        return _layer_norm
    if isinstance(module, NormBase) or (
        not isinstance(module, FrozenBatchNormAct2d) and next(module.buffers(), None) is not None
    ):
        raise _keeps_statistics(f"{str(node.target)!r} ({type(module).__name__})", owner)
    return None


def _keeps_statistics(what: str, owner: nn.Module) -> StructureError:
    return StructureError(
        f"{what} stands between pooling and classifier of {class_name(owner)} and may keep statistics in training.\n"
        "Run at every position it would keep those of positions, which evaluation has none of.\n"
        "Replace it by a BatchNorm of torch.nn or timm, or build the model without it."
    )


def _shared_dropout(
    layer: Any, pooled: Tensor | None, rows: Tensor, positions: int
) -> tuple[Tensor | None, Tensor]:
    """Drop the same features at all positions of an image: the mask that the pooled vector would get."""
    if not layer.training or not layer.p:
        return pooled, rows
    grouped = pooled_vectors.by_image(rows, positions)
    mask = layer(torch.ones_like(grouped[:, 0], requires_grad=False))
    return None if pooled is None else pooled * mask, (grouped * mask.unsqueeze(1)).flatten(0, 1)


def _batch_norm(layer: Any, pooled: Tensor, rows: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Normalise positions with the statistics of the pooled vectors, which the layer sees and remembers."""
    together = layer.training and isinstance(layer, nn.SyncBatchNorm) and dist.is_initialized()
    if together and dist.get_world_size(layer.process_group) > 1:
        raise BypassError(
            "A SyncBatchNorm stands between pooling and classifier, and its statistics are those of all processes.\n"
            "The scores of positions would be normalised by those of one.\n"
            "Leave that layer a BatchNorm (convert the backbone without its head)."
        )
    act = getattr(layer, "act", None)
    # A norm with an activation in it: only the norm is shared by all positions.
    middle = layer(pooled) if _inert(act) else _NORM_ALONE[type(layer).forward](layer, pooled)
    if layer.training or layer.running_var is None:
        dims = [d for d in range(pooled.ndim) if d != 1]
        variance = pooled.float().var(dims, unbiased=False)
    else:
        variance = layer.running_var
    scale = torch.rsqrt(variance + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    out = pooled_vectors.around(pooled, middle, rows, positions, scale.view(1, -1, *[1] * (pooled.ndim - 2)))
    if _inert(act):
        return middle, out
    middle, out = _dropped(layer.drop, middle, out, positions)  # type: ignore[arg-type]
    return act(middle), act(out)  # type: ignore[misc]


def _dropped(drop: nn.Module, middle: Tensor, out: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    if type(drop).forward in (
        nn.Dropout.forward,
        nn.Dropout1d.forward,
        nn.Dropout2d.forward,
        nn.Dropout3d.forward,
    ):
        return _shared_dropout(drop, middle, out, positions)  # type: ignore[return-value]
    return drop(middle), drop(out)


def _layer_norm(layer: Any, pooled: Tensor, rows: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Normalise positions with the statistics of their pooled vector."""
    middle = layer(pooled)
    if isinstance(layer, nn.GroupNorm):
        scale = pooled_vectors.group_scale(pooled, layer.num_groups, layer.weight, layer.eps)
    else:
        centred = isinstance(layer, nn.LayerNorm)
        scale = pooled_vectors.layer_scale(pooled, layer.normalized_shape, layer.weight, layer.eps, centred)
    return middle, pooled_vectors.around(pooled, middle, rows, positions, scale)


_NORM_ALONE = {
    BatchNormAct2d.forward: nn.BatchNorm2d.forward,
    SyncBatchNormAct.forward: nn.SyncBatchNorm.forward,
}
_BATCH_NORMS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, *_NORM_ALONE)
_BY_IMAGE = (_layer_norm, pooled_vectors.normed_alike)
_SEEING = (_batch_norm, *_BY_IMAGE)
"""Which of the ways to run a layer need the pooled vector, those by image first."""


def position_scores(
    model: nn.Module, x: Tensor, head: str | None = None, output: str | int | None = None
) -> Tensor:
    """Compute a model's class scores by position, as it is in evaluation; their average is the logits.

    An activation between pooling and classifier doesn't commute with the average. Then the average is only close to the
    logits.

    Args:
        model: bare or patched; grafts that act in evaluation act here.
        x: images (B, C, H, W), clips or volumes (B, C, T, H, W). Gradients pass.
        head: qualified name of the classifier, where the model has several.
        output: which entry of a structured output holds the logits.

    Returns:
        (B, K, H, W), at the resolution of the last feature map; (B, K, T, H, W) for clips and volumes.

    Raises:
        StructureError: the model has no average-pooled linear head.
        BypassError: hooks or a forward of its own act on a layer of the head, which is not called here.
    """
    trace = ModelTrace(model, tuple(x.shape[1:]))
    traced, head_trace, _ = opened_head(trace, head, output)
    grid = token_grid(trace, traced, head_trace.maps, head_trace.pooling.channel)
    maps = PositionwiseHead("", head_trace, traced, grid, trace)
    graph = cut(placeholders(traced.graph), head_trace.maps)
    features = compile_graph(graph, traced.runnable(elsewhere=True).constants, f"feature map of {trace.name}")
    with preserved_modes(model):
        for module in model.modules():
            module.training = False
        return maps(model, features(model, x))


def positionwise(trace: ModelTrace, head: Head) -> PositionwiseHead:
    """Make the positionwise form of a head as the model trains."""
    return PositionwiseHead(head.owner, head.training, head.traced, head.grid, trace)
