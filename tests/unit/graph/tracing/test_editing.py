"""Edits of graphs by a method of a third party: where units act, when, in which order, where they live."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.graph.tracing.editing import After, Edge, Edit, Output, Replace
from models.toys import (
    Block,
    Gain,
    Net,
    Scale,
    Toy,
    assert_equal_steps,
    assert_same,
    images,
    net,
    state_of_everything,
    step,
)

pytestmark = pytest.mark.usefixtures("toy_methods")


def block_forward(
    x: Tensor, b: Block, after_conv1: Any = None, branch: Any = None, shortcut: Any = None
) -> Tensor:
    """The forward of a block by hand, with something at each place a unit may be."""

    def at(f: Any, value: Tensor) -> Tensor:
        return value if f is None else f(value)

    y = b.conv2(b.act(b.bn(at(after_conv1, b.conv1(x)))))
    return b.act2(at(branch, y) + at(shortcut, x))


EDITS: dict[str, tuple[Edit, dict[str, Any]]] = {
    "after": (After("conv1"), {"after_conv1": lambda v: v * 3}),
    "branch end": (Edge("conv2", ("add",)), {"branch": lambda v: v * 3}),
    "shortcut": (Edge("x", ("add",)), {"shortcut": lambda v: v * 3}),
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("modes", ["training", "evaluation", "both"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_inside_a_block(name: str, modes: str, learned: bool) -> None:
    edit, places = EDITS[name]
    bare, model = net().stage1[0], net()
    fxgraft.patch(model, Toy(at=(("stage1.0", edit),), factor=3, modes=modes, learned=learned))  # type: ignore[arg-type]
    x = torch.randn(2, 8, 8, 8)
    for training in (True, False):
        model.train(training)
        bare.train(training)
        acts = modes == "both" or modes == ("training" if training else "evaluation")
        expected = block_forward(x.clone(), bare, **(places if acts else {}))
        assert torch.equal(model.stage1[0](x.clone()), expected)


@pytest.mark.parametrize("modes", ["training", "evaluation", "both"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("owner", ["stage1.0", "stage1", "fc", ""])
def test_output_edits_need_no_trace(owner: str, learned: bool, modes: str) -> None:
    bare, model = net(), net()
    fxgraft.patch(model, Toy(at=((owner, Output()),), factor=3, modes=modes, learned=learned))  # type: ignore[arg-type]
    bare.get_submodule(owner).register_forward_hook(lambda _m, _a, out: out * 3)
    plain, x = net(), images()
    for training in (True, False):
        acts = modes == "both" or modes == ("training" if training else "evaluation")
        expected = step((bare if acts else plain).train(training), x)
        actual = step(model.train(training), x)
        own = [key for key in actual[1] if "graft_" in key]
        assert bool(own) is (learned and acts)
        for key in own:
            assert actual[1].pop(key).abs() > 0
        assert_equal_steps(actual, expected)


@pytest.mark.parametrize("modes", ["training", "evaluation", "both"])
def test_replace_calls_the_unit_with_the_arguments_of_the_node(modes: str) -> None:
    model, bare = net(), net()
    fxgraft.patch(model, Toy(at=(("stage1.0", Replace("add")),), factor=3, modes=modes, replaces=True))  # type: ignore[arg-type]
    x = torch.randn(2, 8, 8, 8)
    for training in (True, False):
        b = bare.stage1[0].train(training)
        model.train(training)
        acts = modes == "both" or modes == ("training" if training else "evaluation")
        branch = b.conv2(b.act(b.bn(b.conv1(x))))
        assert torch.equal(model.stage1[0](x.clone()), b.act2(branch * 3 if acts else branch + x))


def test_a_replaced_layer_keeps_its_weights_in_place() -> None:
    model, bare = net(), net()
    keys = list(model.state_dict())
    fxgraft.patch(model, Toy(at=(("stage1.0", Replace("conv2")),), replaces=True))
    assert list(model.state_dict()) == keys
    fxgraft.unpatch(model)
    assert_equal_steps(step(model, images()), step(bare, images()))


@pytest.mark.parametrize("edit", [After("conv2"), Edge("conv2", ("add",)), Output()])
@pytest.mark.parametrize("reverse", [False, True])
def test_at_one_site_units_act_in_the_order_of_patching(edit: Edit, reverse: bool) -> None:
    class Add(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.factor

    class Adds(Toy):
        def unit(self) -> Scale:
            return Add(self.factor)

    fxgraft.register("adds")(Adds)
    times, plus = Toy(at=(("stage1.0", edit),), factor=3), Adds(at=(("stage1.0", edit),), factor=1)
    model, bare = net().eval(), net().eval()
    for patch in (plus, times) if reverse else (times, plus):
        fxgraft.patch(model, patch)
    x, b = torch.randn(2, 8, 8, 8), bare.stage1[0]

    def expected(both: Any) -> Tensor:
        return both(block_forward(x, b)) if isinstance(edit, Output) else block_forward(x, b, branch=both)

    both = (lambda v: (v + 1) * 3) if reverse else (lambda v: v * 3 + 1)
    assert torch.equal(model.stage1[0](x.clone()), expected(both))
    fxgraft.unpatch(model, "toy")
    fxgraft.patch(model, times)  # goes to the end now
    assert torch.equal(model.stage1[0](x.clone()), expected(lambda v: (v + 1) * 3))


def test_units_after_a_replaced_node_keep_their_order() -> None:
    class Adds(Toy):
        def unit(self) -> Scale:
            unit = Scale(self.factor)
            unit.forward = lambda x: x + self.factor  # type: ignore[method-assign]
            return unit

    fxgraft.register("adds")(Adds)
    model, b = net().eval(), net().eval().stage1[0]
    fxgraft.patch(model, Toy(at=(("stage1.0", After("conv2")),), factor=3))
    fxgraft.patch(model, Toy(at=(("stage1.0", Replace("conv2")),), factor=5, replaces=True), name="replace")
    fxgraft.patch(model, Adds(at=(("stage1.0", After("conv2")),), factor=1))
    x = torch.randn(2, 8, 8, 8)
    branch = b.act(b.bn(b.conv1(x))) * 5 * 3 + 1
    assert torch.equal(model.stage1[0](x.clone()), b.act2(branch + x))


def test_after_comes_before_edge_and_edges_of_other_users_are_spared() -> None:
    model, bare = net().eval(), net().eval()
    fxgraft.patch(model, Toy(at=(("stage1.0", After("x")),), factor=2))
    fxgraft.patch(model, Toy(at=(("stage1.0", Edge("x", ("add",))),), factor=5), name="edge")
    x = torch.randn(2, 8, 8, 8)
    b = bare.stage1[0]
    assert torch.equal(model.stage1[0](x.clone()), b.act2(b.conv2(b.act(b.bn(b.conv1(x * 2)))) + x * 2 * 5))


def test_one_unit_on_an_edge_to_two_users_runs_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.relu() + y.sigmoid() + y

    runs = []

    class Counting(Scale):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(self)
            return x * self.factor

    class Counted(Toy):
        def unit(self) -> Scale:
            return Counting(self.factor)

    fxgraft.register("counted")(Counted)
    model = Two()
    fxgraft.patch(model, Counted(at=(("", Edge("conv", ("relu", "sigmoid"))),), factor=3))
    x = images()
    y = model.conv(x)
    assert torch.equal(model(x), (3 * y).relu() + (3 * y).sigmoid() + y)
    assert len(runs) == 1


@pytest.mark.parametrize("owner", ["stage1.0", "stage1", "fc", ""])
def test_new_keys_are_the_only_difference_in_the_state_dict(owner: str) -> None:
    model = net()
    keys = list(model.state_dict())
    fxgraft.patch(model, Toy(at=((owner, Output()),), learned=True))
    fxgraft.patch(model, Toy(at=((owner, Output()),), learned=True, factor=5), name="second")
    new = [key for key in model.state_dict() if key not in keys]
    assert [key for key in model.state_dict() if key in keys] == keys
    assert len(new) == 4
    assert all(
        key.rpartition(".")[0].rpartition(".")[2].startswith(("graft_toy", "graft_second")) for key in new
    )
    fxgraft.unpatch(model, "toy")
    assert sorted(set(model.state_dict()) - set(keys)) == sorted(key for key in new if "graft_second" in key)
    fxgraft.unpatch(model)
    assert list(model.state_dict()) == keys


def test_two_units_of_one_graft_on_one_owner_have_two_names() -> None:
    model = net().eval()
    at = (("stage1.0", After("conv1")), ("stage1.0", Edge("conv2", ("add",))), ("stage1.0", Output()))
    fxgraft.patch(model, Toy(at=at, learned=True, factor=2))
    own = [name for name, _ in model.named_parameters() if "graft_" in name]
    assert own == [f"stage1.0.graft_toy_{i}.weight" for i in range(3)]
    x = torch.randn(2, 8, 8, 8)
    b = net().eval().stage1[0]
    expected = 2 * block_forward(x, b, after_conv1=lambda v: v * 2, branch=lambda v: v * 2)
    assert torch.equal(model.stage1[0](x.clone()), expected)


@pytest.mark.parametrize("owner", ["stage1", "stage2"])
def test_a_unit_never_joins_a_container(owner: str) -> None:
    model = net().eval()
    fxgraft.patch(model, Toy(at=((owner, Output()),), learned=True, factor=3))
    container = model.get_submodule(owner)
    assert len(container) == 2
    assert [type(child) for child in container] == [Block, Block]
    assert [name for name, child in model.named_modules() if isinstance(child, Gain)] == [
        f"graft_toy_{owner}"
    ]


def test_a_container_inside_a_container_puts_its_unit_outside_both() -> None:
    model = Net()
    model.stage1 = nn.Sequential(nn.Sequential(Block(8), Block(8)), Block(8))
    fxgraft.patch(model, Toy(at=(("stage1.0", Output()), ("stage1", Output())), learned=True))
    own = [name for name, child in model.named_modules() if isinstance(child, Gain)]
    assert own == ["graft_toy_stage1_0", "graft_toy_stage1"]
    assert [len(model.stage1), len(model.stage1[0])] == [2, 2]
    before = step(model, images())
    twin = copy.deepcopy(model)
    assert_equal_steps(step(twin, images()), before)
    assert list(twin.state_dict()) == list(model.state_dict())


def test_a_model_that_is_a_container_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 64, 4))
    bare, x = copy.deepcopy(model), images()
    before = state_of_everything(model)
    fxgraft.patch(model, Toy(at=(("", Output()),), learned=True, factor=3), input_size=(3, 8, 8))
    inner = Toy(at=(("", After("_0")),), learned=True, factor=2)
    fxgraft.patch(model, inner, name="inner", input_size=(3, 8, 8))
    assert len(model) == 4
    assert torch.equal(model(x), 3 * bare[3](bare[2](bare[1](2 * bare[0](x)))))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert len([name for name, _ in model.named_parameters() if "graft_" in name]) == 2
    fxgraft.unpatch(model)
    assert_same(before, state_of_everything(model))


@pytest.mark.parametrize("edit", [After("bn"), Output()])
def test_a_site_before_an_in_place_activation(edit: Edit) -> None:
    owner = "stage1.0" if isinstance(edit, After) else "stage1.0.bn"
    model, bare = net(), net()
    fxgraft.patch(model, Toy(at=((owner, edit),), factor=1))
    x = images()
    assert_equal_steps(step(model, x), step(bare, x))


class Keeps(Scale):
    """Hands its input on and keeps it, as a tap does."""

    kept: list[Tensor] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return x


def test_a_unit_that_hands_its_value_on_changes_no_number() -> None:
    class Keeping(Toy):
        def unit(self) -> Scale:
            return Keeps(1)

    fxgraft.register("keeping")(Keeping)
    model, bare = net(), net()
    at = tuple(
        (f"stage1.{i}", After(node)) for i in range(2) for node in ("conv1", "bn", "act", "conv2", "add")
    )
    fxgraft.patch(model, Keeping(at=at))
    assert_equal_steps(step(model, images()), step(bare, images()))
    assert len(Keeps.kept) == 10


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "at",
    [
        (("layer1.0", After("bn1")),),
        (("layer2.0", Output()),),
        (("layer3.0", Output()), ("layer4.0", After("bn1"))),
    ],
)
def test_checkpointing_switched_on_before_or_after(at: Any, learned: bool, when: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=4)

    x = images(size=32)
    model, plain = build(), build()
    patch = Toy(at=at, factor=1.5, learned=learned)
    fxgraft.patch(plain, patch)
    if when == "before":
        model.set_grad_checkpointing(True)
    fxgraft.patch(model, patch)
    if when == "after":
        model.set_grad_checkpointing(True)
    assert model.grad_checkpointing
    for training in (True, False):
        assert_equal_steps(step(model.train(training), x), step(plain.train(training), x))


def test_regions_without_a_unit_stay_checkpointed_and_those_with_one_run_once() -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    model.set_grad_checkpointing(True)
    runs: dict[str, int] = {}
    for name, block in model.blocks.named_children():
        block.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    fxgraft.patch(model, "rsc", layer="blocks.2", layout="NLC", batch_share=1)
    model(images(size=32), target=torch.arange(4)).sum().backward()
    assert {name: runs[name] for name in "012"} == {"0": 2, "1": 2, "2": 1}


@pytest.mark.parametrize("learned", [False, True])
def test_a_repeated_call_is_edited_alone(learned: bool) -> None:
    model, bare = net().eval(), net().eval()
    fxgraft.patch(model, Toy(at=(("stem", After("act_1")),), factor=3, learned=learned))
    x, s = images(), bare.stem
    assert torch.equal(model.stem(x), 3 * s.act(s.second(s.act(s.first(x)))))


def test_new_modules_take_the_training_flag_and_dtype_of_their_place() -> None:
    model = net().eval().to(torch.bfloat16)
    fxgraft.patch(model, Toy(at=(("stage1.0", Output()),), learned=True))
    (unit,) = (m for m in model.modules() if isinstance(m, Gain))
    assert not unit.training
    assert unit.weight.dtype == torch.bfloat16
    assert model(images().bfloat16()).dtype == torch.bfloat16
    model.train()
    assert unit.training


def test_an_edit_of_a_node_that_is_not_there_changes_nothing() -> None:
    model = net()
    before = state_of_everything(model)
    with pytest.raises(fxgraft.SiteError, match="'nope'"):
        fxgraft.patch(model, Toy(at=(("stage1.0", Output()), ("stage1.0", After("nope"))), learned=True))
    assert_same(before, state_of_everything(model))
