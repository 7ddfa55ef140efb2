"""Values of a trace: shapes and dtypes of its nodes, taken from the recorded calls where there are any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.observe import Call
from fxgraft.graph.tracing.preserve import preserved_attributes, preserved_modes, preserved_random_state
from fxgraft.graph.tracing.signatures import INPUT, bind
from fxgraft.graph.tracing.trace import Traced


class Values:
    """The values of a trace as fake tensors, computed on demand from the recorded calls."""

    def __init__(self, anatomy: Anatomy, path: str, traced: Traced) -> None:
        self.anatomy = anatomy
        self.path = path
        self.traced = traced
        self.known: dict[fx.Node, Any] = {}
        record = anatomy.observation.calls[path][0]
        leaves = inputs_of(traced, record)
        places = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self.known.update(zip(places, leaves, strict=True))

    def __call__(self, node: fx.Node) -> Any:
        """Return the value of a node; shape and dtype only."""
        for each in self._missing(node):
            self.known[each] = self._compute(each)
        return self.known[node]

    def _missing(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        waiting = [node]
        while waiting:
            each = waiting.pop()
            if each not in self.known and each not in found:
                found.append(each)
                if self._recorded(each) is None:
                    waiting += each.all_input_nodes
        return sorted(found)

    def _recorded(self, node: fx.Node) -> Any:
        if node.op != "call_module":
            return None
        target = f"{self.path}.{node.target}" if self.path else str(node.target)
        calls = self.anatomy.observation.calls.get(target, [])
        return calls[0].output if len(calls) == 1 else None

    def _compute(self, node: fx.Node) -> Any:
        recorded = self._recorded(node)
        if recorded is not None:
            return recorded
        owner = self.anatomy.module(self.path)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.known.__getitem__)  # type: ignore[misc]
        mode = self.anatomy.observation.mode
        if node.op == "get_attr":
            constants = self.traced.constants
            name = str(node.target)
            return constants[name] if name in constants else _attribute(owner, name)
        kept = preserved_modes(owner), preserved_attributes(owner.modules()), preserved_random_state()
        with mode, kept[0], kept[1], kept[2], torch.no_grad():  # type: ignore[union-attr]
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            module = owner.get_submodule(str(node.target))
            for each in module.modules():
                each.training = False
            return module.forward(*args, **kwargs)


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
    """List the floating-point tensors that a node works on, parameters and sizes left out."""
    found = []
    for each in node.all_input_nodes:
        value = None if each.op == "get_attr" else values(each)
        if isinstance(value, (tuple, list)) or (isinstance(value, Tensor) and value.is_floating_point()):
            found.append(each)
    return found
