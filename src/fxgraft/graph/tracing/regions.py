"""Regions: parts of a forward that run under a grad mode or autocast that their caller doesn't have.

Such a state is set, not handed on, so a graph of values knows nothing of it. While a forward is traced, the state is
read whenever a node is made, however it was set: by a context, a decorator, a call or a helper. The trace is made for
two callers whose states differ in everything: what is the same for both was set by the forward, and what differs is the
caller's. Generated code runs the nodes of a region in ``with`` blocks, as the forward did.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from fxgraft._torch import (
    GRADIENT_SWITCHES,
    SEEDING,
    SETTINGS,
    TorchDispatchMode,
    dispatch_modes,
    pytree,
    top_saved_tensors_hooks,
)
from fxgraft.graph.atomic import restoring

REGION = "fxgraft_region"
"""Key in ``node.meta`` of what a node runs under: a tuple of `Setting`; empty where its caller's state holds."""

_DTYPES = {
    "cpu": (torch.bfloat16, torch.float16),
    "cuda": (torch.float16, torch.float32),
    "mps": (torch.float16, torch.bfloat16),
    "xpu": (torch.bfloat16, torch.float16),
}
"""Device types whose autocast is followed, with the dtype that it has for either caller."""

Setting = tuple[str, Any]
"""A name and a value: ("grad", False), ("inference", True), ("cpu", (enabled, dtype or None, cache or None)), or
("span", number) in an autocast."""

Region = tuple[Setting, ...]


Modes = tuple[Any, ...]
"""Gradients, inference mode, the cache of autocast, and (enabled, dtype) of autocast by device type."""

# Taken here, since their names in torch are watched while a forward is traced.
_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_increment, _decrement = torch.autocast_increment_nesting, torch.autocast_decrement_nesting
_python_state = random.getstate
_cache, _enabled, _dtype = (
    torch.is_autocast_cache_enabled,
    torch.is_autocast_enabled,
    torch.get_autocast_dtype,
)


def _read() -> Modes:
    return _grad(), _inference(), _cache(), *[(_enabled(device), _dtype(device)) for device in _DTYPES]


def _nesting() -> int:
    _increment()
    return _decrement()


def _write(modes: Modes) -> None:
    grad, _, cache, *autocast = modes
    torch.set_grad_enabled(grad)
    torch.set_autocast_cache_enabled(cache)
    for device, (enabled, dtype) in zip(_DTYPES, autocast, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


CALLERS: tuple[Modes, Modes] = (
    (True, False, True, *((False, pair[0]) for pair in _DTYPES.values())),
    (False, False, False, *((True, pair[1]) for pair in _DTYPES.values())),
)
"""The usual caller: gradients, no autocast. And one that differs from it in everything but inference mode."""


@contextlib.contextmanager
def called_by(modes: Modes) -> Iterator[None]:
    """Run the block in these modes, whatever the modes are outside."""
    outside = torch.inference_mode(False) if _inference() else contextlib.nullcontext()
    with outside, restoring(partial(_write, _read())):
        _write(modes)
        yield


def _names() -> list[tuple[Any, str]]:
    """List what code calls that reads or sets the modes."""
    own = [
        (torch, name)
        for name in vars(torch)
        if "autocast" in name and inspect.isbuiltin(getattr(torch, name))
    ]
    return [*own, (torch, "is_grad_enabled"), (torch, "is_inference_mode_enabled"), *GRADIENT_SWITCHES]


_WATCHED = [(holder, name) for holder, name in _names() if hasattr(holder, name)]


@contextlib.contextmanager
def watched_modes(touched: list[str]) -> Iterator[None]:
    """Note in a list the functions that read or set the modes in the block, in this thread."""
    with _watching(_WATCHED, touched):
        yield


@contextlib.contextmanager
def _watching(watched: Sequence[tuple[Any, str]], touched: list[str]) -> Iterator[None]:
    """Note in a list which of the watched functions this thread calls in the block."""
    here = threading.get_ident()
    originals = [(holder, name, getattr(holder, name)) for holder, name in watched]

    def watching(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here:
                touched.append(name)
                if name == "_set_grad_enabled":  # which takes a proxy, of a condition on shapes, for False
                    args = tuple(bool(arg) if isinstance(arg, fx.Proxy) else arg for arg in args)
            return original(*args, **kwargs)

        return call

    def restore() -> None:
        for holder, name, original in originals:
            setattr(holder, name, original)

    with restoring(restore):
        for holder, name, original in originals:
            setattr(holder, name, watching(name, original))
        yield


_WITH_INFERENCE = {"multithreading of autograd", "forward-mode gradients", "view replay of autograd"}
"""What inference mode switches as well."""


def _getters() -> dict[str, Callable[[], Any]]:
    """Name what else a forward may set for the whole process or thread, with a function that reads it."""
    wanted: dict[str, tuple[Any, str]] = {
        "the default dtype": (torch, "get_default_dtype"),
        "the default device": (torch, "get_default_device"),
        "deterministic algorithms": (torch, "are_deterministic_algorithms_enabled"),
        "the deterministic debug mode": (torch, "get_deterministic_debug_mode"),
        "anomaly detection": (torch, "is_anomaly_enabled"),
        "the number of threads": (torch, "get_num_threads"),
        "the precision of float32 products": (torch, "get_float32_matmul_precision"),
        **SETTINGS,
    }
    getters = {}
    for name, (holder, attribute) in wanted.items():
        get = getattr(holder, attribute, None)
        try:
            if get is not None:
                get()
                getters[name] = get
        except RuntimeError:  # some cannot be read once their newer form was used
            continue
    getters["hooks on saved tensors"] = top_saved_tensors_hooks
    return getters


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"the random state of torch": torch.default_generator.get_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            states[f"the random state of cuda:{device}"] = torch.cuda.get_rng_state(device)
    return states


def _numpy() -> Any:
    """Return NumPy's module of random numbers, if somebody has imported it."""
    return getattr(sys.modules.get("numpy"), "random", None)


def _numpy_state() -> list[Any]:
    """Return the state of NumPy's random numbers in a form that can be compared."""
    state = () if _numpy() is None else _numpy().get_state()
    return [entry.tolist() if hasattr(entry, "tolist") else entry for entry in state]


_SEEDING = [
    *((holder, name) for holder, name in SEEDING if hasattr(holder, name)),
    *((torch, name) for name in ("manual_seed", "seed", "set_rng_state")),
    *((torch.random, name) for name in ("manual_seed", "seed", "set_rng_state")),
    *((torch.cuda, name) for name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state")),
    *(
        (random, name)
        for name, value in vars(random).items()
        if inspect.ismethod(value) and name != "getstate"
    ),
    *((random, name) for name in ("random", "getrandbits")),
    *(
        (_numpy(), name)
        for name, value in vars(_numpy() or object).items()
        if not name.startswith(("_", "get_state")) and inspect.ismethod(value)
    ),
]
"""What sets the random states, and what draws Python's and NumPy's random numbers."""


class _Drawing(TorchDispatchMode):
    """Notes in a list which operators of this thread draw from the random states."""

    def __init__(self, drawn: list[str]) -> None:
        super().__init__()
        self._drawn = drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _random_states()
        result = func(*args, **(kwargs or {}))
        after = _random_states()  # of more devices, if the operator was the first on one
        if len(after) != len(before) or any(
            not torch.equal(after[name], state) for name, state in before.items()
        ):
            self._drawn.append(str(func))
        return result


@contextlib.contextmanager
def watched_draws() -> Iterator[list[str]]:
    """Note what this thread does in the block that draws from or sets the random states.

    The states belong to the process: another thread may have changed them.
    """
    drawn: list[str] = []
    mode = _Drawing(drawn)

    def restore() -> None:
        if mode in dispatch_modes():
            mode.__exit__(None, None, None)

    watched = [(holder, name) for holder, name in _SEEDING if hasattr(holder, name)]
    with restoring(restore), _watching(watched, drawn):
        mode.__enter__()
        yield drawn


class StateChangedError(Exception):
    """A traced forward set something that a graph cannot follow.

    Attributes:
        what: what was set, in words.
        line: the line of the forward that set it, or None.
        beside: whether the forward only takes a note, and computes what it would without.
    """

    def __init__(self, what: str, line: str | None, beside: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.line = line
        self.beside = beside


@dataclass
class Recorder:
    """Reads the state whenever a trace makes a node.

    Attributes:
        line: a function that names the line of the user's code that runs now.
        drawn: what drew from or set the random states; see `watched_draws`.
        depth: a function that counts the torch function modes.
        touched: what was called that reads or sets the modes; see `watched_modes`.
        modes: the modes of every node, in order, with the line where they are not the caller's.
        spans: for the nodes in an autocast, the number of the outermost one.
        change: the first thing that a graph cannot follow; None if there is nothing.
    """

    line: Callable[[], str]
    drawn: list[str]
    depth: Callable[[], int]
    touched: list[str] = field(default_factory=list)
    modes: list[tuple[fx.Node, Modes, str | None]] = field(default_factory=list)
    spans: dict[fx.Node, int] = field(default_factory=dict)
    change: StateChangedError | None = None

    def __post_init__(self) -> None:
        self._caller = _read()
        self._level = _nesting()
        self._getters = list({**_getters(), "torch function modes": self.depth}.items())
        self._settings = [get() for _, get in self._getters]
        self._random = _random_states()
        self._python = _python_state()
        self._only_thread = threading.active_count() == 1
        self._numpy = _numpy_state()

    def note(self, node: fx.Node) -> None:
        """Record the modes that a new node runs under."""
        now = _read()
        if self.touched and _nesting() > self._level:
            self.spans[node] = self.touched.count("clear_autocast_cache")
        self.modes.append((node, now, None if now == self._caller else self.line()))
        self._check_settings()

    def found(self, what: str, line: str | None = None, beside: bool = False) -> None:
        """Record something that a graph cannot follow, unless a change as bad is recorded already."""
        if self.change is None or (self.change.beside and not beside):
            self.change = StateChangedError(what, line, beside)

    def _check_settings(self) -> None:
        if self.change is not None and not self.change.beside:
            return None
        for (name, get), before in zip(self._getters, self._settings, strict=True):
            if get() != before and not (name in _WITH_INFERENCE and _inference()):
                return self.found(f"sets {name}", self.line())
        for name, state in _random_states().items():
            if name in self._random and not torch.equal(state, self._random[name]) and self._drew():
                what = f"draws from or sets {name}, outside of what is done to its input"
                return self.found(what, self.line())
        return None

    def _drew(self) -> bool:
        """Say whether this thread changed a random state: it was seen to, or no other thread runs."""
        return bool(self.drawn) or (self._only_thread and threading.active_count() == 1)

    def close(self) -> None:
        """After the forward returned: check that nothing stays set."""
        self._check_settings()
        if _python_state() != self._python and self._drew():
            self.found("draws from or seeds Python's random numbers")
        if self._numpy and self._drew() and _numpy_state() != self._numpy:
            self.found("draws from or seeds NumPy's random numbers")
        if _read() != self._caller:
            self.found("leaves another grad mode or autocast behind than it found")
        self._getters, self._settings, self._random = (
            [],
            [],
            {},
        )  # nodes made from here on are not the forward's


def mark_regions(first: Recorder, second: Recorder) -> None:
    """Write into the nodes of a trace the modes that they run under, or record that these cannot be told.

    Args:
        first: what was read in the trace that was made for the first of `CALLERS`.
        second: the same of a trace for the second one; the first again where the forward neither reads
            nor sets anything of the modes.
    """
    if second is first:
        for node, *_ in first.modes:
            node.meta[REGION] = ()
        return None
    another = "goes another way without gradients or under autocast"
    for (node, one, line), (other, two, second_line) in zip(first.modes, second.modes, strict=False):
        line = line or second_line
        if (node.op, _target(node), _shape(node)) != (other.op, _target(other), _shape(other)):
            return first.found(f"{another} (from {node.name!r} on)", line)
        try:
            region = _region(one, two, line) if line is not None else ()
        except StateChangedError as error:
            return first.found(error.what, line)
        span = first.spans.get(node)
        node.meta[REGION] = (("span", span), *region) if region and span is not None else region
    if len(first.modes) != len(second.modes):
        first.found(another)
    return None


def _target(node: fx.Node) -> Any:
    return (
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", type(node.target))
    )


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a node in a form that can be compared across two traces."""
    plain = (bool, int, float, str, type(None), torch.dtype)
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return tuple(
        leaf.name if isinstance(leaf, fx.Node) else leaf if isinstance(leaf, plain) else type(leaf)
        for leaf in leaves
    )


def _region(one: Modes, two: Modes, line: str | None) -> Region:
    """Return the modes that the forward set: those that are the same for two callers that differ in all of them."""

    def own(name: str, values: tuple[Any, Any], callers: tuple[Any, Any]) -> Any:
        if values == callers:
            return None
        if values[0] != values[1]:
            raise StateChangedError(f"sets {name} by what its caller has", line)
        return values[0]

    settings: list[Setting] = []
    parts = list(zip(one, two, *CALLERS, strict=True))
    grad, inference, cache = (
        own(name, part[:2], part[2:])
        for name, part in zip(("the grad mode", "inference mode", "autocast"), parts, strict=False)
    )
    if inference:
        settings.append(("inference", True))
    if grad is not None and not (inference and not grad):
        settings.append(("grad", grad))
    for device, part in zip(_DTYPES, parts[3:], strict=True):
        enabled, dtype = (own("autocast", settings[:2], settings[2:]) for settings in zip(*part, strict=True))
        if enabled is None and dtype is not None:
            raise StateChangedError("sets the dtype of autocast, and not whether it is enabled", line)
        if enabled is not None:
            settings.append((device, (enabled, dtype, cache)))
    return tuple(settings)


def region_of(node: fx.Node) -> Region:
    """Return the modes of a node that its forward set; empty where all are its caller's."""
    return node.meta.get(REGION, ())


@contextlib.contextmanager
def entered(region: Region) -> Iterator[None]:
    """Run the block under a region."""
    with contextlib.ExitStack() as stack:
        for name, value in region:
            if name == "span":
                continue
            if name == "grad":
                stack.enter_context(torch.set_grad_enabled(value))
            elif name == "inference":
                stack.enter_context(torch.inference_mode(value))
            else:
                enabled, dtype, cache = value
                stack.enter_context(torch.autocast(name, dtype, enabled, cache))
        yield


def _source(region: Region) -> str:
    """Write down what `entered` enters."""
    parts = []
    for name, value in region:
        if name == "span":
            continue
        if name == "grad":
            parts.append(f"torch.set_grad_enabled({value})")
        elif name == "inference":
            parts.append(f"torch.inference_mode({value})")
        else:
            enabled, dtype, cache = value
            more = f", dtype={dtype}" if dtype is not None else ""
            more += f", cache_enabled={cache}" if cache is not None else ""
            parts.append(f'torch.autocast("{name}", enabled={enabled}{more})')
    return ", ".join(parts)


def python_code(graph: fx.Graph) -> Any:
    """Generate the code of a graph, as torch.fx does, with its regions in ``with`` blocks.

    A node that was inserted later, without a region, runs in the region of the node before it.
    """
    regions: list[Region] = [()]
    marks: list[fx.Node] = []
    for node in list(graph.nodes):
        region = () if node.op in ("placeholder", "output") else node.meta.get(REGION, regions[-1])
        if region != regions[-1]:
            with graph.inserting_before(node):
                marks.append(graph.call_function(_mark, (len(regions),)))
            regions.append(region)
    code = graph.python_code(root_module="self")
    for mark in marks:
        graph.erase_node(mark)
    if marks:
        code.src = "\n".join(
            _blocks(code.src.split("\n"), [region_mark.name for region_mark in marks], regions[1:])
        )
    return code


def _blocks(lines: Iterable[str], marks: Sequence[str], regions: Sequence[Region]) -> Iterator[str]:
    """Turn the lines of the marks into ``with`` lines, and indent what follows."""
    waiting = dict(zip(marks, regions, strict=True))
    indent, outer = "", ()
    for line in lines:
        name = line.strip().partition(" ")[0]
        if name not in waiting:
            yield indent + line if line.strip() else line
            continue
        region = waiting[name]
        inside = _span(region) is not None and _span(region) == _span(outer)
        if not inside:
            outer = region
        indent = "    " * (bool(outer) + (region != outer))
        if region and not (inside and region == outer):
            yield f"{indent}with {_source(region)}:"


def _span(region: Region) -> Any:
    """Number the outermost autocast of a region. Leaving it drops the cast weights, so it is left only once."""
    return next((value for name, value in region if name == "span"), None)


def _mark(number: int) -> None:
    """Mark the line where a region begins; the call never runs."""
