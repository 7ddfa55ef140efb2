"""Values of a trace: shapes and dtypes of its nodes, taken from the recorded calls where there are any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgraft._torch import pytree
from fxgraft.errors import FxgraftError, StructureError
from fxgraft.graph.dataflow.graph_utils import scope_of
from fxgraft.graph.names import class_name, join
from fxgraft.graph.tracing.observe import Call, Observation
from fxgraft.graph.tracing.preserve import preserved_attributes, preserved_modes, preserved_random_state
from fxgraft.graph.tracing.regions import entered, region_of
from fxgraft.graph.tracing.signatures import INPUT, bind
from fxgraft.graph.tracing.trace import Traced


class Values:
    """The values of a trace as fake tensors, computed on demand from the recorded calls.

    Args:
        model: the whole model.
        path: qualified name of the module that was traced.
        traced: its trace.
        observation: recorded calls of the model.

    Attributes:
        model: the whole model.
        path: qualified name of the module that was traced.
        owner: the module that was traced.
        traced: the trace.
    """

    def __init__(self, model: nn.Module, path: str, traced: Traced, observation: Observation) -> None:
        self.model = model
        self.path = path
        self.owner = model.get_submodule(path)
        self.traced = traced
        self._observation = observation
        self._named = {node.name: node for node in traced.graph.nodes}
        leaves = inputs_of(traced, observation.calls[path][0])
        places = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self._known: dict[fx.Node, Any] = dict(zip(places, leaves, strict=True))

    def __call__(self, node: fx.Node) -> Any:
        """Return the value of a node; shape and dtype only.

        Raises:
            StructureError: the network does not get that far with images of the size that was observed.
        """
        step = node
        try:
            for step in self._missing(node):
                self._known[step] = self._compute(step)
        except FxgraftError:
            raise
        except Exception as error:
            raise StructureError(
                f"What {str(step.target)!r} in {class_name(self.model)} gives cannot be found: "
                f"{type(error).__name__}: {error}\n"
                "It is looked for with fake images of the size that the model declares, or of 224×224 pixels.\n"
                "Pass input_size=(C, H, W) of the images you train on."
            ) from error
        return self._known[node]

    def get(self, name: str) -> Any:
        """Return the value of the node called ``name``; None where there is none, or it cannot be computed."""
        node = self._named.get(name)
        if node is None:
            return None
        try:
            return self(node)
        except Exception:  # listings show a value without its shape where that cannot be computed
            return None

    def _missing(self, node: fx.Node) -> list[fx.Node]:
        missing: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            step = waiting.pop()
            if step not in self._known and step not in missing:
                missing.add(step)
                if self._recorded(step) is None:
                    waiting += step.all_input_nodes
        return sorted(missing)

    def _recorded(self, node: fx.Node) -> Any:
        if node.op != "call_module":
            return None
        calls = self._observation.calls.get(join(self.path, str(node.target)), [])
        return calls[0].output if len(calls) == 1 else None

    def _compute(self, node: fx.Node) -> Any:
        recorded = self._recorded(node)
        if recorded is not None:
            return recorded
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)  # type: ignore[misc]
        if node.op == "get_attr":
            constants = self.traced.constants
            name = str(node.target)
            return constants[name] if name in constants else _attribute(self.owner, name)
        run = self._observation.run
        with preserved_random_state(), entered(region_of(node)):
            if node.op == "call_function":
                return run(node.target, *args, **kwargs)  # type: ignore[arg-type]
            if node.op == "call_method":
                return run(getattr(args[0], str(node.target)), *args[1:], **kwargs)
            module = self.owner.get_submodule(str(node.target))
            with preserved_modes(module), preserved_attributes(module.modules()):
                for part in module.modules():
                    part.training = False
                return run(module.forward, *args, **kwargs)


def inputs_of(traced: Traced, call: Call) -> list[Any]:
    """List what a recorded call gives to the placeholders of a trace."""
    leaves = pytree.tree_leaves(bind(traced.signature, call.args, call.kwargs))
    return [leaf for leaf, fixed in zip(leaves, traced.fixed, strict=True) if fixed is INPUT]


def _attribute(owner: nn.Module, target: str) -> Any:
    value: Any = owner
    for part in target.split("."):
        value = getattr(value, part)
    return value


def tensor_inputs(node: fx.Node, values: Values) -> list[fx.Node]:
    """List the floating-point tensors, and nests of them, that a node works on, parameters and sizes left out."""
    inputs = []
    for source in node.all_input_nodes:
        value = None if source.op == "get_attr" else values(source)
        nest = isinstance(value, (tuple, list, dict)) and not isinstance(value, torch.Size)
        if nest or (isinstance(value, Tensor) and value.is_floating_point()):
            inputs.append(source)
    return inputs


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Return a tensor's shape with the batch dimension, or None for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def node_name(node: fx.Node, owner: nn.Module) -> str:
    """Name what a node does, in small letters."""
    if node.op == "call_module":
        return type(owner.get_submodule(str(node.target))).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).lower()


def describe_node(node: fx.Node, values: Values) -> str:
    """Name a node for a message: what it is, and in which module it stands."""
    owner = values.owner
    if node.op != "call_module":
        scope = scope_of(node)
        return f"{getattr(node.target, '__name__', node.target)}(){f' in {scope!r}' if scope else ''}"
    return f"{str(node.target)!r} ({type(owner.get_submodule(str(node.target))).__name__})"
