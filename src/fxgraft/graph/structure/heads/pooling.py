"""Heads: the global average pooling, the layers between, and the linear classifier that a network may end in.

A head is found by walking back from the logits: one classifier, then layers with one input each, then an
average over all positions of a map. Modules on the way are opened as they are met, and only those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, fx, nn

from fxgraft._einops import is_einops_layer
from fxgraft._torch import AdaptiveAvgPoolNd, AvgPoolNd, ConvNd
from fxgraft.errors import StructureError, candidates
from fxgraft.graph.dataflow.axes import BATCH, CHANNEL, kind_of
from fxgraft.graph.dataflow.flow import mark_of
from fxgraft.graph.dataflow.graph_utils import scope_of, upstream_of
from fxgraft.graph.names import ancestors, class_name, join
from fxgraft.graph.structure.heads.outputs import logits_node
from fxgraft.graph.structure.heads.progressive_trace import OpaqueError, opening
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.tracer import is_primitive
from fxgraft.graph.tracing.values import Values, describe_node, node_name, tensor_inputs

# timm's own Linear differs under TorchScript only.
_LINEAR_FORWARDS = (nn.Linear.forward, TimmLinear.forward)
_CONVOLUTION_FORWARDS = tuple(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
_AVERAGES = (AdaptiveAvgPoolNd, AvgPoolNd)
SHAPES = {"flatten", "squeeze", "unsqueeze", "reshape", "view", "permute", "transpose", "contiguous"}
SHAPES |= {"rearrange"}
SHAPES |= {"getattr", "size", "getitem", "identity"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d"}
SCALES = {"mul", "imul", "div", "truediv", "itruediv", "neg"}
SQUASHING = {
    "sigmoid",
    "sigmoid_",
    "expit",
    "logsigmoid",
    "softmax",
    "log_softmax",
    "logsoftmax",
    "softmax2d",
}
"""What makes probabilities of logits, or their logarithms."""
SUMS = {"add", "iadd", "stack", "mean", "sum"}
_MAXIMA = {"amax", "max", "adaptive_max_pool2d", "adaptivemaxpool2d", "max_pool2d", "maxpool2d", "maximum"}
_MAXIMA |= {"adaptive_max_pool3d", "adaptivemaxpool3d", "max_pool3d", "maxpool3d"}
_ATTENTION = {"softmax", "scaled_dot_product_attention", "multiheadattention"}
_REMEDY = "Build the backbone with global_pool='avg' where it can be, or name another classifier, as head=..."


@dataclass(frozen=True)
class Pooling:
    """An average over all positions of a map.

    Attributes:
        channel: the dimension of the map that remains.
        keeps: whether averaged dimensions stay, with size one.
        window: the sizes of the only map that it averages whole; None where it does maps of any size.
    """

    channel: int
    keeps: bool
    window: tuple[int, ...] | None = None


@dataclass(frozen=True)
class HeadTrace:
    """A head in one trace.

    Attributes:
        maps: the value that is pooled.
        pool: the node that averages it.
        pooling: the kind of average that it takes.
        between: the nodes from the pooled value to what gives the logits, in running order.
        classifiers: the call of the linear layer or 1×1 convolution; several where their logits are put together;
            none where the maps hold classes already.
        end: what gives the logits: the classifier, or the node that puts those of several together.
        neutral: whether the nodes between only change the shape, or drop features in training.
        affine: whether they commute with averaging as they are, run at one position after the other.
    """

    maps: fx.Node
    pool: fx.Node
    pooling: Pooling
    between: tuple[fx.Node, ...]
    classifiers: tuple[fx.Node, ...]
    end: fx.Node
    neutral: bool
    affine: bool

    @property
    def classifier(self) -> fx.Node | None:
        """The classifier, where there is exactly one."""
        return self.classifiers[0] if len(self.classifiers) == 1 else None


def is_classifier(module: nn.Module) -> bool:
    """Say whether a module is one matrix applied to channels: a plain linear layer or convolution of one position."""
    if isinstance(module, nn.Linear):
        return type(module).forward in _LINEAR_FORWARDS
    return (
        isinstance(module, ConvNd)
        and type(module).forward in _CONVOLUTION_FORWARDS
        and {*module.kernel_size, *module.stride} == {1}
        and set(module.padding) == {0}
        and module.groups == 1
    )


def pooling_of(node: fx.Node, values: Values, weighted: bool = False) -> Pooling | None:
    """Return how a node averages over all positions; None if it doesn't.

    Args:
        node: the node.
        values: the values of its trace.
        weighted: whether an average counts that leaves positions out or weighs them, as windows that are smaller than
            the map, padded or divided by another number do. It is linear as well.
    """
    sources = tensor_inputs(node, values)
    if len(sources) != 1:
        return None
    value, result = values(sources[0]), values(node)
    if not isinstance(value, Tensor) or not isinstance(result, Tensor) or value.ndim not in (3, 4, 5):
        return None
    owner = values.owner
    name = node_name(node, owner)
    if node.op == "call_module" and isinstance(owner.get_submodule(str(node.target)), _AVERAGES):
        name = "avg_pool"
    if name == "avg_pool" or name[:-2] in ("adaptive_avg_pool", "avg_pool"):
        if result.ndim != value.ndim or any(size != 1 for size in result.shape[2:]):
            return None
        if not weighted and not _averages_whole(node, sources[0], values):
            return None
        return Pooling(1, True, _window(node, sources[0], values))
    if name == "reduce":  # of einops
        return _reducing(node, sources[0], values)
    if name != "mean":
        return None
    rest = node.args[1:]
    listed = node.kwargs.get("dim", rest[0] if rest else None)
    if node.op == "call_method" and isinstance(listed, int) and all(type(d) is int for d in rest):
        listed = rest or (listed,)
    dims = (listed,) if isinstance(listed, int) else listed
    if not isinstance(dims, (tuple, list)) or not all(type(d) is int for d in dims):
        return None
    left = set(range(1, value.ndim)) - {d % value.ndim for d in dims}  # type: ignore[operator]
    if 0 in {d % value.ndim for d in dims} or len(left) != 1:  # type: ignore[operator]
        return None
    return Pooling(left.pop(), result.ndim == value.ndim)


def _reducing(node: fx.Node, source: fx.Node, values: Values) -> Pooling | None:
    """Say what einops averages, whose pattern is a text: it is tried which dimensions make up the result."""
    value, result = values(source), values(node)
    drawn = torch.Generator().manual_seed(0)
    tried = torch.rand(value.shape, generator=drawn, dtype=torch.float64, device="cpu")
    found = _computed(node, {source: tried}, values)
    for channel in range(1, value.ndim):
        dims = [dim for dim in range(1, value.ndim) if dim != channel]
        for keeps in (False, True):
            mean = tried.mean(dims, keepdim=keeps)
            if mean.shape == result.shape and torch.allclose(found, mean):
                return Pooling(channel, keeps)
    return None


def averaged_before(node: fx.Node, values: Values) -> fx.Node:
    """Return what a value is an average of over some of the positions, step by step; the value itself if of nothing."""
    while True:
        sources = tensor_inputs(node, values)
        name = node_name(node, values.owner)
        if len(sources) != 1 or not (name == "mean" or "adaptive_avg" in name or "adaptiveavg" in name):
            return node
        before, after = values(sources[0]), values(node)
        mark = mark_of(after) if isinstance(after, Tensor) else None
        kinds = [] if mark is None else [kind_of(axis) for axis in mark.axes]
        # Of positions alone: images and channels are left.
        if kinds[:1] != [BATCH] or CHANNEL not in kinds or before.numel() == after.numel():
            return node
        node = sources[0]


def _averages_whole(node: fx.Node, source: fx.Node, values: Values) -> bool:
    """Say whether an average over windows is the plain mean of a map of the size that was observed.

    Kernel, padding, what padding counts for and the divisor have a part in it, so it is tried.
    """
    sizes = values(source).shape[2:]
    drawn = torch.Generator().manual_seed(0)
    tried = torch.rand((1, 1, *sizes), generator=drawn, dtype=torch.float64, device="cpu")
    found = _computed(node, {source: tried}, values)
    return torch.allclose(found.flatten(), tried.mean().flatten())


def _window(node: fx.Node, source: fx.Node, values: Values) -> tuple[int, ...] | None:
    """Return the sizes that a window of fixed sides was observed to cover; None where it follows the map's."""
    adaptive = "adaptive" in node_name(node, values.owner)
    read_off_the_map = node.op != "call_module" and len(node.all_input_nodes) > 1
    return None if adaptive or read_off_the_map else tuple(values(source).shape[2:])


def _computed(node: fx.Node, known: Mapping[fx.Node, Any], values: Values) -> Any:
    """Compute a node on real values of some of its inputs; the others are as observed."""
    args, kwargs = fx.map_arg(  # type: ignore[misc]
        (node.args, dict(node.kwargs)),
        lambda source: known[source] if source in known else values(source),
    )
    if node.op == "call_module":
        module = values.owner.get_submodule(str(node.target))
        return type(module).forward(module, *args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def logits_before(end: fx.Node, values: Values) -> fx.Node:
    """Return the value before a last sigmoid or softmax; the value itself where there is none."""
    if node_name(end, values.owner) not in SQUASHING:
        return end
    (before,) = tensor_inputs(end, values)
    return before


def head_in(trace: ModelTrace, path: str, traced: Traced, end: fx.Node) -> HeadTrace:
    """Walk back from the logits, or from a classifier, to the average over a map.

    Args:
        trace: the trace of the model.
        path: the module that was traced.
        traced: its trace.
        end: the node to start from.

    Raises:
        OpaqueError: a closed module is in the way.
        StructureError: there is no such head; says what stands in its place.
    """
    values = trace.values(path, traced)
    classifiers = tuple(_classifiers(end, values))
    if not classifiers:
        return _class_maps(end, values)
    pools = {}
    for classifier in classifiers:
        pools.setdefault(*_pooled(classifier, values))
    if len(pools) > 1:
        names = sorted({join(path, str(node.target)) for node in classifiers})
        if len(names) == 1:
            raise StructureError(
                f"{trace.name} calls its classifier {names[0]!r} {len(classifiers)} times, on averages of their own.\n"
                "One call can be rewritten, and here the logits of several are put together.\n"
                "Patch the part that is called, or give it the images of all calls in one batch."
            )
        raise StructureError(
            f"{trace.name} ends in {len(names)} classifiers: {', '.join(map(repr, names))}.\n"
            "Their logits are put together, and each reads an average of its own.\n"
            f"Name one, as head={names[0]!r}."
        )
    ((pool, pooling),) = pools.items()
    last = classifiers[0] if len(classifiers) == 1 else end
    between = _between(last, pool, values)
    (maps,) = tensor_inputs(pool, values)
    owner = trace.module(path)
    steps = [node for node in (*between, last) if node is not classifiers[0] and tensor_inputs(node, values)]
    neutral = all(node_name(node, owner) in SHAPES | DROPOUTS for node in steps)
    neutral = neutral and (len(classifiers) > 1 or _keeps_order(last, pool, between, values))
    affine = all(_affine(node, values) for node in steps)
    return HeadTrace(maps, pool, pooling, between, classifiers, last, neutral, affine)


def _keeps_order(classifier: fx.Node, pool: fx.Node, between: Sequence[fx.Node], values: Values) -> bool:
    """Say whether a classifier reads the features of a pooled vector in their order, each once.

    Changes of shape may shuffle them, and an index may choose some; numbers are sent through, since no name tells.
    """
    pooled = values(pool)
    numbered = torch.arange(pooled.numel(), dtype=torch.float64, device="cpu").reshape(pooled.shape)
    known: dict[fx.Node, Any] = {pool: numbered}
    try:
        for node in between:
            if node_name(node, values.owner) in DROPOUTS:
                known[node] = known[tensor_inputs(node, values)[0]]
            elif node.op != "get_attr":
                known[node] = _computed(node, known, values)
        (read,) = (known[source] for source in classifier.all_input_nodes if source in known)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return read.shape[0] == len(numbered) and torch.equal(read.flatten(1), numbered.flatten(1))


def _affine(node: fx.Node, values: Values) -> bool:
    owner = values.owner
    if node.op != "call_module":
        name = node_name(node, owner)
        return name in SHAPES | DROPOUTS | SUMS | {"linear"} or (
            name in SCALES and len(tensor_inputs(node, values)) == 1
        )
    module = owner.get_submodule(str(node.target))
    plain = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.BatchNorm1d, nn.BatchNorm2d)
    return type(module) in plain or only_reshapes(module) or is_classifier(module)


def only_reshapes(module: nn.Module) -> bool:
    """Say whether a module does no more than to give its input another shape."""
    return isinstance(module, (nn.Identity, nn.Flatten)) or is_einops_layer(module, "Rearrange")


def _classifiers(end: fx.Node, values: Values) -> Iterator[fx.Node]:
    """Yield the classifiers whose outputs make up the logits; none where something else does."""
    owner = values.owner
    waiting, classifiers = [end], []
    while waiting:
        node = waiting.pop()
        if node.op == "call_module":
            module = owner.get_submodule(str(node.target))
            if is_classifier(module) and values(node).shape[2:].numel() == 1:
                classifiers.append(node)
                continue
            if not is_primitive(module):
                raise OpaqueError(str(node.target))
        name = node_name(node, owner)
        sources = tensor_inputs(node, values)
        if not sources or name not in SHAPES | DROPOUTS | SCALES | SUMS | {"float", "to"}:
            return
        if pooling_of(node, values) is not None and not is_vector(values(sources[0])):
            return  # an average over one position changes the shape alone
        waiting += sources
    yield from classifiers


def _class_maps(end: fx.Node, values: Values) -> HeadTrace:
    """Recognise a head that classifies every position first: 1×1 convolution, perhaps an activation, average."""
    owner = values.owner
    node, pool, pooling = end, None, None
    while pooling is None:
        sources = tensor_inputs(node, values)
        pooling, pool = pooling_of(node, values), node
        if pooling is None and (len(sources) != 1 or node_name(node, owner) not in SHAPES | DROPOUTS):
            raise _no_classifier(end, values)
        node = sources[0]
    maps = node
    while node.op == "call_module" and isinstance(
        owner.get_submodule(str(node.target)), (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Dropout, nn.Identity)
    ):
        (node,) = tensor_inputs(node, values)
    module = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None and not is_primitive(module) and getattr(values.model, "num_classes", 1):
        raise OpaqueError(str(node.target))
    declared = getattr(values.model, "num_classes", None)
    fits = isinstance(module, ConvNd) and declared in (None, module.out_channels)
    if pool is None or module is None or not (fits and is_classifier(module)):
        raise _no_classifier(end, values)
    return HeadTrace(maps, pool, pooling, (), (), pool, True, True)


def _no_classifier(end: fx.Node, values: Values) -> StructureError:
    return StructureError(
        f"No linear classifier was found at the end of {class_name(values.model)}: its logits come from "
        f"{describe_node(end, values)}.\n"
        "A head is one linear layer behind an average over positions.\n"
        "Name that layer, as head=..., or give the model a classifier (num_classes above 0)."
    )


def _pooled(classifier: fx.Node, values: Values) -> tuple[fx.Node, Pooling]:
    """Follow the classifier's input back to the pooling."""
    owner = values.owner
    sources = _carried(classifier, values)
    if len(sources) != 1:
        raise _no_pooling(classifier, f"{len(sources)} inputs", values)
    while True:
        (node,) = sources
        sources = _carried(node, values)
        pooling = pooling_of(node, values)
        if pooling is not None:
            if _has_no_places(values(sources[0])):
                raise _no_pooling(classifier, "a class token", values)
            return node, pooling
        if node.op == "call_module" and not is_primitive(owner.get_submodule(str(node.target))):
            raise OpaqueError(str(node.target))
        if len(sources) > 1:
            sources = _one_vector(node, values) or sources
        reason = _obstacle(node, sources, values)
        if reason:
            raise _no_pooling(classifier, reason, values)


def _has_no_places(value: Tensor) -> bool:
    """Say whether all tokens of a value are class or register tokens, whose average is of no map."""
    mark = mark_of(value)
    runs = [factor.runs for axis in mark.axes for factor in axis if factor.runs] if mark is not None else []
    return any(not any(places for _, places in each) for each in runs)


def _carried(node: fx.Node, values: Values) -> list[fx.Node]:
    """List the tensors that a node works on, without those made from parameters alone (``weight.float()``)."""
    inputs = tensor_inputs(node, values)
    if len(inputs) < 2:
        return inputs
    return [source for source in inputs if any(n.op == "placeholder" for n in (source, *upstream_of(source)))]


def _one_vector(node: fx.Node, values: Values) -> list[fx.Node] | None:
    """Find the one pooled vector that all inputs of a node come from, as in a norm that is written out; or None."""
    waiting = {node}
    while all(is_vector(values(vector)) for vector in waiting):
        last = max(waiting)
        waiting = waiting - {last} | {*_carried(last, values)}
        if len(waiting) == 1:
            (met,) = waiting
            return [met] if is_vector(values(met)) else None
    return None


def is_vector(value: object) -> bool:
    """Say whether a value has one dimension beside the batch whose size isn't one."""
    return isinstance(value, Tensor) and value.shape[1:].numel() == max(value.shape[1:], default=0)


def _no_pooling(classifier: fx.Node, reason: str, values: Values) -> StructureError:
    return StructureError(
        f"The classifier {str(classifier.target)!r} of {class_name(values.model)} does not read the global "
        f"average of a map: it reads {reason}.\n"
        "A head is one linear layer behind an average over positions.\n"
        f"{_REMEDY}"
    )


def _obstacle(node: fx.Node, sources: list[fx.Node], values: Values) -> str | None:
    """Return why the walk back cannot go past a node, in words; None if it can."""
    owner = values.owner
    name = node_name(node, owner)
    scope = scope_of(node)
    shown = describe_node(node, values)
    inside = f" in {scope!r} ({type(owner.get_submodule(scope)).__name__})" if scope else ""
    around = scope.lower() + (type(owner.get_submodule(scope)).__name__.lower() if scope else "")
    if name in _MAXIMA:
        return f"a maximum over positions ({name}{inside})"
    if "gem" in around:
        return f"a generalised mean (GeM){inside}"
    if name in _ATTENTION or ("att" in around and "pool" in around):
        return f"attention pooling ({name}{inside})"
    if name in ("cat", "concat"):
        return f"several values joined ({name}{inside})"
    if len(sources) != 1:
        return f"{shown}, which has {len(sources)} inputs"
    before, after = values(sources[0]), values(node)
    if isinstance(before, dict):  # an entry of a closed module's output: the module is opened next
        return None
    if isinstance(before, (tuple, list)):
        return f"{shown}, one of several values"
    if name == "getitem" and before.ndim == 3 and after.ndim == 2:
        return "a class token"
    if name in ("select", "select_scatter") and before.ndim == 3:
        return "a class token"
    if not isinstance(after, Tensor) or after.ndim < 2:
        return shown
    if name in ("flatten", "view", "reshape") and after.ndim == 2 and max(before.shape[1:]) < after.shape[1]:
        return f"a whole map of shape {tuple(before.shape[1:])}, flattened"
    if not is_vector(before) and is_vector(after):
        return f"the output of {shown}, which isn't a plain average over positions"
    if not is_vector(after):
        return f"the output of {shown}, of shape {tuple(after.shape[1:])}"
    return None


def _between(classifier: fx.Node, pool: fx.Node, values: Values) -> tuple[fx.Node, ...]:
    """Collect what the classifier's input is computed from, down to the pooled value."""
    between: set[fx.Node] = set()
    waiting = list(classifier.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node is pool or node in between:
            continue
        if node.op == "placeholder" or (node < pool and node.op != "get_attr"):
            raise _no_pooling(classifier, f"{describe_node(node, values)} beside the pooled value", values)
        between.add(node)
        waiting += node.all_input_nodes
    return tuple(sorted(between))


def opened_head(
    trace: ModelTrace,
    head: str | None = None,
    output: str | int | None = None,
    entries: bool = False,
) -> tuple[Traced, HeadTrace, tuple[str, ...]]:
    """Find the head in the model's evaluation trace, opening modules as the walk meets them.

    Args:
        trace: the trace of the model.
        head: qualified name of the classifier, where the model has several.
        output: which entry of a structured output holds the logits.
        entries: whether to open a module as well that returns the map among other values.

    Returns:
        The trace, the head in it, and the names of the modules that were opened.
    """
    if head is not None:
        _check_named(trace, head)

    def search(traced: Traced) -> HeadTrace:
        if head is None:
            end = logits_before(
                logits_node(trace.values("", traced), output, trace.name), trace.values("", traced)
            )
        else:
            end = next(n for n in traced.graph.nodes if n.op == "call_module" and n.target == head)
        head_trace = head_in(trace, "", traced, end)
        holder = _holder(trace, head_trace.maps) if entries else None
        if holder is not None:
            raise OpaqueError(holder)
        return head_trace

    return opening(trace, False, search, ancestors(head or ""))


def _holder(trace: ModelTrace, node: fx.Node) -> str | None:
    """Name the closed module that returned a value among others; None where the value is no such entry."""
    while node_name(node, trace.model) in ("getattr", "getitem") and node.op == "call_function":
        (node,) = node.all_input_nodes
        if node.op == "call_module":
            path = str(node.target)
            alone = isinstance(trace.observation.output(path), Tensor) or is_primitive(trace.module(path))
            return None if alone else path
    return None


def _check_named(trace: ModelTrace, head: str) -> None:
    called = trace.observation.calls
    known = [path for path in called if path and is_classifier(trace.module(path))]
    if head not in called:
        raise StructureError(
            f"There is no layer {head!r} in a pass of {trace.name}.\n{candidates(head, known)}"
        )
    if head not in known:
        inner = [path for path in known if path.startswith(f"{head}.")]
        raise StructureError(
            f"{head!r} is a {type(trace.module(head)).__name__}, no linear layer or 1×1 convolution.\n"
            f"A head is named by its classifier.\n{candidates(head, inner or known)}"
        )
