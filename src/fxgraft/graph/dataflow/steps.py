"""Steps: what the nodes of a forward, and the modules that they call, do to the value that goes through them.

A step is described by a set of words:

    "scale": multiplied or shifted by parameters or constants alone      "drop": dropout or stochastic depth
    "affine": BatchNorm, fixed numbers per channel in evaluation         "norm": divided by the value's own statistics
    "pool": pooling over windows, resampling                             "act": a nonlinearity, entry by entry
    "reduce": mean, sum or maximum over dimensions                       "project": a convolution or linear layer
    "dense": such a layer that mixes channels                            "mix": attention, recurrence, anything unknown
    "gate": two values that both depend on the input are multiplied      "deep": an activation behind a projection
    "pick": one of several entries is taken

A step without a word only rearranges or adds. Closed modules are opened for their words.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from fxgraft._einops import is_einops_layer
from fxgraft._torch import (
    AdaptiveAvgPoolNd,
    AdaptiveMaxPoolNd,
    AvgPoolNd,
    BatchNorm,
    ConstantPadNd,
    ConvNd,
    DropoutNd,
    InstanceNorm,
    LPPoolNd,
    MaxPoolNd,
    ReflectionPadNd,
    ReplicationPadNd,
)
from fxgraft.errors import FxgraftError
from fxgraft.graph.names import join
from fxgraft.graph.tracing.branches import iadd
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.settings import acted_on

Words = frozenset[str]

ADDITIONS = {operator.add, operator.iadd, iadd, torch.add, "add", "add_"}
JOINING = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")
_NONE: Words = frozenset()

_VIEWS = {
    *(
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
        "moveaxis",
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "t",
    ),
    *("contiguous", "unsqueeze", "squeeze", "roll", "clone", "getitem", "getattr", "pad", "type_as"),
    *("expand", "expand_as", "repeat", "to", "float", "type", "detach", "narrow"),
    *(
        "index_select",
        "flip",
        "pixel_shuffle",
        "pixel_unshuffle",
        "adjoint",
        "fold",
        "unfold",
        "tile",
        "alias",
        "half",
    ),
    *("reshape_as", "view_as", "bfloat16", "held", *JOINING),
    *("rearrange", "pack", "unpack"),  # of einops
}
_PARTING = {"chunk", "split", "tensor_split", "unbind", "select"}
_SUMS = {"add", "iadd", "sub", "isub", "rsub", "subtract", "neg", "negative"}
_PRODUCTS = {"mul", "imul", "multiply", "truediv", "itruediv", "div", "divide", "lerp", "addcmul"}
_REDUCTIONS = {"reduce", "mean", "amax", "amin", "max", "min", "sum", "var", "std", "var_mean", "std_mean"}
_DROPS = ("dropout", "drop_path", "stochastic_depth", "drop_block")
_ACTS = {
    *(
        "relu",
        "relu6",
        "gelu",
        "silu",
        "sigmoid",
        "tanh",
        "hardtanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "mish",
    ),
    *(
        "hardswish",
        "hardsigmoid",
        "softplus",
        "clamp",
        "clip",
        "square",
        "pow",
        "exp",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
    ),
    *(
        "sin",
        "cos",
        "abs",
        "reciprocal",
        "softsign",
        "logsigmoid",
        "prelu",
        "threshold",
        "erf",
        "maximum",
        "minimum",
    ),
    *("hard_sigmoid", "hard_swish", "swish", "quick_gelu", "logsigmoid", "where", "masked_fill", "glu"),
}
ENTRY_BY_ENTRY = _SUMS | _PRODUCTS | _ACTS | {"dropout"}
"""Functions that work on the entries of their arguments one by one."""

_LAYERS = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "matmul", "einsum", "bmm"}
_SQUASHING = {"sigmoid", "hardsigmoid", "hard_sigmoid", "tanh", "logsigmoid", "softplus"}

PROJECTIONS = (ConvNd, nn.Linear, nn.Bilinear)
_NORM_MODULES = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    InstanceNorm,
)
_POOL_MODULES = (
    *(MaxPoolNd, AvgPoolNd, AdaptiveAvgPoolNd),
    *(AdaptiveMaxPoolNd, LPPoolNd, nn.Upsample),
)
_VIEW_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(
        ConstantPadNd,
        ReflectionPadNd,
        ReplicationPadNd,
    ),
)


def called(node: fx.Node) -> str:
    """Name the function that a node calls as torch does, without the mark of an operation in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.strip("_") if node.op != "call_module" else ""


def is_addition(node: fx.Node) -> bool:
    """Say whether a node adds."""
    return node.op in ("call_function", "call_method") and node.target in ADDITIONS


def is_size(node: fx.Node) -> bool:
    """Say whether a value is a tensor's size, arithmetic on sizes, or a new tensor made from a size alone."""
    if node.op == "call_method" and str(node.target).startswith(("size", "dim", "numel", "new_")):
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    if called(node).endswith("_like"):
        return True
    return bool(node.all_input_nodes) and all(is_size(source) for source in node.all_input_nodes)


def sources_of(node: fx.Node) -> list[fx.Node]:
    """List what a value is computed from. A value whose size alone is read does not count."""
    return [source for source in node.all_input_nodes if not is_size(source)]


def computed_from(ends: Iterable[fx.Node], around: fx.Node | None = None) -> set[fx.Node]:
    """Collect what values are computed from, except what can be reached only through the node ``around``."""
    nodes: set[fx.Node] = set()
    waiting = [end for end in ends if end is not around]
    while waiting:
        for source in sources_of(waiting.pop()):
            if source not in nodes and source is not around:
                nodes.add(source)
                waiting.append(source)
    return nodes


class Steps:
    """Describes the steps of a model's forwards. Ask `steps_of` for the one of a model.

    Args:
        trace: the trace of the bare model.
    """

    def __init__(self, trace: ModelTrace) -> None:
        self._anatomy = trace
        self._modules: dict[str, Words] = {}
        self._data: dict[fx.Graph, set[fx.Node]] = {}

    def data(self, owner: str, graph: fx.Graph) -> set[fx.Node]:
        """Collect the nodes of a graph that depend on the network's input; parameters and sizes don't."""
        if graph not in self._data:
            nodes: set[fx.Node] = set()
            values = self._anatomy.values(owner)
            for node in graph.nodes:
                if node.op == "placeholder":
                    # A placeholder that only the training graph has gets None here: most likely it is an input.
                    value = values.get(node.name)
                    if isinstance(value, (Tensor, list, tuple, dict, type(None))):
                        nodes.add(node)
                elif node.op != "output" and any(source in nodes for source in sources_of(node)):
                    nodes.add(node)
            self._data[graph] = nodes
        return self._data[graph]

    def of(self, owner: str, node: fx.Node) -> Words:
        """Describe one node of a module's graph."""
        if node.op == "call_module":
            return self.module(join(owner, str(node.target)))
        if node.op not in ("call_function", "call_method"):
            return _NONE
        inputs = [source for source in sources_of(node) if source in self.data(owner, node.graph)]
        name = called(node)
        if not inputs:
            return _NONE
        if name in _PARTING or (name == "getitem" and isinstance(node.args[1], int)):
            return frozenset() if called(node.all_input_nodes[0]) in _REDUCTIONS else frozenset({"pick"})
        if name in _VIEWS:
            return _NONE
        if name in _SUMS:
            return _NONE if len(node.all_input_nodes) > 1 else frozenset({"scale"})
        if name in _PRODUCTS:
            if len(inputs) > 1:
                return frozenset({"gate"})
            others = [source for source in node.all_input_nodes if source not in inputs]
            return frozenset({"drop" if any(map(_is_noise, others)) else "scale"})
        if name in _LAYERS or name.startswith("conv"):
            return frozenset({"project", "dense"} if len(inputs) == 1 else {"mix"})
        if name in _ACTS:
            return frozenset({"act"})
        if name in _REDUCTIONS:
            return frozenset({"reduce"})
        if name == "interpolate" or "pool" in name or "upsample" in name:
            return frozenset({"pool"})
        if "norm" in name:
            return frozenset({"affine" if name == "batch_norm" else "norm"})
        return frozenset({"drop" if any(word in name for word in _DROPS) else "mix"})

    def all_of(self, owner: str, nodes: Iterable[fx.Node]) -> Words:
        """Describe several nodes together."""
        nodes = set(nodes)
        words = {node: self.of(owner, node) for node in nodes}
        words_of_all = _NONE.union(*words.values())
        if not {"act", "project"} <= words_of_all:
            return words_of_all
        projections = {node for node in nodes if "project" in words[node]}
        behind = (computed_from([node]) for node in nodes if "act" in words[node])
        return words_of_all | {"deep"} if any(branch & projections for branch in behind) else words_of_all

    def depth(self, owner: str, nodes: Iterable[fx.Node]) -> int:
        """Count the projections in the longest chain of some nodes of a graph."""
        counted: dict[fx.Node, int] = {}
        for node in sorted(nodes):
            before = max((counted.get(source, 0) for source in node.all_input_nodes), default=0)
            counted[node] = before + ("project" in self.of(owner, node) and self._depth(owner, node))
        return max(counted.values(), default=0)

    def _depth(self, owner: str, node: fx.Node) -> int:
        path = join(owner, str(node.target))
        if node.op != "call_module" or isinstance(self._anatomy.module(path), PROJECTIONS):
            return 1
        try:
            graph = self._anatomy.graph(path, training=False).graph
        except FxgraftError:
            return 1
        return self.depth(path, (step for step in graph.nodes if step.op != "output"))

    def widths(self, owner: str, nodes: Iterable[fx.Node]) -> set[int]:
        """Collect how many channels the projections in some nodes of a graph give."""
        paths = (join(owner, str(node.target)) for node in nodes if node.op == "call_module")
        layers = (layer for path in paths for layer in self._anatomy.module(path).modules())
        counts = (
            getattr(layer, "out_channels", None) or getattr(layer, "out_features", None) for layer in layers
        )
        return {width for width in counts if isinstance(width, int)}

    def module(self, path: str) -> Words:
        """Describe what a call of a module does."""
        if path not in self._modules:
            self._modules[path] = frozenset({"mix"})  # a module that calls itself
            self._modules[path] = self._module(path)
        return self._modules[path]

    def _module(self, path: str) -> Words:
        module = self._anatomy.module(path)
        calls = self._anatomy.observation.calls
        children = [join(path, name) for name, _ in module.named_children()]
        inner = _NONE.union(*(self.module(child) for child in children if child in calls))
        if isinstance(module, _VIEW_MODULES) or is_einops_layer(module, "Rearrange"):
            return _NONE
        if is_einops_layer(module, "Reduce"):
            return frozenset({"reduce"})
        if is_drop(module):
            return frozenset({"drop"})
        if isinstance(module, ConvNd):
            per_channel = module.groups == module.in_channels == module.out_channels
            return frozenset({"project"} if per_channel else {"project", "dense"})
        if isinstance(module, PROJECTIONS):
            return frozenset({"project", "dense"})
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.Softmax)):
            return frozenset({"project", "dense", "mix"} if module.state_dict() else {"mix"})
        if isinstance(module, _NORM_MODULES):
            return inner | {"norm"}
        if isinstance(module, BatchNorm):
            return inner | {"affine"}
        if isinstance(module, _POOL_MODULES):
            return frozenset({"pool"})
        if type(module).__module__ == "torch.nn.modules.activation":
            return frozenset({"act"})
        return self._opened(path, inner)

    def _opened(self, path: str, inner: Words) -> Words:
        try:
            graph = self._anatomy.graph(path, training=False).graph
            output = next(node for node in graph.nodes if node.op == "output")
            inside = computed_from([output]) & self.data(path, graph)
            return self.all_of(path, inside)
        except FxgraftError:  # what cannot be opened may do anything
            return inner | {"mix"}


def steps_of(trace: ModelTrace) -> Steps:
    """Return the description of the steps of a model, made once."""
    return trace.once("steps", Steps)


def is_drop(module: nn.Module) -> bool:
    """Say whether a module is a dropout or stochastic depth, which does nothing in evaluation."""
    if isinstance(module, DropoutNd):
        return True
    # Stochastic depth has no common class: it is a module without tensors that keeps the training flag.
    stateless = next(iter(module.state_dict()), None) is None and not any(module.children())
    return stateless and ("drop_prob" in vars(module) or (hasattr(module, "mode") and hasattr(module, "p")))


def squashes(trace: ModelTrace, owner: str, node: fx.Node) -> bool:
    """Say whether a step brings a value into the bounds of a gate: a sigmoid, a hyperbolic tangent."""
    if node.op != "call_module":
        return called(node) in _SQUASHING
    path = join(owner, str(node.target))
    module = trace.module(path)
    if type(module) in (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus):
        return True
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return False
    # Such modules are many, and tracing them would take most of the time of a search for joins.
    settings = tuple(
        (name, value) for name, value in vars(module).items() if name[0] != "_" and name != "training"
    )
    if acted_on(module) or not all(isinstance(value, (bool, int, float, str)) for _, value in settings):
        return _forward_squashes(trace, path)
    return trace.once(("squashes", type(module), settings), lambda own: _forward_squashes(own, path))


def _forward_squashes(trace: ModelTrace, path: str) -> bool:
    try:
        graph = trace.graph(path, training=False).graph
    except FxgraftError:
        return False
    return any(squashes(trace, path, step) for step in graph.nodes if step.op != "call_module")


def _is_noise(node: fx.Node) -> bool:
    """Say whether a value is drawn at random."""
    drawn = {node} | computed_from([node])
    return any(called(draw).startswith(("bernoulli", "rand", "uniform", "normal")) for draw in drawn)
