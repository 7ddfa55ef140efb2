"""The class swap: a grafted module runs its training or its evaluation graph and is otherwise itself.

A grafted module's class becomes a subclass of its own class (as PyTorch's parametrize does), so identity,
attributes, hooks and ``isinstance`` hold. What it runs is kept in one plain attribute, ``_fxgraft``, which
no ``state_dict`` sees. Copies are made of the bare modules and grafted again, so they share nothing.
"""

from __future__ import annotations

import copy
import copyreg
import fnmatch
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from fxgraft.errors import BypassError, ConfigError, WrappedModelError
from fxgraft.graph.atomic import restoring
from fxgraft.graph.grafting.forwards import nests
from fxgraft.graph.grafting.state import (
    GraftState,
    foreign_forward,
    hidden_forward,
    localise,
    state_of,
)
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.names import STATE
from fxgraft.graph.runtime.forward_context import Arguments, Context, ForwardContext, tell_once
from fxgraft.graph.runtime.living import note_patched
from fxgraft.graph.tracing.settings import output_hooked
from fxgraft.graph.tracing.signatures import LABELS, TARGET, Declared
from fxgraft.graph.tracing.tracer import ShallowTracer

if TYPE_CHECKING:
    from fxgraft.graph.grafting.graft_registry import GraftRegistry

ENTRY_POINTS = ("forward_features", "forward_head", "forward_intermediates", "get_intermediate_layers")
"""Methods through which users run part of a backbone, apart from calling it."""


def _run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the program of the current mode."""
    state = state_of(self)
    if state is None:
        return _base(self).forward(self, *args, **kwargs)
    if state.orphan:
        raise BypassError(
            f"This {state.base.__name__} was copied out of a patched model, without the model.\n"
            "Its grafts work with the rest of the network only.\n"
            "Copy the whole model, or take the part after fxgraft.unpatch(model)."
        )
    run = state.context.current
    if run is not None:
        # A module may run in evaluation first, where another graft looks ahead through it.
        run.visited[state.path] = self.training or run.visited.get(state.path, False)
        if output_hooked(self):
            run.calls[state.path] = (args, kwargs)
    program = state.training if self.training else state.evaluation
    if program.inputs and kwargs and not args:  # the first argument was given by its name
        named = inspect.signature(state.base.forward).parameters
        first = next((name for name in named if name in kwargs), next(iter(kwargs)))
        kwargs = dict(kwargs)
        args = (kwargs.pop(first),)
    if program.inputs and self.training and nests(args[:1]):
        raise ConfigError(
            f"{state.base.__name__} was given a {type(args[0]).__name__} of images, and a patch acts on its input.\n"
            "It works on one tensor (B, C, H, W).\n"
            "Join the images before (torch.cat), or patch the part of the model that gets one tensor."
        )
    for unit in program.inputs if args else ():
        args = (unit(args[0]), *args[1:])
    if program.function is None:
        out = state.base.forward(self, *args, **kwargs)
    else:
        out = program.function(self, *args, **kwargs)
    for unit in program.units:
        out = unit(out)
    return out


def _traced_run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run as part of a trace, which is no pass: entry points that the forward calls don't open one either."""
    state = state_of(self)
    if state is None:
        return _base(self).forward(self, *args, **kwargs)
    run = ForwardContext(state.context, self)
    kwargs = type(self)._fxgraft_declared.own(_options(state), kwargs)  # type: ignore[attr-defined]
    with restoring(run.exit):
        run.enter()
        return _run(self, *args, **kwargs)


def _base(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it was before grafting, also for an instance of a user's subclass of that."""
    return type(module)._fxgraft_base  # type: ignore[attr-defined]


def _options(state: GraftState) -> tuple[str, ...]:
    """Name the arguments of a call that the grafts of the model read."""
    return (TARGET, *(state.registry.options if state.registry is not None else ()))


def _outer_call(
    self: nn.Module,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Run an entry point of the patched model inside a pass of its context.

    ``options`` are what the call gives for those that grafts read, ``target`` and ``labels`` among them.
    """
    state = state_of(self)
    if state is None:  # another thread took the last graft off meanwhile
        return call(self, *args, **kwargs)
    current = state.context.current
    if current is not None and current.model is self:
        return call(self, *args, **kwargs)
    replica = getattr(self, "_is_replica", False)
    if replica:
        localise(self)
    elif state.registry is not None and not state.twin:
        if not torch.compiler.is_compiling():
            state.registry.check(self)
        elif state.registry.changed_for_compiler(self):
            _renew_outside(self)
    state = state_of(self)  # the grafts may have been planned again, or taken off
    if state is None:
        return call(self, *args, **kwargs)
    context = state.context
    declared: Declared = type(self)._fxgraft_declared  # type: ignore[attr-defined]
    target = options.get(TARGET)
    run = ForwardContext(context, self, target, declared.inputs(args, kwargs), options)
    run.beside = declared.beside(args, kwargs) if call is _whole_call else {}
    run.read_by_model = any(options.get(n) is not None and declared.names(n) for n in (TARGET, LABELS))
    run.adopt_published()
    if run.labels.value is None:
        run.labels.value = options.get(LABELS)
    context.forget()
    try:
        try:
            run.enter()
            out = call(self, *args, **kwargs)
            if run.training:
                run.labels.served()
            if not replica:  # what several replicas of DataParallel leave could not be told apart
                takes = declared.takes(TARGET)
                own_options = {
                    name: options[name] for name in options if name not in (TARGET, LABELS, *kwargs)
                }
                again = Arguments(args, kwargs, takes and target is not None, takes, options=own_options)
                context.leave(run, out, again)  # only of a pass that did not fail
            return out
        finally:
            run.exit()
    finally:
        run.exit()  # again: an interruption may have hit the first; not in a helper, for torch.compile to follow


@torch.compiler.disable(
    reason="what the forwards of a patched model read was changed since, and compiled code cannot plan its grafts "
    "again. Call the model once without torch.compile after such a change."
)
def _renew_outside(model: nn.Module) -> None:
    """Plan the grafts of a model again outside of compiled code."""
    state = state_of(model)
    if state is not None and state.registry is not None:
        state.registry.renew_stale(model)


def _whole_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the model and make sure that every graft of it was reached."""
    out = _run(self, *args, **kwargs)
    state = state_of(self)  # none where another thread took the last graft off meanwhile
    current = None if state is None else state.context.current
    if state is not None and state.registry is not None and current is not None:
        for path, (training, evaluation) in state.registry.owners.items():
            if (training if self.training else evaluation) and path not in current.visited:
                # A trace of a model around this one enters only the modules that are opened for it.
                if any(isinstance(argument, fx.Proxy) for argument in (*args, *kwargs.values())):
                    break
                raise BypassError(
                    f"The forward pass did not reach the graft on {path!r}.\n"
                    "The model now runs that module's parts by themselves, or not at all.\n"
                    "Call fxgraft.unpatch, then patch the model as it is now."
                )
            if self.training and training and not evaluation and not current.visited[path]:
                _tell_idle(state.registry, path)
    return out


def _tell_idle(registry: GraftRegistry, path: str) -> None:
    """Warn, once for the model, of grafts that are off because their module is in evaluation mode alone."""
    tell_once(
        registry.context,
        (path, "idle"),
        f"{', '.join(map(repr, registry.names(path)))} did nothing in a training pass: {path!r} is in evaluation mode, "
        "and each module follows its own flag.\n"
        f"To freeze the norms in it, put these into evaluation mode, not {path!r} itself; or name another layer.",
    )


def _entry_point(base: type[nn.Module], name: str) -> Callable[..., Any]:
    """Wrap a function of the class that runs part of the model: it runs the grafts, or refuses."""
    own: Callable[..., Any] = getattr(base, name)

    @functools.wraps(own)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is None or state.base is not base:
            return own(self, *args, **kwargs)
        program = state.training if self.training else state.evaluation
        if state.context.current is None and program.acts:
            mode = "training" if self.training else "evaluation"
            names = state.registry.names(state.path) if state.registry is not None else []
            raise BypassError(
                f"{name}() would bypass {', '.join(map(repr, names))}, "
                f"which acts inside {state.base.__name__}.forward in {mode} mode.\n"
                "Call the model itself, or patch at a module's output, which every entry point passes through."
            )
        return _outer_call(self, own, args, kwargs)

    return method


def grafted_class(base: type[nn.Module], outer: bool) -> type[nn.Module]:
    """Make the subclass of ``base`` that grafted modules get.

    Called, as in ``type(layer)(3, 8, 3)``, it makes an instance of ``base``. An instance that comes about in another
    way, as of a subclass of the grafted class, acts like one of ``base``.

    Args:
        base: the module's own class.
        outer: whether the module is the patched model itself, which takes ``target=`` and opens a pass.
    """
    # Looked up among the subclasses, which a class refers to weakly: a cache would keep every class alive.
    for known in base.__subclasses__():
        if known.__dict__.get("_fxgraft_base") is base and known.__dict__["_fxgraft_outer"] is outer:
            return known
    declared = inspect.signature(base.forward)
    parameters = list(declared.parameters.values())
    arguments = Declared.of(declared.replace(parameters=parameters[1:]))
    body: dict[str, Any] = {
        "_fxgraft_outer": outer,
        "_fxgraft_base": base,
        "_fxgraft_forward": _traced_run if outer else _run,
        "_fxgraft_declared": arguments,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "__setstate__": _setstate,
        "__copy__": _shallow_copy,
        "extra_repr": _extra_repr,
        "_replicate_for_data_parallel": _replicate,
        "__prepare_scriptable__": _refuse_scripting,
        "qconfig": _quantized(base),
    }
    if outer:
        body["train"] = _train
        most = sys.maxsize if arguments.any_positional else len(arguments.positional)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            state = state_of(self)
            if state is None or state.base is not base:
                return base.forward(self, *args, **kwargs)
            _refuse_tracing(base, args)
            if len(args) == most + 1 and args[-1] is None and torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
                args = args[:-1]  # the default of target, which torch.onnx's older exporter gives by position
            if len(args) > most:
                raise ConfigError(
                    f"{base.__name__} takes {most} positional argument{'s' * (most != 1)}, and {len(args)} "
                    "were given.\n"
                    "Labels aren't an input of the model: they reach its patches by name.\n"
                    "Call model(x, target=y)."
                )
            names = _options(state)
            options = {name: arguments.given(name, args, kwargs) for name in (*names, LABELS)}
            options = {name: value for name, value in options.items() if value is not None}
            return _outer_call(self, _whole_call, args, arguments.own(names, kwargs), options)

        # torch.export and trainers read the signature: it stays the model's own, plus the labels.
        keyword = inspect.Parameter(TARGET, inspect.Parameter.KEYWORD_ONLY, default=None)
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        if TARGET not in declared.parameters:
            parameters.insert(at, keyword)
        run = forward
        for name in ENTRY_POINTS:
            if callable(getattr(base, name, None)):
                body[name] = _entry_point(base, name)
        if callable(getattr(base, "no_weight_decay", None)):
            body["no_weight_decay"] = _no_weight_decay
        if callable(getattr(base, "set_grad_checkpointing", None)):
            body["set_grad_checkpointing"] = _set_grad_checkpointing
    else:

        def part(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            state = state_of(self)
            if (
                state is None or state.base is not base
            ):  # this instance was never grafted: it acts like one of ``base``
                return base.forward(self, *args, **kwargs)
            _refuse_tracing(base, args)
            return _run(self, *args, **kwargs)

        run = part
    run.__doc__, run.__module__ = base.forward.__doc__, base.forward.__module__
    run.__signature__ = declared.replace(parameters=parameters)  # type: ignore[attr-defined]
    body["forward"] = run
    if issubclass(base, fx.GraphModule):
        body["recompile"] = _recompile
    if hasattr(base, "__deepcopy__"):
        # Only there: wrappers that hand unknown attributes on to the model would be copied as if they were the model.
        body["__deepcopy__"] = _deepcopy
    # The name stays the base's: configurations and some libraries' choices go by the name of a class.
    body["__qualname__"] = base.__qualname__
    return cast("type[nn.Module]", _making_bases(type(base))(base.__name__, (base,), body))


@functools.cache
def _making_bases(metaclass: type) -> type:
    """Make a metaclass for grafted classes: called, such a class makes an instance of its base."""

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = cls._fxgraft_base if "_fxgraft_base" in vars(cls) else cls
        return metaclass.__call__(made, *args, **kwargs)  # type: ignore[operator]

    return type(metaclass.__name__, (metaclass,), {"__call__": call})


def _recompile(self: fx.GraphModule) -> Any:
    """Regenerate a GraphModule's code on its own class: it writes ``forward`` onto ``type(self)``."""
    grafted = type(self)
    with restoring(partial(object.__setattr__, self, "__class__", grafted)):
        self.__class__ = grafted._fxgraft_base  # type: ignore[attr-defined]
        return self.recompile()


def _no_weight_decay(self: nn.Module) -> Any:
    """Name the parameters that the model excludes from weight decay, and their counterparts in grafts."""
    state = state_of(self)
    listed = _base(self).no_weight_decay(self)  # type: ignore[attr-defined]
    pairs = {} if state is None or state.registry is None else state.registry.counterparts()
    beside = {
        own for own, stock in pairs.items() if any(fnmatch.fnmatch(stock, pattern) for pattern in listed)
    }
    return {*listed, *beside} if beside else listed


def _set_grad_checkpointing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Switch checkpointing as the model does, then trace again: graphs hold what the flag decided."""
    state = state_of(self)
    out = _base(self).set_grad_checkpointing(self, *args, **kwargs)  # type: ignore[attr-defined]
    if state is not None and state.registry is not None:
        state.registry.renew(self)
    return out


def _train(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Switch the mode as the model does, and check first what compiled code trained until then."""
    state = state_of(self)
    if state is not None and not torch.compiler.is_compiling():
        state.context.watch.look_back(self, state.context.loss_grafts, state.context.outputs)
    return _base(self).train(self, *args, **kwargs)


def _extra_repr(self: nn.Module) -> str:
    """Show the grafts where the module is printed."""
    state = state_of(self)
    own = _base(self).extra_repr(self)
    if state is None:
        return own
    names = state.registry.describe() if state.outer and state.registry else _unit_names(state)
    return ", ".join(part for part in (own, f"grafted: {names}" if names else "") if part)


def _refuse_scripting(self: nn.Module) -> nn.Module:
    """Raise: TorchScript would compile the source of the class, which has no graft in it."""
    if state_of(self) is None:
        return self
    name = _base(self).__name__
    raise BypassError(
        f"torch.jit.script cannot compile a patched {name}.\n"
        "It compiles the source of forward, and what a patched module runs is made from a graph.\n"
        "Use torch.jit.trace(model.eval(), images) or torch.export, or script fxgraft.merge(model) or "
        "fxgraft.unpatch(model)."
    )


def _refuse_tracing(base: type[nn.Module], args: Any) -> None:
    """Raise: another tracer would record a single pass in a single mode."""
    # Traced by itself, a forward with *args gets one proxy for all of them.
    proxies = [args] if isinstance(args, fx.Proxy) else [arg for arg in args if isinstance(arg, fx.Proxy)]
    if proxies and not isinstance(proxies[0].tracer, ShallowTracer):
        raise BypassError(
            f"torch.fx is tracing a patched {base.__name__} (symbolic_trace, create_feature_extractor, prepare_fx).\n"
            "A patched module runs a graph for each mode, and reads what belongs to a call, as labels; a trace would "
            "hold one pass of it.\n"
            "Trace fxgraft.merge(model) or the bare model, or patch what the trace gives: "
            "fxgraft.patch(torch.fx.symbolic_trace(model), ...)."
        )


def _quantized(base: type[nn.Module]) -> property:
    """Make the attribute by which torch's quantization marks layers: setting it shows what would be passed over.

    It looks layers up by their class, which is another one for grafted layers.
    """

    def read(self: nn.Module) -> Any:
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    def write(self: nn.Module, value: Any) -> None:
        # Not needed until somebody quantizes, and slow to import.
        from torch.ao.quantization.quantization_mappings import (
            get_default_dynamic_quant_module_mappings,
            get_default_static_quant_module_mappings,
        )

        state = state_of(self)
        dynamic = base in get_default_dynamic_quant_module_mappings()
        static = value is not None and base in get_default_static_quant_module_mappings()
        if state is not None and (dynamic or static):
            raise WrappedModelError(
                f"Quantization would pass over {state.path!r}, a {base.__name__} that is grafted.\n"
                "It looks layers up by their class, and a grafted layer has one of its own.\n"
                "Quantize fxgraft.merge(model), or patch at another layer."
            )
        self.__dict__["qconfig"] = value

    def delete(self: nn.Module) -> None:
        self.__dict__.pop("qconfig", None)

    return property(read, write, delete)


def _unit_names(state: GraftState) -> str:
    units = [u for p in (state.training, state.evaluation) for u in (*p.inputs, *p.units)]
    units += [*vars(state.units).values(), *state.registered.values()]
    return ", ".join(dict.fromkeys(unit.graft for unit in units if unit.graft))


def _plain(module: nn.Module) -> nn.Module:
    """View a grafted module as an instance of its own class, sharing everything but the graft."""
    state = state_of(module)
    plain = object.__new__(_base(module))
    if state is None:
        plain.__dict__.update(module.__dict__)
        return plain
    if foreign_forward(module):
        raise WrappedModelError(hidden_forward(state.path or state.base.__name__))
    plain.__dict__.update({k: v for k, v in module.__dict__.items() if k not in (STATE, "forward")})
    children = plain.__dict__["_modules"]
    if any(isinstance(child, Unit) for child in children.values()):
        plain.__dict__["_modules"] = {k: v for k, v in children.items() if not isinstance(v, Unit)}
    return plain


def _of_subclass(module: nn.Module) -> bool:
    """Say whether an ungrafted module's class was derived from a grafted class."""
    return state_of(module) is None and "_fxgraft_base" not in vars(type(module))


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Copy and pickle the module without its graft; the patched model adds its registry, to be grafted again."""
    if _of_subclass(self):
        return _base(self).__reduce_ex__(self, protocol)
    registry = _portable(self)
    state = state_of(self)
    plain = _plain(self)
    if state is None:
        return _itself, (plain,)
    reduced = plain.__reduce_ex__(protocol)
    if reduced[:2] == (copyreg.__newobj__, (state.base,)):  # type: ignore[attr-defined]
        # Empty first, so that parts that hold on to the module find it while they are copied.
        return _empty, (state.base,), (reduced[2], registry)
    return _restore, (plain, registry)


def _itself(module: nn.Module) -> nn.Module:
    return module


def _empty(base: type[nn.Module]) -> nn.Module:
    """Begin a copy of a grafted module; `_setstate` ends it."""
    return object.__new__(grafted_class(base, outer=False))


def _setstate(self: nn.Module, state: Any) -> None:
    """Fill a copy that `_empty` began, and graft it again."""
    base = _base(self)
    if _of_subclass(self):
        base.__setstate__(self, state)
        return
    self.__class__ = base
    own, registry = state
    self.__setstate__(own)
    _restore(self, registry)


def _portable(self: nn.Module) -> GraftRegistry | None:
    """Return what travels with a copy of the patched model, once its grafts fit the model as it is now."""
    state = state_of(self)
    if state is None or not state.outer or state.registry is None:
        return None
    state.registry.renew_stale(self)
    return state.registry.portable()


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module by its class's own ``__deepcopy__``; a copy of the patched model is grafted again."""
    registry = _portable(self)
    state = state_of(self)
    plain = self if _of_subclass(self) else _plain(self)
    new = _base(self).__deepcopy__(plain, memo)  # type: ignore[attr-defined]
    memo[id(self)] = new
    if state is None:
        return new
    return _restore(new, copy.deepcopy(registry, memo))


def _shallow_copy(self: nn.Module) -> nn.Module:
    """Copy the outer object only, as ``copy.copy`` does for any module."""
    new = object.__new__(type(self))
    new.__dict__.update(self.__dict__)
    note_patched(new)
    return new


def _restore(module: nn.Module, registry: GraftRegistry | None) -> nn.Module:
    """Graft a copied model again, or mark a copied part as one that waits for its model."""
    if registry is not None:
        registry.restore(module)
        return module
    base = type(module)
    module.__dict__[STATE] = GraftState(base, "", Context(), orphan=True)
    module.__class__ = grafted_class(base, outer=False)
    return module


def _replicate(self: nn.Module) -> nn.Module:
    """Give a replica of DataParallel its own context: replicas run in threads, on labels of their own."""
    state = state_of(self)
    replica = _base(self)._replicate_for_data_parallel(self)
    if state is not None:
        replica.__dict__[STATE] = state
    replica.__class__ = type(self)
    return replica
