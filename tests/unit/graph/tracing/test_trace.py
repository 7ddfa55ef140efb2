"""Tracing: what is opened, what is bound, and that nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import DualGraphModule

import fxgraft
from fxgraft.errors import SiteError, TraceError
from fxgraft.graph.grafting.forwards import as_forward
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.preserve import preserved_globals
from fxgraft.graph.tracing.signatures import INPUT
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.tracer import CHECKPOINT_REGION, is_primitive
from models.toys import Block, Net, assert_same, images, net, state_of_everything


def called(traced: Traced) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


def graph(model: nn.Module, path: str = "", size: int = 8, training: bool = False, **kwargs: Any) -> Traced:
    return ModelTrace(model, (3, size, size)).graph(path, training, **kwargs)


def run(module: nn.Module, traced: Traced, *args: Any, **kwargs: Any) -> Any:
    return as_forward(traced, "test")(module, *args, **kwargs)


def test_children_stay_calls() -> None:
    assert called(graph(net())) == ["stem", "stage1", "down", "stage2", "pool", "drop", "fc"]
    assert called(graph(net(), "stage1.0")) == ["conv1", "bn", "act", "conv2", "act2"]
    assert called(graph(net(), "stem")) == ["first", "act", "second", "act"]


def test_opened_modules_are_traced_through_and_their_own_children_are_not() -> None:
    opened = called(graph(net(), opened=("stage1", "stage1.1")))
    assert opened[:7] == [
        "stem",
        "stage1.0",
        *(f"stage1.1.{n}" for n in ("conv1", "bn", "act", "conv2", "act2")),
    ]
    assert opened[7:] == ["down", "stage2", "pool", "drop", "fc"]


def test_deep_opens_down_to_primitives() -> None:
    model = net()
    deep = called(graph(model, deep=("",)))
    assert "stage2.1.act2" in deep
    assert all(is_primitive(model.get_submodule(name)) for name in deep)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_the_graph_computes_what_the_module_does(name: str, training: bool) -> None:
    model = timm.create_model(name, num_classes=5, drop_rate=0.5).train(training)
    x = torch.randn(2, *model.default_cfg["input_size"])
    traced = ModelTrace(model).graph("", training)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(run(model, traced, x), expected)


def test_optional_arguments_are_bound_as_callers_leave_them() -> None:
    traced = graph(net(), "stage1.0")
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x"]
    assert traced.fixed == (INPUT, None)
    block = net().stage1[0].eval()
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(run(block, traced, x.clone()), block(x.clone()))
    assert torch.equal(run(block, traced, x=x.clone()), block(x.clone()))
    with pytest.raises(fxgraft.BypassError, match=r"shortcut=a tensor of shape \(2, 8, 8, 8\), but .* None"):
        run(block, traced, x, shortcut=x)
    with pytest.raises(fxgraft.BypassError, match=r"called with arguments of another structure"):
        run(block, traced, x, shortcut=[x, x])


class Flagged(nn.Module):
    def forward(self, x: Tensor, pre_logits: bool = False, scale: float = 1.0) -> Tensor:
        return x if pre_logits else x * scale


class CallsFlagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Flagged()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, scale=3.0)


def test_a_bound_argument_of_another_value_is_refused_by_name() -> None:
    model = CallsFlagged()
    traced = graph(model, "inner")
    assert traced.fixed == (INPUT, False, 3.0)
    x = images()
    assert torch.equal(run(model.inner, traced, x, scale=3.0), x * 3)
    with pytest.raises(
        fxgraft.BypassError, match=r"=a tensor of shape \(2,\), but its graph was traced with 3"
    ):
        run(model.inner, traced, x, scale=torch.ones(2))
    with pytest.raises(fxgraft.BypassError, match="pre_logits=True, but its graph was traced with False"):
        run(model.inner, traced, x, pre_logits=True, scale=3.0)


class Tokens(nn.Module):
    """Hands the size of the grid down to its child, as token models do."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.inner = Grid(branch)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2), x.shape[2], x.shape[3])


class Grid(nn.Module):
    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor, height: int, width: int, heads: int = 2) -> Tensor:
        if self.branch and height > 4:
            x = x * heads
        return x.reshape(x.shape[0], -1, height, width)


def test_sizes_handed_down_as_ints_are_inputs() -> None:
    traced = graph(Tokens(False), "inner")
    assert traced.fixed == (INPUT, INPUT, INPUT, 2)
    x = torch.randn(2, 3, 30)
    assert torch.equal(run(Grid(False), traced, x, 5, 6), x.reshape(2, 3, 5, 6))
    assert torch.equal(run(Grid(False), traced, x, 3, 10), x.reshape(2, 3, 3, 10))


def test_sizes_that_the_forward_branches_on_are_bound() -> None:
    traced = graph(Tokens(True), "inner")
    assert traced.fixed == (INPUT, 8, 8, 2)
    x = torch.randn(2, 3, 64)
    assert torch.equal(run(Grid(True), traced, x, 8, 8), (2 * x).reshape(2, 3, 8, 8))
    with pytest.raises(fxgraft.BypassError, match="=4, but its graph was traced with 8"):
        run(Grid(True), traced, x, 4, 16)


class Draws(nn.Module):
    """Draws while it is traced, and fails if told to."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.inner = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.bn(x)) * random.random() + torch.rand(1)
        if self.fail and isinstance(x, fx.Proxy) and x.sum() > 0:
            return x
        return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("fail", [False, True])
def test_tracing_leaves_the_model_as_it_was(training: bool, mode: str, fail: bool) -> None:
    model = Draws(fail)
    getattr(model, mode)()
    model.inner[0].eval()  # a frozen BatchNorm
    fired = []
    model.register_forward_hook(lambda *_: fired.append("forward"))
    model.bn.register_forward_pre_hook(lambda *_: fired.append("pre"))
    before, state = state_of_everything(model), random.getstate()
    trace = ModelTrace(model, (3, 8, 8))
    if fail:
        with pytest.raises(TraceError, match="cannot trace Draws"):
            trace.graph("", training, deep=("",))
    else:
        traced = trace.graph("", training, deep=("",))
        assert called(traced) == ["bn", "inner.0", "inner.1"]
        with pytest.raises(TraceError, match="draws from or sets the random state of torch"):
            traced.runnable()
    assert_same(before, state_of_everything(model))
    assert random.getstate() == state
    assert fired == []
    model(images())
    assert fired == ["pre", "forward"]


def test_a_frozen_batchnorm_stays_frozen_when_patched_and_unpatched() -> None:
    model = net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = state_of_everything(model)
    fxgraft.patch(model, "rsc", layer="stage1.1.conv2")
    assert [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training] == []
    fxgraft.unpatch(model)
    assert_same(before, state_of_everything(model))


class CallsUntraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.inner = Untraceable()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.conv(x))


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy) and x.mean() > 0:  # the line to be named
            return x * 2
        return x + 1


def test_the_error_names_module_line_and_way_out() -> None:
    with pytest.raises(TraceError, match=r"cannot trace 'inner' \(Untraceable\)") as caught:
        graph(CallsUntraceable(), "inner")
    message = str(caught.value)
    assert "test_trace.py" in message
    assert "the line to be named" in message
    assert "Choose the output of a whole module" in message
    assert "register_notrace_function" in message


def test_what_is_not_opened_may_be_untraceable() -> None:
    assert called(graph(CallsUntraceable())) == ["conv", "inner"]


def test_a_module_that_is_never_called_cannot_be_traced() -> None:
    model = net()
    model.spare = Block(8)
    with pytest.raises(SiteError, match="'spare' is never called"):
        graph(model, "spare")


class MakesConstant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)


def test_constants_made_in_forward_do_not_stay_on_the_module() -> None:
    model = MakesConstant()
    before = state_of_everything(model)
    traced = graph(model)
    assert_same(before, state_of_everything(model))
    assert len(traced.constants) == 1
    (constant,) = traced.constants.values()
    assert constant.flatten().tolist() == [1.0, 2.0, 3.0]


class Counts(nn.Module):
    """Counts in a buffer, or in a tensor that is none."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("count", torch.zeros(1))
        else:
            self.count = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x


def test_a_forward_that_changes_a_buffer_changes_it_in_every_pass() -> None:
    model = Counts(True)
    traced = graph(model)
    assert model.count.item() == 0
    run(model, traced.runnable(), images())
    assert model.count.item() == 1


def test_a_forward_that_changes_another_tensor_is_refused_and_the_tensor_put_back() -> None:
    model = Counts(False)
    with pytest.raises(TraceError, match=r"Counts writes to 'count', at .*self\.count\.add_\(1\)"):
        graph(model).runnable()
    assert model.count.item() == 0


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, [x + 1, x + 2]


class UsesPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.pair(x)
        for part in rest:
            first = first + part
        return torch.cat([first, *rest])


def test_outputs_of_closed_children_unpack_as_they_really_do() -> None:
    model = UsesPair()
    traced = graph(model)
    assert called(traced) == ["pair"]
    x = images()
    assert torch.equal(run(model, traced, x), model(x))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False))


def test_checkpointed_regions_are_marked() -> None:
    before = torch.utils.checkpoint.checkpoint
    traced = graph(Checkpointed())
    assert torch.utils.checkpoint.checkpoint is before
    regions = {
        str(n.target): n.meta.get(CHECKPOINT_REGION) for n in traced.graph.nodes if n.op == "call_module"
    }
    assert regions == {"first": 1, "second": None}


def test_a_traced_module_is_taken_as_it_is() -> None:
    model = fx.symbolic_trace(net().eval())
    nodes = [(node.op, str(node.target)) for node in model.graph.nodes]
    traced = graph(model)
    assert [(node.op, str(node.target)) for node in traced.graph.nodes] == nodes
    assert traced.graph is not model.graph
    x = images()
    assert torch.equal(run(model, traced, x), model(x))


class DropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x * 2 if self.training else x).mean((2, 3))


def test_a_dual_graph_module_gives_one_graph_per_mode() -> None:
    model = DropPath()
    graphs = {}
    for mode in (True, False):
        model.train(mode)
        graphs[mode] = fx.Tracer().trace(model)
    dual = DualGraphModule(copy.deepcopy(model), graphs[True], graphs[False])
    sizes = {mode: len(graph(dual, training=mode).graph.nodes) for mode in (True, False)}
    assert sizes[True] == sizes[False] + 1
    before = list(dual.state_dict())
    x = images()
    expected = {mode: dual.train(mode)(x) for mode in (True, False)}
    fxgraft.patch(dual, "rsc", layer="conv", input_size=(3, 8, 8), batch_share=0)
    for mode in (True, False):
        assert torch.equal(dual.train(mode)(x), expected[mode])
    assert not torch.equal(expected[True], expected[False])
    assert list(dual.state_dict()) == before


def test_nested_names_do_not_open_namesakes() -> None:
    model = nn.Sequential(Net(), nn.Identity())
    assert called(graph(model, "0", opened=("stage1",)))[:4] == ["stem", "stage1.0", "stage1.1", "down"]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        rows = x.shape[2]
        more = rows
        more += 1
        y = self.conv(x)
        same = y
        y += 2
        y *= 3
        y -= 1
        y /= 2
        return same * more + rows


def test_in_place_operators_stay_in_place_and_leave_numbers_alone():
    module = InPlace()
    x = torch.randn(2, 3, 4, 4)
    trace = ModelTrace(nn.Sequential(module), (3, 4, 4))
    forward = as_forward(trace.fresh_graph("0", training=True), "InPlace")
    seen = []
    module.conv.register_forward_hook(lambda module, args, out: seen.append(out))
    out = forward(module, x)
    assert torch.equal(out, module(x))
    assert torch.equal(out, seen[0] * 5 + 4)  # the convolution's output itself was written to


def test_nodes_of_in_place_operators_are_named_as_torchvision_names_them():
    resnet = timm.create_model("resnet18")
    assert "layer1.0.add" in [site.name for site in fxgraft.sites(resnet, "layer1.0.*")]


def test_globals_get_back_what_differs_and_python_keeps_its_own() -> None:
    """What other code reads meanwhile is never empty: an interruption then would leave it so."""
    held: dict[str, Any] = {"table": {"a": 1}, "entries": [1], "seen": {1}}
    cls: Any = type("Here", (nn.Module,), {"__module__": __name__, **held})
    with preserved_globals([cls()]) as reachable:
        assert not any("__builtins__" in content for _, content, _ in reachable._spaces)
        cls.table.update(a=2, b=3)
        cls.entries.append(2)
        cls.seen ^= {1, 2}
        cls.added = 1
        assert {name for _, name in reachable.changes()} == {"table", "entries", "added"}
    assert held == {"table": {"a": 1}, "entries": [1], "seen": {1}}
    assert not hasattr(cls, "added")


@pytest.mark.parametrize("frozen", [False, True], ids=["without a hash", "with one"])
def test_a_dataclass_of_ones_own_between_modules(frozen):
    @dataclasses.dataclass(frozen=frozen)
    class Pack:
        x: torch.Tensor

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

        def forward(self, pack):
            return self.act(pack.x + self.conv(pack.x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.fc = nn.Conv2d(3, 4, 3), Block(), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.block(Pack(self.stem(x))).mean((2, 3)))

    model = Net().eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    fxgraft.patch(model, "selfnorm", input_size=(3, 8, 8))
    assert torch.equal(model(x), before)
    assert fxgraft.grafts(model)[0].units
