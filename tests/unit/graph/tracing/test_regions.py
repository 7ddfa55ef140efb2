"""Forwards that act through state: what they set is set again in the graph, and what cannot be is refused."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.toys import assert_same, state_of_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxgraft
from fxgraft.errors import TraceError

CLASSES = 3


class Net(nn.Module):
    """A stem, one residual block whose branch adds a shift, pooling, one linear layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(block)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class Block(nn.Module):
    """A residual block. What it adds, subclasses compute under some state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.side = nn.Conv2d(6, 6, 1)
        self.gate = nn.Parameter(torch.ones(6, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6, 1, 1))
        self.scale = torch.tensor(0.5)
        self.calls = 0
        self.seen: Any = None
        self.log: list[Any] = []
        self.stats = {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + (self.conv(x) + self.extra(x)))

    def extra(self, x: Tensor) -> Tensor:
        return self.side(x).mean((2, 3), keepdim=True)


def _no_grad(self: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.side(x * self.gate).mean((2, 3), keepdim=True)


@torch.no_grad()
def _decorated(self: Block, x: Tensor) -> Tensor:
    return self.side(x * self.gate)


def _helper(x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    x = x.mean((2, 3), keepdim=True)
    torch.set_grad_enabled(before)
    return x


def _through_helper(self: Block, x: Tensor) -> Tensor:
    return self.gate * _helper(self.side(x))


def _switched(self: Block, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not self.training):
        return self.side(x)


def _enabled(self: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = self.side(x)
        with torch.enable_grad():
            return shift + self.side(x * self.gate)


@torch.enable_grad()
def _enabled_alone(self: Block, x: Tensor) -> Tensor:
    return self.side(x)


def _inference(self: Block, x: Tensor) -> Tensor:
    with torch.inference_mode():
        shift = self.side(x).mean((2, 3), keepdim=True)
    return self.side(x) + shift


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        yield
    finally:
        torch._C._set_grad_enabled(before)


def _own_context(self: Block, x: Tensor) -> Tensor:
    with _frozen():
        return self.side(x)


def _in_float32(self: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.side(x.float())


def _in_bfloat16(self: Block, x: Tensor) -> Tensor:
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        x = self.side(x)
        with torch.autocast("cpu", enabled=False):
            x = x.float() * self.gate
        return self.side(x)


@torch.amp.autocast("cpu", enabled=False)
def _decorated_float32(self: Block, x: Tensor) -> Tensor:
    return self.side(x.float())


def _both(self: Block, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=True, dtype=torch.float16, cache_enabled=False):
        return self.side(x)


def _other_device(self: Block, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return self.side(x)


def _counts_by_adding(self: Block, x: Tensor) -> Tensor:
    self.count += 1
    return self.side(x) * self.count


def _counts_in_buffer(self: Block, x: Tensor) -> Tensor:
    self.count.add_(1)
    return self.side(x) * self.count


def _on_its_device(self: Block, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False), torch.autocast(self.gate.device.type, torch.float16):
        return self.side(x.float())


def _part_of_buffer(self: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.mean[:] = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3)).view(6, 1, 1)
    return self.side(x) * self.mean


KEPT = [
    *(_on_its_device, _part_of_buffer),
    *(_no_grad, _decorated, _through_helper, _switched, _enabled, _enabled_alone, _inference, _own_context),
    *(_in_float32, _in_bfloat16, _decorated_float32, _both, _other_device, _counts_in_buffer),
    _counts_by_adding,
]


def make(extra: Callable[[Any, Tensor], Tensor], seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(type("Special", (Block,), {"extra": extra})())


def patched(model: Net, method: str) -> Net:
    options: dict[str, dict[str, Any]] = {
        "taps": {"layers": ["blocks.0.add"]},
        "crossnorm": {"p": 0.0, "position": "residual"},
        "selfnorm": {"position": "residual"},
    }
    return fxgraft.patch(model, method, **options[method], input_size=(3, 8, 8))


AMBIENTS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def outcome(model: Net, ambient: str) -> dict[str, Any]:
    """Return what a step gives: the output, whether it has gradients, and those of the parameters."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with AMBIENTS[ambient]():
        out = model(x)
    model.zero_grad()
    if out.requires_grad:
        out.float().square().sum().backward()
    grads = {
        k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters() if "graft" not in k
    }
    return {"out": out.detach().clone(), "grads": grads, "requires": out.requires_grad}


def assert_same_outcome(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("extra", KEPT, ids=lambda f: f.__name__)
def test_a_patched_forward_sets_what_the_bare_one_sets(extra: Callable[..., Tensor]) -> None:
    bare, model = make(extra), patched(make(extra), "crossnorm")
    for training in (True, False):
        for ambient in AMBIENTS:
            bare.train(training)
            model.train(training)
            assert_same_outcome(outcome(bare, ambient), outcome(model, ambient))
            assert torch.equal(bare.blocks[0].count, model.blocks[0].count)
            assert torch.equal(bare.blocks[0].mean, model.blocks[0].mean)


@pytest.mark.parametrize("method", ["taps", "selfnorm"])
def test_so_do_other_methods(method: str) -> None:
    bare, model = make(_enabled), patched(make(_enabled), method)
    tolerance = 0.0 if method == "taps" else 1e-4  # a gate of 1 multiplies
    assert_same_outcome(outcome(bare, "plain"), outcome(model, "plain"), tolerance)


GLOBAL = 0
HISTORY: list[Any] = []


class Meter:
    def __init__(self) -> None:
        self.count = 0


def _forked(self: Block, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return self.side(x) + torch.randn_like(x)


def _seeded(self: Block, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return self.side(x) + torch.randn_like(x)


def _drawn_once(self: Block, x: Tensor) -> Tensor:
    return self.side(x) * torch.rand(1)


def _python_chance(self: Block, x: Tensor) -> Tensor:
    return self.side(x) if random.random() < 0.5 else x


def _numpy_chance(self: Block, x: Tensor) -> Tensor:
    return self.side(x) * float(np.random.rand())


def _frozen_for_a_call(self: Block, x: Tensor) -> Tensor:
    was = self.side.training
    self.side.eval()
    x = self.side(x)
    self.side.train(was)
    return x


def _other_weights(self: Block, x: Tensor) -> Tensor:
    return torch.func.functional_call(self.side, {k: v * 2 for k, v in self.side.named_parameters()}, (x,))


def _saved_hooks(self: Block, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return self.side(x)


def _offloaded(self: Block, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return self.side(x)


def _counter(self: Block, x: Tensor) -> Tensor:
    self.calls += 1
    return self.side(x)


def _counter_made(self: Block, x: Tensor) -> Tensor:
    self.steps = getattr(self, "steps", 0) + 1
    return self.side(x)


def _buffer_replaced(self: Block, x: Tensor) -> Tensor:
    self.count = self.count + 1
    return self.side(x)


def _plain_tensor(self: Block, x: Tensor) -> Tensor:
    self.scale.mul_(0.5)
    return self.side(x) * self.scale


def _kept_value(self: Block, x: Tensor) -> Tensor:
    self.seen = x
    return self.side(x)


def _kept_size(self: Block, x: Tensor) -> Tensor:
    self.seen = x.shape
    return self.side(x)


def _kept_on_child(self: Block, x: Tensor) -> Tensor:
    self.side.height = x.shape[2]
    return self.side(x)


def _logged(self: Block, x: Tensor) -> Tensor:
    self.log.append(x.shape[0])
    return self.side(x)


def _in_dict(self: Block, x: Tensor) -> Tensor:
    self.stats["n"] += 1
    return self.side(x)


def _metered(self: Block, x: Tensor) -> Tensor:
    self.meter.count += 1
    return self.side(x)


def _class_counter(self: Block, x: Tensor) -> Tensor:
    type(self).total = getattr(type(self), "total", 0) + 1
    return self.side(x)


def _global(self: Block, x: Tensor) -> Tensor:
    global GLOBAL
    GLOBAL += 1
    return self.side(x)


def _global_list(self: Block, x: Tensor) -> Tensor:
    HISTORY.append(x.mean())
    return self.side(x)


def _registered(self: Block, x: Tensor) -> Tensor:
    self.register_buffer("last", x)
    return self.side(x)


def _printed(self: Block, x: Tensor) -> Tensor:
    print("block", x.shape)  # noqa: T201
    return self.side(x)


def _frozen_norm(self: Block, x: Tensor) -> Tensor:
    self.side.eval()
    return self.side(x)


def _default_dtype(self: Block, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    x = x * 2
    torch.set_default_dtype(torch.float32)
    return self.side(x)


def _kernels(self: Block, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        x = F.scaled_dot_product_attention(x, x, x)
    return self.side(x)


def _flags(self: Block, x: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return self.side(x)


def _deterministic(self: Block, x: Tensor) -> Tensor:
    torch.use_deterministic_algorithms(True)
    x = self.side(x)
    torch.use_deterministic_algorithms(False)
    return x


def _left_without_gradients(self: Block, x: Tensor) -> Tensor:
    x = self.side(x)
    torch.set_grad_enabled(False)
    return x


def _by_grad_mode(self: Block, x: Tensor) -> Tensor:
    return self.side(x) * 2 if torch.is_grad_enabled() else self.side(x)


def _other_than_caller(self: Block, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not torch.is_grad_enabled()):
        return self.side(x)


def _by_autocast(self: Block, x: Tensor) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return self.side(x.to(dtype))


REFUSED: dict[Callable[..., Tensor], str] = {
    _forked: "the random state of torch",
    _seeded: "the random state of torch",
    _drawn_once: "the random state of torch",
    _python_chance: "Python's random numbers",
    _numpy_chance: "NumPy's random numbers",
    _frozen_for_a_call: r"sets 'training' of Conv2d for a call, at .*test_regions\.py:\d+",
    _saved_hooks: "hooks on saved tensors",
    _offloaded: "hooks on saved tensors",
    _counter: r"sets 'calls' of Special, at .*test_regions\.py:\d+: self\.calls \+= 1",
    _counter_made: r"sets 'steps' of Special, at .*: self\.steps = getattr",
    _buffer_replaced: r"sets 'count' of Special, at .*: self\.count = self\.count",
    _plain_tensor: r"writes to 'scale', at .*: self\.scale\.mul_\(0\.5\)",
    _kept_value: r"sets 'seen' of Special, at .*: self\.seen = x",
    _kept_size: r"sets 'seen' of Special, at .*: self\.seen = x\.shape",
    _kept_on_child: r"sets 'height' of Conv2d, at .*: self\.side\.height = x\.shape\[2\]",
    _logged: r"sets 'log' of Special, at .*: self\.log\.append",
    _in_dict: r"sets 'stats' of Special, at .*: self\.stats\[\"n\"\] \+= 1",
    _metered: r"sets 'meter' of Special",
    _class_counter: r"changes the attribute 'total' of Special",
    _global: r"changes the global 'GLOBAL', at .*: GLOBAL \+= 1",
    _global_list: r"changes the global 'HISTORY', at .*: HISTORY\.append",
    _registered: r"sets 'last' of Special, at .*: self\.register_buffer",
    _printed: r"prints, at .*test_regions\.py:\d+",
    _frozen_norm: r"sets 'training' of Conv2d",
    _default_dtype: "sets the default dtype",
    _kernels: "the kernels of attention",
    _flags: r"cudnn\.enabled",
    _deterministic: "deterministic algorithms",
    _left_without_gradients: "leaves another grad mode or autocast behind",
    _by_grad_mode: "goes another way without gradients or under autocast",
    _other_than_caller: "sets the grad mode by what its caller has",
    _by_autocast: "goes another way without gradients or under autocast",
}


@pytest.mark.parametrize("extra", REFUSED, ids=lambda f: f.__name__)
def test_what_a_graph_would_not_do_again_is_refused_and_undone(
    extra: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(extra)
    model.blocks[0].meter = Meter()
    before, mode = state_of_everything(model), torch.is_grad_enabled()
    with pytest.raises(TraceError, match=REFUSED[extra]) as caught:
        patched(model, "crossnorm")
    assert len(str(caught.value).splitlines()) == 3
    assert "test_regions.py" in str(caught.value)
    assert_same(before, state_of_everything(model))
    block = model.blocks[0]
    assert (block.calls, block.seen, block.log, block.stats) == (0, None, [], {"n": 0})
    assert (block.meter.count, GLOBAL, HISTORY, block.scale.item()) == (0, 0, [], 0.5)
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (mode, torch.float32)
    assert not hasattr(type(block), "total")
    assert not hasattr(block, "steps")


@pytest.fixture
def another() -> Iterator[ThreadPoolExecutor]:
    """Another thread, which is there all the time."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


@pytest.mark.parametrize("extra", [_forked, _seeded, _drawn_once, _python_chance], ids=lambda f: f.__name__)
def test_draws_are_refused_beside_other_threads(
    extra: Callable[..., Tensor], another: ThreadPoolExecutor
) -> None:
    with pytest.raises(TraceError, match=REFUSED[extra]):
        patched(make(extra), "crossnorm")


def test_draws_of_other_threads_are_theirs(another: ThreadPoolExecutor) -> None:
    def extra(self: Block, x: Tensor) -> Tensor:
        another.submit(torch.rand, 1).result()
        another.submit(random.random).result()
        return self.side(x)

    model = patched(make(extra), "crossnorm").eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), make(extra).eval()(x))


def _by_entries(self: Block, x: Tensor) -> Tensor:
    return self.side(x) * (self.mean * 2)[: len(self.mean)]  # a length is asked of the buffer itself


def _of_plain_tensor(self: Block, x: Tensor) -> Tensor:
    return self.side(x) * (self.scale * 2)


@pytest.mark.parametrize("extra", [_by_entries, _of_plain_tensor])
def test_what_is_computed_from_tensors_while_tracing_is_computed_again_when_they_change(extra: Any) -> None:
    bare, model = make(extra), patched(make(extra), "crossnorm")

    def load(net: Net) -> None:
        net.load_state_dict({**net.state_dict(), "blocks.0.mean": torch.full((6, 1, 1), 0.3)})

    changes: list[Callable[[Net], Any]] = [
        lambda net: net.blocks[0].mean.add_(2.0),
        lambda net: net.blocks[0].scale.mul_(3.0),
        lambda net: setattr(net.blocks[0], "scale", torch.tensor(0.1)),
        load,
    ]
    for change in changes:
        for net in (bare, model):
            change(net)
        assert_same_outcome(outcome(bare, "plain"), outcome(model, "plain"))


def _warns(self: Block, x: Tensor) -> Tensor:
    warnings.warn("an old name", DeprecationWarning, stacklevel=1)
    return self.side(x)


@pytest.mark.filterwarnings("ignore:an old name:DeprecationWarning")
def test_a_warning_is_nothing_that_a_graph_has_to_do_again() -> None:
    bare, model = make(_warns), make(_warns)
    bare(torch.zeros(1, 3, 8, 8))
    assert_same_outcome(outcome(bare, "plain"), outcome(patched(model, "crossnorm"), "plain"))


def test_a_patch_under_autocast_leaves_nothing_in_its_cache() -> None:
    bare, model = make(_no_grad), make(_no_grad)
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patched(model, "crossnorm")
        assert type(model(x)) is Tensor
        assert torch.equal(model(x), bare(x))


def _constrained(self: Block, x: Tensor) -> Tensor:
    self.side.weight.data = torch.renorm(self.side.weight.data, p=2, dim=0, maxnorm=1.0)
    return self.side(x)


def test_a_grad_mode_that_hangs_on_the_batch_holds_for_the_batches_that_it_was_traced_for() -> None:
    def small(self: Block, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(x.shape[0] < 4):
            return self.side(x)

    model, bare = patched(make(small), "taps"), make(small)
    assert _gradient(model, 2) == pytest.approx(_gradient(bare, 2))
    with pytest.raises(fxgraft.BypassError, match="A branch on shapes"):
        model(torch.zeros(4, 3, 8, 8))


def _gradient(model: nn.Module, batch: int) -> float:
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    return float(x.grad.norm())


def test_a_failed_look_leaves_the_memory_of_weights() -> None:
    model = make(_constrained)
    before = {name: each.data_ptr() for name, each in model.named_parameters()}
    with pytest.raises(fxgraft.StructureError, match="sets the data of"):
        patched(model, "crossnorm")
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == before
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, CLASSES)


def test_weights_that_a_layer_has_for_one_call_are_refused() -> None:
    with pytest.raises(TraceError, match=r"sets '(weight|bias)' of Conv2d for a call"):
        fxgraft.patch(make(_other_weights), "taps", layers="blocks.0.relu", input_size=(3, 8, 8))
