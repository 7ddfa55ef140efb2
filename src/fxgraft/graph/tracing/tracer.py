"""The tracer: a subclass of `torch.fx.Tracer` that opens the modules it is told to, and notes what they do besides."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from timm.layers import get_notrace_functions, get_notrace_modules  # pyright: ignore[reportPrivateImportUsage]
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict

from fxgraft._einops import einops_functions, is_einops_layer
from fxgraft._torch import NormBase, pytree
from fxgraft.errors import TraceError
from fxgraft.graph.atomic import apply_atomically, refilling
from fxgraft.graph.names import UNIT, join
from fxgraft.graph.tracing.branches import InPlaceProxy, Known, held, user_line
from fxgraft.graph.tracing.observe import Call
from fxgraft.graph.tracing.preserve import AppliedFunction
from fxgraft.graph.tracing.regions import Recorder
from fxgraft.graph.tracing.settings import hooked_inputs, hooked_output, input_hooked, output_hooked
from fxgraft.graph.tracing.signatures import INPUT, bare_forward

HOOKED = "fxgraft_hooked"
"""Key in ``node.meta`` of what stands for the hooks of an opened module."""

CHECKPOINT_REGION = "fxgraft_checkpoint_region"
"""Key in ``node.meta`` of the checkpointed region that a node was traced in."""


def _check_constructor(cls: type) -> None:
    """Raise where a dataclass does more than to keep its fields: the graph makes it again, from their values."""
    own = cls.__dict__.get("__dataclass_fields__", {}).values()
    computed = hasattr(cls, "__post_init__") or any(not slot.init for slot in fields(cls))
    if computed or len(own) > len(fields(cls)):  # an InitVar or a ClassVar is listed there alone
        raise TraceError(
            f"torch.fx cannot repeat how a {cls.__name__} is made: its constructor computes something, or takes what "
            "isn't a field.\nThe graph would do it twice.\n"
            "Compute it in the forward and let the dataclass hold the result, or return a dictionary."
        )


def is_primitive(module: nn.Module) -> bool:
    """Say whether a full trace keeps ``module`` as one call: the layers of torch and einops, norms, timm's list."""
    # BatchNorm subclasses count their batches in Python code, which a trace would execute for real.
    if isinstance(module, (NormBase, *get_notrace_modules())) or is_einops_layer(module):
        return True
    ours = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
    return ours and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


class ShallowTracer(fx.Tracer):
    """A tracer that opens the modules named, and those below ``deep`` down to primitives.

    While it traces, torch.fx replaces ``torch.nn.Module.__call__`` and ``__getattr__`` for the whole process.
    Calls and reads of other threads pass through, and are no part of this trace.

    Args:
        module: the module whose forward is traced.
        opened: names of descendants to trace through.
        deep: names of descendants to trace through down to primitive layers.
        hooks: whether the hooks of the descendants that are opened are part of the graph.
        path: the module's own qualified name.
        observed: recorded calls by qualified name. A proxy alone cannot know how the outputs of closed children unpack.
        spec: how the arguments of the recorded call nest.
        leaves: the arguments themselves.
        fixed: for each of them, `INPUT` where the graph has a placeholder, else the value to trace with.
        names: names of the placeholders.
        branching: whether to take branches on shapes and dtypes as the recorded calls do.
        buffers: whether the graph looks buffers up at every call.
    """

    def __init__(
        self,
        module: nn.Module,
        opened: Sequence[str],
        deep: Sequence[str],
        *,
        hooks: bool,
        path: str,
        observed: Mapping[str, list[Call]],
        spec: pytree.TreeSpec,
        leaves: Sequence[Any],
        fixed: tuple[Any, ...],
        names: list[str],
        branching: bool,
        buffers: bool,
    ) -> None:
        super().__init__(autowrap_functions=(*get_notrace_functions(), *einops_functions()))
        self.proxy_buffer_attributes = buffers
        classes = {cls.__module__ for part in module.modules() for cls in type(part).__mro__}
        self._autowrap_search += [sys.modules[name] for name in sorted(classes) if name in sys.modules]
        self.opened = frozenset(opened)
        self.deep = tuple(deep)
        self.hooks = hooks
        self.path = path
        self.observed = observed
        self.forward = bare_forward(module)
        self.spec = spec
        self.leaves = leaves
        self.fixed = fixed
        self.names = names
        self.known = Known(module) if branching else None
        self.region = 0
        self.thread = threading.get_ident()
        self.touched: set[str] = {""}
        self.recorder: Recorder
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.own: dict[nn.Module, dict[str, Any]] = {}
        self.changed: list[tuple[nn.Module, str, str]] = []
        self.device: str | None = None

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Take a branch on shapes or dtypes as the recorded calls do, where what is `known` says so."""
        taken = None if self.known is None else self.known.truth(obj.node)
        if taken is None:
            return super().to_bool(obj)
        self.create_proxy("call_function", held, (obj, taken, user_line()), {})
        return taken

    def length(self, obj: fx.Proxy) -> int | None:
        """Say how many dimensions a shape has, where what is `known` says so."""
        return None if self.known is None else self.known.length(obj.node)

    def device_type(self, node: fx.Node) -> str | None:
        """Return the type of device that a value is on, where what is `known` says so."""
        kind = None if self.known is None else self.known.device_type(node)
        self.device = kind or self.device
        return kind

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Spread a shape over its dimensions, where it is known how many it has."""
        length = self.length(obj)
        if length is None:
            return super().iter(obj)
        return iter([obj[i] for i in range(length)])  # pyright: ignore[reportIndexIssue]

    def create_arg(self, a: Any) -> Any:
        """Keep the class of an ordered dictionary or of a dictionary with fields, which torch.fx makes a plain one."""
        if type(a) is OrderedDict:
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if isinstance(a, dict) and is_dataclass(a):
            entries = {slot.name: self.create_arg(getattr(a, slot.name)) for slot in fields(a)}
            return self.create_node("call_function", type(a), (), entries)
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            raise TraceError(
                f"torch.fx makes a plain dictionary of a {type(a).__name__}: let the model return dict(...), or a "
                "dataclass.\nOr choose a site for which the module that returns it stays closed."
            )
        if is_dataclass(a) and not isinstance(a, type):
            _check_constructor(type(a))
        return super().create_arg(a)

    def retire(self) -> set[str]:
        """Let go of the model, which closures of torch.fx would keep until the next collection.

        What other threads still need in a call stays.

        Returns:
            The modules that were opened, by path.
        """
        touched = self.touched
        apply_atomically(refilling(self.__dict__, {"thread": self.thread, "_autowrap_function_ids": set()}))
        return touched

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node, and record the modes that it runs under."""
        node = super().create_node(*args, **kwargs)
        self.recorder.note(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make the proxy of a node's value."""
        proxy = InPlaceProxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays one call: all do that nobody asked to open."""
        if module_qualified_name in self.opened:
            return False
        inside = any(
            not prefix or module_qualified_name == prefix or module_qualified_name.startswith(prefix + ".")
            for prefix in self.deep
        )
        return not inside or is_primitive(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Open a module through its ``forward`` alone: hooks belong to calls that compute, not to a trace."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if getattr(type(m), UNIT, False):
            return self._marked(UNIT, True, self._call, m, forward, args, kwargs)
        return self._call(m, forward, args, kwargs)

    def _call(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m not in (self.submodule_paths or ()) and not [*m.parameters(), *m.buffers()]:
            return m.forward(*args, **kwargs)  # a graft's unit without tensors: in no tree, so it has no name
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            self._note_changed(m)
        calls = self.observed.get(join(self.path, path), [])
        count = self.num_calls.get(path, 0)

        def traced_forward(*inner: Any, **named: Any) -> Any:
            self.touched.add(path)
            return m.forward(*inner, **named)

        hooks = self.hooks and not self.is_leaf_module(m, path)
        if hooks and input_hooked(m):
            args, kwargs = self._marked(HOOKED, True, self._hooked_inputs, m, path, args, kwargs)
        out = super().call_module(m, traced_forward, args, kwargs)
        if hooks and output_hooked(m):
            seen = calls[min(count, len(calls) - 1)].output if calls else None
            out = self._marked(HOOKED, True, self._hooked_output, path, args, kwargs, out, seen)
        if isinstance(out, fx.Proxy) and count < len(calls):
            if self.known is not None:
                self.known.note(out.node, calls[count].output)
            return _unpacked(out, calls[count].output)
        return out

    def _note_changed(self, m: nn.Module) -> None:
        """Record what the forward set in a module that stays closed: the call in the graph would run without it."""
        for module in m.modules():
            before, now = self.own.get(module), registered(module)
            for name in dict.fromkeys((*(before or ()), *now)):
                if before is not None and before.get(name) is not now.get(name):
                    self.changed.append((module, name, user_line()))

    def find_changed(self) -> None:
        """Report what the forward set for the time of a call. `find_changes` reports attributes that stay set."""
        for module, name, line in self.changed:
            before, now = self.own[module].get(name), registered(module).get(name)
            if before is now or name in module._parameters or name in module._buffers:
                self.recorder.found(f"sets {name!r} of {module._get_name()} for a call", line)

    def _hooked_inputs(
        self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let the pre-hooks of an opened module act on the tensors among its arguments when the graph is run."""
        owner = self.create_proxy("get_attr", path, (), {})
        hooked: Any = self.create_proxy("call_function", hooked_inputs, (owner, args, kwargs), {})
        inner = [hooked[0][i] if isinstance(arg, fx.Proxy) else arg for i, arg in enumerate(args)]
        named = {k: hooked[1][k] if isinstance(v, fx.Proxy) else v for k, v in kwargs.items()}
        return tuple(inner), named

    def _hooked_output(
        self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, seen: Any
    ) -> Any:
        """Let the hooks of an opened module act on its output when the graph is run."""
        owner = self.create_proxy("get_attr", path, (), {})
        return _unpacked(
            self.create_proxy("call_function", hooked_output, (owner, args, kwargs, out), {}), seen
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Hand out an attribute of a module, as a proxy where it is a parameter."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make one placeholder per input leaf and pass every other argument as the caller did."""
        leaves = [
            self.create_proxy("placeholder", name, (), {}) if value is INPUT else value
            for value, name in zip(self.fixed, self.names, strict=True)
        ]
        for proxy, value in zip(leaves, self.leaves, strict=True):
            if isinstance(proxy, fx.Proxy) and self.known is not None:
                self.known.note(proxy.node, value)
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)

        def run() -> Any:
            return self.forward(self.root, *args, **kwargs)

        return run, []

    def run_checkpoint(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a checkpointed region in place and mark its nodes."""
        self.region += 1
        return self._marked(CHECKPOINT_REGION, self.region, function, *args, **kwargs)

    def run_function(self, function: AppliedFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make one node of a `torch.autograd.Function`, so that its backward is its own."""
        return self.create_proxy("call_function", function, args, kwargs)

    def _marked(self, key: str, value: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function and note something on all nodes that come of it."""
        before = set(self.graph.nodes)
        out = function(*args, **kwargs)
        for node in self.graph.nodes:
            if node not in before:
                node.meta[key] = value
        return out


def registered(module: nn.Module) -> dict[str, Any]:
    """Return the parameters, buffers and attributes of a module by name."""
    own = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_fxgraft")}
    return {**own, **module._parameters, **module._buffers}


def _unpacked(proxy: fx.Proxy, seen: Any) -> Any:
    """Spread a proxy over the tuple or list that the real value was seen to be."""
    if type(seen) in (tuple, list):
        return type(seen)(
            _unpacked(proxy[i], part)  # pyright: ignore[reportIndexIssue]
            for i, part in enumerate(seen)
        )
    return proxy
