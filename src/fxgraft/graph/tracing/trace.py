"""Shallow symbolic tracing: only the modules that must be opened are; everything else stays a call.

`trace` turns one module's ``forward`` into a `torch.fx.Graph` whose nodes are calls of its children and
the functions between them. timm's own lists of modules and functions that must not be traced are
honoured. The module traced is left exactly as it was, also when tracing fails.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import proxy as fx_proxy

from fxgraft._torch import pytree
from fxgraft.errors import TraceError
from fxgraft.graph.atomic import synchronized
from fxgraft.graph.tracing.branches import BakedBuffers, user_line
from fxgraft.graph.tracing.observe import Call
from fxgraft.graph.tracing.preserve import (
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
from fxgraft.graph.tracing.settings import Baked, OnDevice, tensor_version
from fxgraft.graph.tracing.signatures import INPUT, bare_forward, bind, forward_signature, leaf_names
from fxgraft.graph.tracing.tracer import ShallowTracer, registered


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
        start = partial(
            ShallowTracer,
            module,
            opened,
            deep,
            hooks=hooks,
            path=path,
            observed=observed or {},
            spec=spec,
            leaves=leaves,
            fixed=fixed,
            names=names,
            branching=branching,
            buffers=buffers,
        )
        try:
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
        failure = ValueError("none")  # another attempt's traceback holds this frame, which holds the model
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
