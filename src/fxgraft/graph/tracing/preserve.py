"""What looking at a model must leave as it was: modes, attributes, globals, random state, checkpointing.

A graph of values doesn't repeat such changes. So the changes that a forward makes while it is traced are found here.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import inspect
import operator
import random
import re
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from fxgraft._torch import pytree
from fxgraft.graph.atomic import Step, apply_atomically, restoring
from fxgraft.graph.dataflow.graph_utils import upstream_of
from fxgraft.graph.tracing.branches import iadd, imul, isub, itruediv
from fxgraft.graph.tracing.regions import Recorder


@contextlib.contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every submodule on exit, one by one.

    ``model.train()`` on the way out would thaw a BatchNorm that the user froze in evaluation mode.
    """
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, flag in flags:
            if module.training is not flag:
                module.training = flag

    with restoring(restore):
        yield


@contextlib.contextmanager
def preserved_data(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Restore the memory of every parameter on exit: a forward that sets ``weight.data`` would leave a fake there.

    Yields:
        A function that names the parameters that hold a fake.
    """
    kept = [(name, parameter, parameter.data) for name, parameter in model.named_parameters()]

    def faked() -> list[str]:
        return [
            name for name, parameter, data in kept if parameter.device != data.device
        ]  # fakes are on the meta device

    def restore() -> None:
        for _, parameter, data in kept:
            if parameter.device != data.device:
                parameter.data = data

    with restoring(restore):
        yield faked


# Registered tensors and what a graft keeps: no forward pass sets them, but planning again may.
_LASTING = ("_modules", "_parameters", "_fxgraft")

MISSING: Final = type("_Missing", (), {"__repr__": lambda self: "nothing"})()
"""Stands for an attribute or an entry that is not there."""

Change = tuple[nn.Module, str, Any, Any]
"""A module, the name of its attribute, and what stood there, or in it, before and after."""


class Snapshot:
    """The attributes of modules as they are now, with what their containers and plain objects hold.

    Args:
        modules: the modules whose attributes are kept.
        beside: modules of which only the attributes are kept, not what these hold.
    """

    def __init__(self, modules: Iterable[nn.Module], beside: Iterable[nn.Module] = ()) -> None:
        self._kept: list[tuple[nn.Module, str, Any, Any]] = []
        inner = set(modules)
        for module in dict.fromkeys((*inner, *beside)):
            own = {k: v for k, v in module.__dict__.items() if k not in _LASTING}
            self._kept.append((module, "", module.__dict__, own))
            for name, value in own.items() if module in inner else ():
                self._kept += [
                    (module, name, container, _content(container)) for container in _containers(value)
                ]

    def has(self, module: nn.Module, attribute: str) -> bool:
        """Say whether a module had an attribute of its own."""
        return any(holder is module and not name and attribute in own for holder, name, _, own in self._kept)

    def changes(self) -> Iterator[Change]:
        """Yield what has changed since. An entry of a container goes by the name of the attribute that holds it."""
        for module, name, container, before in self._kept:
            if _same(container, before):
                continue
            if not isinstance(container, dict):
                yield module, name, before, _content(container)
                continue
            keys = [key for key in dict.fromkeys([*before, *container]) if name or key not in _LASTING]
            for key in keys:
                old, new = before.get(key, MISSING), container.get(key, MISSING)
                if old is not new:
                    yield module, str(key) if name in ("", "_buffers") else name, old, new

    def restore(self) -> None:
        """Put back what differs."""
        for _, name, container, before in self._kept:
            if _same(container, before):
                continue
            if not name:
                for key in [key for key in container if key not in before and key not in _LASTING]:
                    del container[key]
                container.update(before)
            elif isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                (container.extend if isinstance(container, deque) else container.update)(before)


def _content(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _same(container: Any, before: Any) -> bool:
    if isinstance(container, dict):
        lasting = sum(key in container for key in _LASTING if key not in before)
        unchanged = len(container) - lasting == len(before)
        return unchanged and all(container.get(k, MISSING) is v for k, v in before.items())
    return len(container) == len(before) and all(map(operator.is_, container, before))


def _containers(value: Any, depth: int = 3) -> Iterator[Any]:
    """Yield the containers that a value is or holds; of a plain object, the dictionary of its attributes."""
    if not depth or isinstance(value, _LEAVES):
        return
    if isinstance(value, (dict, list, set, deque)):
        yield value
    elif not isinstance(value, tuple):
        value = getattr(value, "__dict__", None)
        if type(value) is not dict:
            return
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        yield from _containers(item, depth - 1)


_LEAVES = (
    *(str, int, float, type(None), Tensor, nn.Module, type, torch.dtype, torch.device, weakref.ref),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType, functools.partial),
)
"""What is not looked into."""


@contextlib.contextmanager
def preserved_attributes(
    modules: Iterable[nn.Module], beside: Iterable[nn.Module] = ()
) -> Iterator[Snapshot]:
    """Put back on exit whatever a forward pass sets on modules.

    Some keep what they computed once (attention biases, position grids). What they compute here is fake, or
    symbolic, and must not be found there by a pass that is not.

    Yields:
        What was there before.
    """
    kept = Snapshot(modules, beside)
    with restoring(kept.restore):
        yield kept


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global generators on exit: a trace executes the user's own Python code.

    The generators belong to the process: numbers that other threads draw meanwhile are drawn again.
    """
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    torch_state = torch.get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    cuda_states = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore() -> None:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        for device, kept in cuda_states:
            torch.cuda.set_rng_state(kept, device)

    with restoring(restore):
        yield


@contextlib.contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Draw from generators of its own in the block, and leave the global ones where they are."""
    with preserved_random_state():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # otherwise the seed would be kept for when it is
            torch.cuda.manual_seed_all(seed)
        yield


_CHECKPOINT_OPTIONS = (
    "use_reentrant",
    "context_fn",
    "determinism_check",
    "debug",
    "preserve_rng_state",
    "early_stop",
)


@contextlib.contextmanager
def replaced_checkpoint(run: Callable[..., Any]) -> Iterator[None]:
    """Route ``torch.utils.checkpoint.checkpoint`` to ``run(function, args, kwargs)`` for the time of the block.

    Calls from other threads go on checkpointing.
    """
    original = torch.utils.checkpoint.checkpoint
    here = threading.get_ident()

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return original(function, *args, **kwargs)
        for name in _CHECKPOINT_OPTIONS:
            kwargs.pop(name, None)
        return run(function, args, kwargs)

    def restore() -> None:
        torch.utils.checkpoint.checkpoint = original

    with restoring(restore):
        torch.utils.checkpoint.checkpoint = checkpoint  # type: ignore[assignment]
        yield


class AppliedFunction:
    """A `torch.autograd.Function` as a function that a graph can call. Two of the same class are equal.

    Args:
        function: the class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = "autograd_function"  # not the user's, which may be that of another operation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward; gradients go through the class's own backward."""
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AppliedFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


@contextlib.contextmanager
def replaced_functions(
    run: Callable[[AppliedFunction, tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Route `torch.autograd.Function.apply` on proxies to ``run(function, args, kwargs)`` for the time of the block.

    Its forward would be traced, and its backward be lost.
    """
    original = torch.autograd.Function.__dict__["apply"]  # the classmethod itself, not bound to Function

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return run(AppliedFunction(cls), args, kwargs)
        return original.__get__(None, cls)(*args, **kwargs)

    def restore() -> None:
        torch.autograd.Function.apply = original

    with restoring(restore):
        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        yield


@contextlib.contextmanager
def untouched(opened: Sequence[nn.Module], training: bool) -> Iterator[Callable[[], list[str]]]:
    """Set the mode of the opened modules and of all modules in them; on exit, restore tensors that were written to.

    A forward may read the mode of a layer that it holds, as ``F.dropout(x, 0.5, self.drop.training)``. Where the first
    module has the mode that is wanted, its layers keep theirs: some are frozen.

    Yields:
        A function that names the tensors that were written to so far.
    """
    flags = [(module, module.training) for whole in opened for module in whole.modules()]
    keeps = opened[0].training is training
    own = [(k, v) for module in opened for k, v in (*module._buffers.items(), *vars(module).items())]
    tensors = [
        (k, v, v._version, v.clone()) for k, v in own if isinstance(v, Tensor) and not v.is_inference()
    ]

    def written() -> list[tuple[str, Tensor, Tensor]]:
        return [(name, t, before) for name, t, version, before in tensors if t._version != version]

    changed: list[tuple[str, Tensor, Tensor]] = []

    def restore() -> None:
        for module, flag in flags:
            module.training = flag
        changed[:] = changed or written()
        for _, tensor, before in changed:
            tensor.detach().copy_(before)

    with restoring(restore), preserved_random_state():
        for module, flag in flags:
            module.training = flag if keeps else training
        yield lambda: [name for name, _, _ in written()]


class Reachable:
    """The globals and class attributes that the code of modules can set.

    Args:
        modules: the modules whose code is followed.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        classes = {
            cls
            for module in modules
            for cls in type(module).__mro__
            if not cls.__module__.startswith("torch.")
        }
        names = {cls.__module__ for cls in classes if cls is not object}
        self._spaces: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        for holder in (*classes - {object}, *(sys.modules[name] for name in names if name in sys.modules)):
            # Names like __builtins__ and __annotations__ are Python's own.
            content = {name: value for name, value in vars(holder).items() if not _is_special(name)}
            inner = {k: type(v)(v) for k, v in content.items() if type(v) in (list, dict, set)}
            self._spaces.append((holder, content, inner))

    def changes(self) -> Iterator[tuple[Any, str]]:
        """Yield what was set, replaced, appended to or counted up since; entries added to a dictionary are a cache."""
        for holder, content, inner in self._spaces:
            now = vars(holder)
            for name in dict.fromkeys([*content, *now]):
                old, new = content.get(name, MISSING), now.get(name, MISSING)
                lazily = (old is None and not isinstance(new, (bool, int, float))) or _is_special(name)
                if old is not new and not lazily:
                    yield holder, name
            for name, before in inner.items():
                if name.startswith("__"):  # such as what was warned of
                    continue
                value = content[name]
                if isinstance(value, dict):
                    same = all(value.get(key, MISSING) is item for key, item in before.items())
                else:
                    same = len(value) == len(before)
                if not same:
                    yield holder, name

    def restore(self) -> None:
        """Put back what differs, and write to nothing else: other code reads the same globals meanwhile."""
        steps: list[Step] = []
        for holder, content, inner in self._spaces:
            now = vars(holder)
            new = [name for name in now if name not in content and not _is_special(name)]
            steps += [partial(delattr, holder, name) for name in new]
            steps += [
                partial(setattr, holder, name, value)
                for name, value in content.items()
                if now.get(name, MISSING) is not value
            ]
            for name, before in inner.items():
                steps += _putting_back(content[name], before)
        apply_atomically(steps)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _putting_back(value: Any, before: Any) -> list[Step]:
    """Return the steps that give a list, a set or a dictionary its content back; none where it has it."""
    if isinstance(value, list):
        same = len(value) == len(before) and all(map(operator.is_, value, before))
        return [] if same else [partial(value.__setitem__, slice(None), before)]
    if isinstance(value, set):
        return [partial(value.intersection_update, before), partial(value.update, before)] * (value != before)
    changed = {key: old for key, old in before.items() if value.get(key, MISSING) is not old}
    added = [partial(value.pop, key, None) for key in value if key not in before]
    return added + ([partial(value.update, changed)] if changed else [])


@contextlib.contextmanager
def preserved_globals(modules: Iterable[nn.Module]) -> Iterator[Reachable]:
    """Put back on exit the globals and class attributes that the code of modules sets."""
    reachable = Reachable(modules)
    with restoring(reachable.restore):
        yield reachable


@contextlib.contextmanager
def noticed_prints(recorder: Recorder) -> Iterator[None]:
    """Note calls of ``print`` in this thread, and print nothing: a graph would not print either."""
    original = builtins.print
    here = threading.get_ident()

    def noticing(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == here:
            recorder.found("prints", recorder.line(), beside=True)
        else:
            original(*args, **kwargs)

    def restore() -> None:
        builtins.print = original

    with restoring(restore):
        builtins.print = noticing
        yield


def find_changes(
    recorder: Recorder, kept: Snapshot, reachable: Reachable, graph: fx.Graph, opened: Sequence[nn.Module]
) -> None:
    """Record where the traced forward changed something that its code can reach.

    A value that is computed from parameters and sizes alone, and stored where nothing stood, is a cache: the graph
    computes it itself. So are the constants that torch.fx stores.
    """
    stored = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for module, name, old, new in kept.changes():
        first = old is MISSING or old is None
        declared = isinstance(getattr(type(module), name, None), functools.cached_property)
        cached = first and (name in stored or declared or _is_cache(new))
        if not cached and not _is_itself(new, name):
            line = line_of(name, (module, *opened))
            recorder.found(f"sets {name!r} of {module._get_name()}", line, beside=name != "training")
    for holder, name in reachable.changes():
        shown = f"attribute {name!r} of {holder.__name__}" if isinstance(holder, type) else f"global {name!r}"
        recorder.found(f"changes the {shown}", line_of(name, opened), beside=True)


def _is_itself(value: Any, name: str) -> bool:
    """Say whether a value is the buffer of that name after operations in place, as in ``self.count += 1``."""
    node = value.node if isinstance(value, fx.Proxy) else None
    while node is not None and (node.target in (iadd, isub, imul, itruediv) or _writes(node)):
        node = next(iter(node.all_input_nodes), None)
    return node is not None and node.op == "get_attr" and str(node.target).rpartition(".")[2] == name


def _writes(node: fx.Node) -> bool:
    return node.op == "call_method" and re.fullmatch(r"[a-z]\w*[a-z0-9]_", str(node.target)) is not None


def _is_cache(value: Any) -> bool:
    """Say whether a value depends on no input of the trace."""
    leaves = pytree.tree_leaves(value)
    for leaf in leaves:
        if isinstance(leaf, fx.Proxy):
            if any(node.op == "placeholder" for node in (leaf.node, *upstream_of(leaf.node))):
                return False
        elif not isinstance(leaf, Tensor):
            return False
    return bool(leaves)


def kept_values(proxies: Sequence[weakref.ref[fx.Proxy]]) -> list[str]:
    """Name the values of a trace that outlive it, since the forward stored them somewhere outside."""

    def alive() -> list[str]:
        living = (proxy() for proxy in proxies)
        return [proxy.node.name for proxy in living if proxy is not None and proxy.node.op != "get_attr"]

    # Reference cycles of torch.fx are young. Collecting the young generation is cheap, collecting all is not.
    for generation in (0, 1, 2):
        if not alive():
            return []
        gc.collect(generation)
    return alive()


def line_of(name: str, modules: Iterable[nn.Module]) -> str | None:
    """Find the line in the code of modules that sets a name."""
    word = re.escape(name)
    setting = re.compile(rf"""\b{word}\b[^=\n]*(=(?!=)|\.\w+\()|\(["']{word}["']|setattr\(.*{word}""")
    for cls in dict.fromkeys(cls for module in modules for cls in type(module).__mro__):
        if cls.__module__.startswith("torch.") or cls is object:
            continue
        for function in vars(cls).values():
            code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
            if code is None or code.co_name == "__init__":
                continue
            try:
                lines, start = inspect.getsourcelines(code)
            except (OSError, TypeError):  # code that was generated
                continue
            for number, line in enumerate(lines):
                if setting.search(line):
                    return f"{code.co_filename}:{start + number}: {line.strip()}"
    return None
