"""Shallow symbolic tracing: only the modules that must be opened are; everything else stays a call.

`trace` turns one module's ``forward`` into a `torch.fx.Graph` whose nodes are calls of its children and
the functions between them. timm's own lists of modules and functions that must not be traced are
honoured. The module traced is left exactly as it was, also when tracing fails.
"""

from __future__ import annotations

import inspect
import sys
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

from timm.layers import get_notrace_functions, get_notrace_modules  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, fx, nn
from torch.fx import proxy as fx_proxy

from fxgraft._torch import NormBase, pytree
from fxgraft.errors import TraceError
from fxgraft.graph.atomic import apply_atomically, refilling, synchronized
from fxgraft.graph.tracing.branches import BakedBuffers, InPlaceProxy, Known, held, user_line
from fxgraft.graph.tracing.names import UNIT, join
from fxgraft.graph.tracing.observe import Call
from fxgraft.graph.tracing.preserve import (
    AppliedFunction,
    find_changes,
    kept_values,
    line_of,
    noticed_prints,
    preserved_attributes,
    preserved_globals,
    replaced_checkpoint,
    replaced_functions,
    untouched,
)
from fxgraft.graph.tracing.reads import noticed_reads
from fxgraft.graph.tracing.regions import (
    CALLERS,
    Modes,
    Recorder,
    StateChangedError,
    called_by,
    mark_regions,
    watched_draws,
    watched_modes,
)
from fxgraft.graph.tracing.settings import (
    Baked,
    OnDevice,
    hooked_inputs,
    hooked_output,
    input_hooked,
    output_hooked,
    tensor_version,
)
from fxgraft.graph.tracing.signatures import INPUT, bare_forward, bind, forward_signature, leaf_names

HOOKED = "fxgraft_hooked"
"""Key in ``node.meta`` of what stands for the hooks of an opened module."""

CHECKPOINT_REGION = "fxgraft_checkpoint_region"
"""Key in ``node.meta`` of the checkpointed region that a node was traced in."""


def is_primitive(module: nn.Module) -> bool:
    """Say whether a full trace keeps ``module`` as one call: torch's own layers, norms, timm's list."""
    # BatchNorm subclasses count their batches in Python code, which a trace would execute for real.
    if isinstance(module, (NormBase, *get_notrace_modules())):
        return True
    ours = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
    return ours and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


@dataclass
class Traced:
    """A module's graph for one mode.

    Attributes:
        graph: its nodes; ``call_module`` and ``get_attr`` targets are relative to the module.
        spec: how the module's arguments nest; the graph's placeholders are their tensors, in order.
        fixed: one entry per argument leaf: `INPUT` where the graph has a placeholder, else the value it
            was traced with.
        signature: the forward's own signature, by which calls are brought to one form.
        constants: tensors that the forward made from nothing, by the name the graph calls them.
        settings: what the trace has read of modules, to be compared by `settings_changed`, by module path.
        reads: the same as it was noticed: names of attributes by module.
        opened: paths of the modules whose forwards ran.
        refusal: the error that says what the forward does and the graph would not do again; None for nothing.
        beside: whether that is only a note that the forward takes, and changes no value.
    """

    graph: fx.Graph
    spec: pytree.TreeSpec
    fixed: tuple[Any, ...]
    signature: inspect.Signature
    constants: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    reads: dict[nn.Module, dict[str, None]] = field(default_factory=dict)
    opened: frozenset[str] = frozenset()
    refusal: TraceError | None = None
    beside: bool = False

    def runnable(self, elsewhere: bool = False) -> Traced:
        """Return this trace if its graph may run.

        Args:
            elsewhere: it runs beside the forward, and not in its place: then it need not note what that notes.

        Raises:
            TraceError: the forward acts through more than values.
        """
        if self.refusal is not None and not (elsewhere and self.beside):
            raise self.refusal
        return self


class ShallowTracer(fx.Tracer):
    """A tracer that opens the modules named, and those below ``deep`` down to primitives.

    While it traces, torch.fx replaces ``torch.nn.Module.__call__`` and ``__getattr__`` for the whole process.
    Calls and reads of other threads pass through, and are no part of this trace.
    """

    def __init__(self, opened: Sequence[str], deep: Sequence[str], hooks: bool = False) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.opened = frozenset(opened)
        self.hooks = hooks
        self.deep = tuple(deep)
        self.region = 0
        self.thread = threading.get_ident()
        self.touched: set[str] = {""}
        self.known: Known | None = None
        self.recorder: Recorder
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.own: dict[nn.Module, dict[str, Any]] = {}
        self.changed: list[tuple[nn.Module, str, str]] = []
        self.device: str | None = None

    def prepare(
        self,
        path: str,
        observed: Mapping[str, list[Call]],
        forward: Callable[..., Any],
        spec: pytree.TreeSpec,
        fixed: tuple[Any, ...],
        names: list[str],
        leaves: Sequence[Any],
    ) -> None:
        """Say what to trace: ``forward(root, ...)`` with the arguments that ``spec`` and ``fixed`` describe.

        What closed children were seen to return says how their outputs unpack; a proxy alone cannot know.
        ``leaves`` are the arguments of the recorded call.
        """
        self.path = path
        self.observed = observed
        self.forward = forward
        self.spec = spec
        self.fixed = fixed
        self.names = names
        self.leaves = leaves

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

        def bare_forward(*inner: Any, **named: Any) -> Any:
            self.touched.add(path)
            return m.forward(*inner, **named)

        hooks = self.hooks and not self.is_leaf_module(m, path)
        if hooks and input_hooked(m):
            args, kwargs = self._marked(HOOKED, True, self._hooked_inputs, m, path, args, kwargs)
        out = super().call_module(m, bare_forward, args, kwargs)
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


def _refused(module: nn.Module, path: str, error: StateChangedError) -> TraceError:
    """Make the error for a forward that does something which its graph would not do again."""
    name = f"{path!r} ({module._get_name()})" if path else module._get_name()
    code = getattr(bare_forward(module), "__code__", None)
    where = error.line or (f"{code.co_filename}:{code.co_firstlineno}" if code else "an unknown line")
    return TraceError(
        f"The forward of {name} {error.what}, at {where}.\n"
        "To act inside of it, it is turned into a graph of values, which would do that once, while it is traced, and "
        "never again.\n"
        "Choose the output of a whole module as the site (its inside then need not be opened), or move that line into "
        "a module of its own, which stays closed."
    )


def _trace_error(module: nn.Module, path: str, error: BaseException) -> TraceError:
    """Make the error that names the module and the line where the trace stopped."""
    frames = traceback.extract_tb(error.__traceback__)
    user = [f for f in frames if "/torch/" not in f.filename and "fxgraft/graph" not in f.filename]
    where = f"{user[-1].filename}:{user[-1].lineno}: {user[-1].line}" if user else "an unknown line"
    name = f"{path!r} ({type(module).__name__})" if path else type(module).__name__
    branches = isinstance(error, fx_proxy.TraceError)
    usually = ", usually control flow that depends on a tensor's values" if branches else ""
    try:
        said = str(error)
    except Exception:  # of a library that was handed a stand-in for a tensor, and cannot show it any more
        said = "it was handed something that stands for a tensor while the forward is traced"
    return TraceError(
        f"torch.fx cannot trace {name}: {type(error).__name__}: {said}\n"
        f"It stopped at {where}{usually}.\n"
        "Choose the output of a whole module as the site (its inside then need not be opened), or move that line into "
        "a module of its own, which stays closed, or into a function registered with "
        "timm.layers.register_notrace_function."
    )


def readdressed(error: TraceError, advice: str) -> TraceError:
    """Return the error with other advice, from a caller who knows what was asked for."""
    return TraceError(f"{str(error).rpartition(chr(10))[0]}\n{advice}")


@synchronized
def trace(
    module: nn.Module,
    call: Call,
    training: bool,
    opened: Sequence[str] = (),
    deep: Sequence[str] = (),
    path: str = "",
    observed: Mapping[str, list[Call]] | None = None,
    hooks: bool = False,
) -> Traced:
    """Trace the forward of ``module`` as its caller calls it, for one mode.

    Args:
        module: the module whose forward is traced; its children stay calls.
        call: one recorded call. Its tensors become inputs of the graph; every other argument is bound.
        training: the mode to trace for.
        opened: names of descendants to trace through.
        deep: names of descendants to trace through down to primitive layers.
        path: the module's own qualified name.
        observed: recorded calls by qualified name, to know how the outputs of closed children unpack.
        hooks: whether the hooks of the descendants that are opened are part of the graph.

    Returns:
        The graph and what it depends on.

    Raises:
        TraceError: the forward cannot be traced; names the module, the line and the way out.
    """
    signature = forward_signature(module)
    args, kwargs = bind(signature, call.args, call.kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors_only = tuple(INPUT if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    if isinstance(module, fx.GraphModule):
        graph = _copy_graph(module, training)
        return Traced(graph, spec, tensors_only, signature)
    # Sizes that a caller hands down (a token grid) change with the image, so they are inputs as well,
    # unless the forward branches on them.
    own_leaves = {id(leaf) for leaf in pytree.tree_leaves((call.args, call.kwargs))}
    with_sizes = tuple(
        INPUT if type(leaf) is int and id(leaf) in own_leaves else value
        for leaf, value in zip(leaves, tensors_only, strict=True)
    )
    names = leaf_names(signature, args, kwargs)
    failure: Exception = ValueError("no attempt was made")
    # What branches on shapes is held to the branches that were taken, so that comes last. Buffers are looked up at
    # every call, unless the forward needs to know their numbers.
    attempts = [
        (with_sizes, False, True),
        (tensors_only, False, True),
        (with_sizes, False, False),
        (tensors_only, False, False),
        (with_sizes, True, True),
        (with_sizes, True, False),
    ]
    # By identity: an argument may have no hash, or compare tensors entry by entry in its ``==``.
    different = {(tuple(map(id, fixed)), *rest): (fixed, *rest) for fixed, *rest in attempts}
    for fixed, branching, buffers in different.values():
        prepared = (path, observed or {}, bare_forward(module), spec, fixed, names, leaves)
        try:
            start = partial(_tracer, module, opened, deep, prepared, branching, buffers, hooks)
            first = _attempt(module, start(), training, CALLERS[0])
            # Where nothing asks for the modes or sets them, another caller makes no difference.
            second = _attempt(module, start(), training, CALLERS[1]) if first.recorder.touched else first
            if first.recorder.change is None or first.recorder.change.beside:
                mark_regions(first.recorder, second.recorder)
        except TraceError:
            raise
        except Exception as error:
            failure = error
            continue
        settings: dict[str, dict[str, Any]] = {name: {} for name in sorted(first.touched)}
        reads = {owner: {**first.reads.get(owner, {}), **names} for owner, names in second.reads.items()}
        if first.device is not None:
            settings[""]["device it was traced on"] = OnDevice(first.device)
        for name in settings:
            part = module.get_submodule(name) if name else module
            for own in (attributes for owner, attributes in first.baked if owner is part):
                settings[name][f"numbers of {own}"] = Baked(own, tensor_version(part, own))
        failure = ValueError(
            "none"
        )  # the traceback of another attempt holds this frame, and the frame the model
        change = first.recorder.change
        refusal = None if change is None else _refused(module, path, change)
        beside = change is not None and change.beside
        return Traced(
            first.graph,
            spec,
            fixed,
            signature,
            first.constants,
            settings,
            {**first.reads, **reads},
            frozenset(first.touched),
            refusal,
            beside,
        )
    try:
        raise _trace_error(module, path, failure) from failure
    finally:
        del failure  # its traceback holds this frame, and the frame the model


def _tracer(
    module: nn.Module,
    opened: Sequence[str],
    deep: Sequence[str],
    given: tuple[Any, ...],
    branching: bool,
    buffers: bool,
    hooks: bool,
) -> ShallowTracer:
    tracer = ShallowTracer(opened, deep, hooks)
    tracer.prepare(*given)
    tracer.known = Known(module) if branching else None
    tracer.proxy_buffer_attributes = buffers
    classes = {cls.__module__ for part in module.modules() for cls in type(part).__mro__}
    tracer._autowrap_search += [sys.modules[name] for name in sorted(classes) if name in sys.modules]
    return tracer


@dataclass
class _Attempt:
    """The result of tracing once: a graph, its constants, the state of its nodes, and the modules that were opened."""

    graph: fx.Graph
    constants: dict[str, Any]
    recorder: Recorder
    touched: set[str]
    device: str | None
    baked: set[tuple[nn.Module, str]]
    reads: dict[nn.Module, dict[str, None]]


def _attempt(module: nn.Module, tracer: ShallowTracer, training: bool, modes: Modes) -> _Attempt:
    """Trace a module once, for a caller in these modes.

    Raises:
        Exception: whatever stops torch.fx.
    """
    opened = [module, *(m for n, m in module.named_modules() if n and not tracer.is_leaf_module(m, n))]
    proxies = tracer.proxies
    reads: dict[nn.Module, dict[str, None]] = {}
    try:
        with (
            untouched(opened, training) as written,
            preserved_attributes(opened, module.modules()) as kept,
            preserved_globals(opened) as reachable,
            replaced_checkpoint(tracer.run_checkpoint),
            replaced_functions(tracer.run_function),
            called_by(modes),
            watched_draws() as drawn,
        ):
            tracer.own = {part: registered(part) for part in module.modules()}
            baked = BakedBuffers(opened, not tracer.proxy_buffer_attributes)
            with baked.entered():
                recorder = tracer.recorder = Recorder(user_line, drawn, baked.depth)
                with watched_modes(recorder.touched), noticed_prints(recorder), noticed_reads(reads):
                    graph = tracer.trace(module)
                recorder.close()
            for name in written():
                recorder.found(f"writes to {name!r}", line_of(name, opened))
            find_changes(recorder, kept, reachable, graph, opened)
            tracer.find_changed()
            added = {str(n.target) for n in graph.nodes if n.op == "get_attr"} & set(vars(module))
            constants = {name: vars(module)[name] for name in added if not kept.has(module, name)}
    finally:
        device = tracer.device
        touched = tracer.retire()
    for name in kept_values(proxies)[:1]:
        recorder.found(f"keeps a value ({name!r}) outside of the model", beside=True)
    return _Attempt(graph, constants, recorder, touched, device, baked.sources(constants.values()), reads)


def copied(graph: fx.Graph) -> fx.Graph:
    """Copy a graph. The nodes keep their names and the notes on them."""
    copy = fx.Graph()
    returned = copy.graph_copy(graph, {})
    end = copy.output(returned)
    end.meta = dict(next(node for node in reversed(graph.nodes) if node.op == "output").meta)
    return copy


def _copy_graph(module: fx.GraphModule, training: bool) -> fx.Graph:
    """Take the graph of a module that arrives traced; torchvision's extractors hold one per mode."""
    source = getattr(module, "train_graph" if training else "eval_graph", None)
    graph = copied(source if isinstance(source, fx.Graph) else module.graph)
    for node in graph.nodes:  # the scopes it was once traced in are gone: all of it is one forward now
        node.meta.pop("nn_module_stack", None)
    return graph
