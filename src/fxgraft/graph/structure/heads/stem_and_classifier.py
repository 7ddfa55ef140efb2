"""Ends: the first linear layers that see the image, and the last ones, which give the logits.

Stems are found by walking forward from the image, classifiers by walking back from the logits. Modules are
opened as a walk meets them, one level at a time. What may stand between the image and a stem treats every
sample by itself and has nothing to learn; between a classifier and the logits everything is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxgraft._torch import ConvNd, NormBase
from fxgraft.errors import StructureError, TraceError
from fxgraft.graph.dataflow.graph_utils import cut, downstream_of, placeholders
from fxgraft.graph.names import ancestors
from fxgraft.graph.structure.heads.linear import is_derived, is_linear
from fxgraft.graph.structure.heads.outputs import logits_node, take_logits
from fxgraft.graph.structure.heads.pooling import (
    DROPOUTS,
    SCALES,
    SHAPES,
    SUMS,
    is_classifier,
    pooling_of,
)
from fxgraft.graph.structure.heads.probabilities import squashed_end
from fxgraft.graph.structure.heads.progressive_trace import OpaqueError, opening
from fxgraft.graph.structure.layout import Layout, LayoutName
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import tensors
from fxgraft.graph.tracing.settings import input_hooked
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.tracer import is_primitive
from fxgraft.graph.tracing.values import Values, describe_node, node_name, tensor_inputs

_LINEAR: dict[int, LayoutName] = {2: "NC", 3: "NLC", 4: "NHWC", 5: "NDHWC"}
_CONVOLVED: dict[int, LayoutName] = {3: "NCL", 4: "NCHW", 5: "NCDHW"}
_SIZES_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_SIZES_ONLY |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


_DERIVED = "makes its weight from other parameters (a parametrization, weight_norm, spectral_norm or pruning)"


@dataclass(frozen=True)
class Stem:
    """A layer that takes the image, or what was made of it sample by sample, to features.

    Attributes:
        path: its qualified name.
        layout: meaning of the dimensions of its output.
        shape: the shape of its output, batch first, as observed.
        before: ``f(model, image)``, what the layer gets of an image; None where that is the image itself.
    """

    path: str
    layout: Layout
    shape: tuple[int, ...]
    before: Callable[[nn.Module, Tensor], Tensor] | None

    def hooked(self, model: nn.Module) -> list[str]:
        """Name the layer and the modules around it whose forward pre-hooks ``before`` leaves out."""
        around = (*ancestors(self.path), self.path)
        return [name for name in around if input_hooked(model.get_submodule(name))]


def find_stems(trace: ModelTrace) -> tuple[Stem, ...]:
    """Find the first layers: all that the model sees of the image goes through them.

    Supported are convolutions over one to three dimensions, plain or with scaled weight standardisation and padding of
    any kind, and linear layers.

    Args:
        trace: the trace of the bare model.

    Raises:
        StructureError: the image meets something else first, or goes around the stems; says what.
    """
    traced, layers, _ = opening(trace, True, lambda traced: _first_layers(trace, traced))
    _, evaluated, _ = opening(trace, False, lambda traced: _first_layers(trace, traced))
    _check_same(trace, "first layers", [_path(n) for n in layers], [_path(n) for n in evaluated])
    values = trace.values("", traced)
    return tuple(_stem(trace, traced, node, values) for node in layers)


def find_classifiers(trace: ModelTrace, output: str | int | None = None) -> tuple[str, ...]:
    """Find the linear layers and 1×1 convolutions whose outputs make up the logits, by qualified name.

    Where there are several, their outputs are added, averaged or scaled into the logits.

    Args:
        trace: the trace of the bare model.
        output: which entry of a structured output holds the logits (B, K); None for the usual names.

    Raises:
        StructureError: the logits are made in another way; says what stands in the place.
    """
    out = trace.observation.output("")
    if isinstance(out, Tensor):  # known before a trace of the forward, which may be impossible
        _check_rows(trace, out)

    def search(traced: Traced) -> list[str]:
        return _last_layers(trace, traced, output)

    _, names, _ = opening(trace, True, search, alike=True)
    _, evaluated, _ = opening(trace, False, search, alike=True)
    _check_same(trace, "classifiers", names, evaluated)
    return tuple(names)


def _check_same(trace: ModelTrace, what: str, training: list[str], evaluation: list[str]) -> None:
    if sorted(training) != sorted(evaluation):
        raise StructureError(
            f"{trace.name} has other {what} in training ({', '.join(training)}) than in evaluation "
            f"({', '.join(evaluation)}).\nWhat is trained in one mode would not be what predicts in the other.\n"
            "Build the model without auxiliary or distillation outputs."
        )


def _path(node: fx.Node) -> str:
    return str(node.target)


def _first_layers(trace: ModelTrace, traced: Traced) -> list[fx.Node]:
    """Follow the image to the first layers that it meets on all of its ways."""
    values = trace.values("", traced)
    image = next(node for node in traced.graph.nodes if node.op == "placeholder")
    raw, encoded, stems = {image}, set[fx.Node](), list[fx.Node]()
    for node in traced.graph.nodes:
        inputs = node.all_input_nodes
        if not any(source in raw for source in inputs):
            if any(source in encoded for source in inputs):
                encoded.add(node)
            continue
        joined = [source for source in inputs if source in encoded and tensors(values(source))]
        if node.op == "output" or joined:
            raise _refused(trace, f"{_shown(node, values)} gets the image past all first layers")
        if node.op == "call_module" and _is_stem(trace, node, values):
            stems.append(node)
            encoded.add(node)
        elif node.op == "call_module" or not _sizes_only(node):
            _check_passable(trace, node, traced, values)
            if tensors(values(node)):
                raw.add(node)
    return stems


def _is_stem(trace: ModelTrace, node: fx.Node, values: Values) -> bool:
    """Say whether a call that gets the image is a stem; raise what it is instead where nothing helps."""
    path = _path(node)
    module = trace.module(path)
    if next(module.parameters(), None) is None and not isinstance(module, NormBase):
        return False
    if not is_linear(module):
        if isinstance(module, ConvNd):
            raise _refused(
                trace,
                f"{_shown(node, values)} standardises or builds its weight again in each pass, so that the sum of two "
                "such layers isn't a layer of its kind",
            )
        if is_primitive(module):
            raise _refused(trace, f"the image first meets {_shown(node, values)}")
        raise OpaqueError(path)
    calls = trace.observation.calls.get(path, [])
    if len(calls) != 1:
        raise _refused(trace, f"{_shown(node, values)} is called {len(calls)} times in a pass")
    if is_derived(module):
        raise _refused(trace, f"{_shown(node, values)} {_DERIVED}")
    (source,) = node.all_input_nodes
    batch = trace.observation.calls[""][0].args[0].shape[0]
    if {values(source).shape[0], values(node).shape[0]} != {batch}:
        raise _refused(trace, f"{_shown(node, values)} sees pieces of the image as samples of their own")
    return True


def _sizes_only(node: fx.Node) -> bool:
    return str(getattr(node.target, "__name__", node.target)) in _SIZES_ONLY


def _check_passable(trace: ModelTrace, node: fx.Node, traced: Traced, values: Values) -> None:
    """Raise unless a function before the stems has nothing to learn."""
    for source in node.all_input_nodes:
        if source.op != "get_attr" or str(source.target) in traced.constants:
            continue
        if isinstance(values(source), nn.Parameter):
            raise _refused(
                trace,
                f"the image first meets {_shown(node, values)} with the parameter {str(source.target)!r}",
            )


def _check_rows(trace: ModelTrace, out: object) -> None:
    """Raise unless logits are one row for each image."""
    if isinstance(out, Tensor) and out.ndim == 2:
        return
    shape = f"a value of shape {tuple(out.shape)}" if isinstance(out, Tensor) else "several values"
    advice = "Build the model as a classifier, without auxiliary or distillation outputs."
    if isinstance(out, Tensor) and out.shape.numel() == out.shape[0]:
        advice = (
            "Return the one logit as (B, 1), as a classifier gives it; change its shape in the criterion."
        )
    raise StructureError(f"{trace.name} returns {shape}, and not one tensor of logits (B, K).\n{advice}")


def _shown(node: fx.Node, values: Values) -> str:
    return "the output" if node.op == "output" else describe_node(node, values)


def _refused(trace: ModelTrace, reason: str) -> StructureError:
    return StructureError(
        f"{trace.name} has no stem: {reason}.\n"
        "A stem is a plain convolution or linear layer that all of the image goes through, with nothing to learn "
        "before it.\nChoose another backbone, or another method."
    )


def _stem(trace: ModelTrace, traced: Traced, node: fx.Node, values: Values) -> Stem:
    shape = tuple(values(node).shape)
    linear = isinstance(trace.module(_path(node)), nn.Linear)
    name = (_LINEAR if linear else _CONVOLVED).get(len(shape))
    if name is None:
        raise _refused(trace, f"{_shown(node, values)} gives {len(shape)} dimensions")
    (source,) = node.all_input_nodes
    before = None if source.op == "placeholder" else _function(trace, traced, source)
    return Stem(_path(node), Layout(name), shape, before)


def _function(trace: ModelTrace, traced: Traced, end: fx.Node) -> Callable[..., Any]:
    """Compile the way from the image to a value before the stems."""
    graph = cut(placeholders(traced.graph), end)
    return compile_graph(graph, traced.runnable(elsewhere=True).constants, f"{trace.name} before its stem")


def _last_layers(trace: ModelTrace, traced: Traced, output: str | int | None) -> list[str]:
    """Follow the logits back to the layers that give them."""
    values = trace.values("", traced)
    end = logits_node(values, output, trace.name)
    _check_rows(trace, values(end))
    carrying = downstream_of(next(node for node in traced.graph.nodes if node.op == "placeholder"))
    waiting, paths = [end], list[str]()
    while waiting:
        node = waiting.pop()
        module = trace.module(_path(node)) if node.op == "call_module" else None
        if module is not None and is_classifier(module):
            if is_derived(module):
                raise StructureError(
                    f"The classifier {describe_node(node, values)} of {trace.name} {_DERIVED}.\n"
                    "Make it permanent (parametrize.remove_parametrizations, remove_weight_norm, "
                    "remove_spectral_norm, prune.remove), or put it on a merged model."
                )
            paths.append(_path(node))
            continue
        if module is not None and not is_primitive(module):
            raise OpaqueError(_path(node))
        sources = [source for source in tensor_inputs(node, values) if source in carrying]
        linear = node_name(node, trace.model) in SHAPES | DROPOUTS | SCALES | SUMS | {"float", "to"}
        if not sources or not (linear or pooling_of(node, values, weighted=True) is not None):
            raise StructureError(
                f"The logits of {trace.name} do not come from linear layers alone: "
                f"{describe_node(node, values)} has a part in them.\n"
                "Build the model with a linear classifier (num_classes above 0), or choose another backbone. "
                "Return the logits themselves, and take their softmax or sigmoid behind the model."
            )
        waiting += sources
    return sorted(set(paths))


_WEIGHTED = (nn.Linear, nn.Bilinear, ConvNd)
_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
ACTIVATIONS = {
    "relu",
    "relu6",
    "gelu",
    "silu",
    "hardswish",
    "mish",
    "elu",
    "leakyrelu",
    "leaky_relu",
    "prelu",
    "selu",
}
ACTIVATIONS |= {"tanh", "hardsigmoid", "hardtanh", "softplus", "celu", "relu_"}
"""Names of activations behind a layer, in small letters: of modules, functions and methods."""
_NORM_FUNCTIONS = {"layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"}
_PASSING = (
    SHAPES | DROPOUTS | SCALES | SUMS | {"float", "to", "interpolate", "upsample", "softmax", "sigmoid"}
)
_PASSING |= {"log_softmax", "adaptiveavgpool2d", "adaptiveavgpool1d", "avgpool2d", "adaptive_avg_pool2d"}
_PASSING |= {"adaptiveavgpool3d", "avgpool3d", "adaptive_avg_pool3d"}


def check_classified(trace: ModelTrace, output: str | int | None = None, returned: bool = False) -> None:
    """Raise where a model's output is seen to be something else than logits, and not to contain any.

    From the output back over pooling, shapes, sums and factors there is a layer with weights for logits; features end
    in an activation or a norm, or are all that a model gives whose ``num_classes`` is 0. Probabilities end in a sigmoid
    or softmax. What declares as many classes as it gives, what ends otherwise and what cannot be looked into is taken
    for logits.

    Args:
        trace: the trace of the model.
        output: the entry that holds the logits, where the user says so; it is then not taken for features.
        returned: whether the logits are needed in what a training pass returns, and not only inside of the model.

    Raises:
        StructureError: the model ends in features or probabilities; names what gives them.
    """
    squashed = squashed_end(trace, output, training=returned)
    if squashed is not None and (returned or not squashed.straight):
        raise StructureError(
            f"{trace.name} returns probabilities, and not logits: they come from {squashed.shown}.\n"
            "A softmax or sigmoid would be taken of them once more.\n"
            "Return the logits, and take their softmax or sigmoid in the loss (cross_entropy, "
            "binary_cross_entropy_with_logits) and behind the model, where it predicts."
        )
    if output is not None:
        return
    try:
        value = take_logits(trace.observation.output(""))
    except StructureError:
        if returned:
            raise
        return  # several values: which of them are logits is asked elsewhere
    node = _given_by(trace, value)
    if node is None:
        return
    raise StructureError(
        f"{trace.name} returns features {tuple(value.shape)}, and not logits: they come from {node}, and no "
        "classifier gives them.\n"
        "What a class leans on cannot be told from features; a part of a model ends before the logits.\n"
        "Patch the whole model, layers= takes names inside of the part, or say with output= which entry of the output "
        f"holds logits. If these are logits, set model.num_classes = {value.shape[1]}."
    )


def ends_in_features(trace: ModelTrace) -> bool:
    """Say whether a model's output is seen to be features, as `check_classified` tells them from logits."""
    return trace.once("ends in features", _ends_in_features)


def _ends_in_features(trace: ModelTrace) -> bool:
    try:
        value = take_logits(trace.observation.output(""))
    except StructureError:
        return False
    return _given_by(trace, value) is not None


def _given_by(trace: ModelTrace, value: Any) -> str | None:
    """Describe what gives features at the end of a model; None where its output counts as logits."""
    if not isinstance(value, Tensor) or value.ndim < 2 or _declared(trace) == value.shape[1]:
        return None
    if _declared(trace) == 0:
        return "a model that says num_classes = 0"
    try:
        return opening(trace, False, lambda traced: _features(trace, traced), alike=True)[1]
    except (TraceError, StructureError):
        return None


def _declared(trace: ModelTrace) -> Any:
    declared = getattr(trace.model, "num_classes", None)
    return declared if type(declared) is int else None


def _features(trace: ModelTrace, traced: Traced) -> str | None:
    """Describe the activation or norm that the output comes from, on any of its ways; None where there is none."""
    values = trace.values("", traced)
    waiting = [logits_node(values, None, trace.name)]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        name = node_name(node, trace.model)
        module = trace.module(_path(node)) if node.op == "call_module" else None
        if isinstance(module, _WEIGHTED):
            continue
        if isinstance(module, _NORMS) or name in ACTIVATIONS | _NORM_FUNCTIONS:
            return describe_node(node, values)
        if module is not None and not is_primitive(module):
            raise OpaqueError(_path(node))
        if name in _PASSING or pooling_of(node, values, weighted=True) is not None:
            new = [source for source in tensor_inputs(node, values) if source not in seen]
            seen.update(new)
            waiting += new
    return None
