"""Taps: what they record, under which names, in which order, for how long, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import BypassError, ConfigError, SiteError, UnknownGraftError
from methods.taps.taps_tools import SIZE, odd, seen_by_hooks, tapped_net
from models.toys import assert_equal_steps, assert_same, images, net, state_of_everything, step


def copies(model: nn.Module, graft: int = 0) -> dict[str, tuple[bool, bool]]:
    return {key: unit.copies for key, unit in fxgraft.grafts(model)[graft].units.items()}


# Names and order.


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ("stage1", ["stage1"]),
        (["fc", "stage1", "stem"], ["fc", "stage1", "stem"]),
        (-1, ["stage2"]),
        (0, ["stage1"]),
        ("stem.act*", ["stem.act", "stem.act_1"]),
        ([-1, "stem.act_1", 0], ["stage2", "stem.act_1", "stage1"]),
        ("stage*", ["stage1", "stage2"]),
        (["fc", "stage1.*.add"], ["fc", "stage1.0.add", "stage1.1.add"]),
        (["stage1", "stage1", "stage*"], ["stage1", "stage2"]),
        (["stage2.1.add", "flatten"], ["stage2.1.add", "flatten"]),
    ],
)
def test_values_come_in_the_order_and_by_the_names_asked_for(layers: Any, keys: list[str]) -> None:
    model = tapped_net(layers)
    for training in (True, False):
        _, acts = fxgraft.tapped(model.train(training), images())
        assert list(acts) == keys


def test_a_container_is_known_by_the_name_the_user_wrote() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.mean((2, 3))

    model = fxgraft.patch(Listed(), "taps", layers=["blocks", "blocks.1"], input_size=SIZE)
    _, acts = fxgraft.tapped(model, images())
    assert list(acts) == ["blocks", "blocks.1"]
    assert acts["blocks"] is acts["blocks.1"]


# Values.

EVERYWHERE = (
    "stem.first", "stem", "stage1.0.conv1", "stage1.0.bn", "stage1.0.act", "stage1.0.conv2", "stage1.0.act2",
    "stage1.0", "stage1", "down", "stage2", "pool", "drop", "fc",
)  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_values_are_those_the_site_gave(training: bool) -> None:
    """Most of these are written over by an in-place activation or addition right after."""
    bare, model = net().train(training), tapped_net(EVERYWHERE).train(training)
    seen = seen_by_hooks(bare, EVERYWHERE)
    assert_equal_steps(step(model, images()), step(bare, images()))
    acts = fxgraft.activations(model)
    assert list(acts) == list(EVERYWHERE)
    for name in EVERYWHERE:
        assert torch.equal(acts[name], seen[name]), name


def test_only_what_is_written_over_is_copied() -> None:
    written = {name for name, each in copies(tapped_net(EVERYWHERE)).items() if each == (True, True)}
    untouched = {name for name, each in copies(tapped_net(EVERYWHERE)).items() if each == (False, False)}
    assert written == {"stem.first", "stage1.0.bn", "stage1.0.conv2"}
    assert untouched == set(EVERYWHERE) - written


def test_values_that_are_not_copied_are_the_networks_own() -> None:
    model = tapped_net(["stage1", "stage2"])
    out: list[Tensor] = []
    model.down.register_forward_hook(lambda _, args, __: out.extend(args))
    _, acts = fxgraft.tapped(model, images())
    assert acts["stage1"] is out[0]


def test_second_calls_and_values_between_calls() -> None:
    model = tapped_net(["stem.act", "stem.act_1", "stage1.0.add"])
    bare = net()
    with torch.no_grad():
        first = bare.stem.first(images()).relu()
        second = bare.stem.second(first).relu()
        block = bare.stage1[0].train()
        added = block.conv2(block.act(block.bn(block.conv1(second)))) + second
    _, acts = fxgraft.tapped(model, images())
    assert [torch.equal(acts[key], value) for key, value in zip(acts, (first, second, added), strict=True)] == [
        True, True, True,
    ]  # fmt: skip


def test_writes_through_views_are_seen() -> None:
    """The view is written through after the tap, and the other way round; dropout writes in training alone."""
    for training in (True, False):
        model = fxgraft.patch(odd(), "taps", layers=["conv", "halved", "before_drop"], input_size=SIZE)
        assert copies(model) == {
            "conv": (True, True),
            "halved": (True, True),
            "before_drop": (False, True),
        }
        bare = odd().train(training)
        seen = seen_by_hooks(bare, ("conv", "halved", "before_drop"))
        torch.manual_seed(1)
        expected = bare(images())
        torch.manual_seed(1)
        out, acts = fxgraft.tapped(model.train(training), images())
        assert torch.equal(out, expected)
        assert [key for key, value in acts.items() if not torch.equal(value, seen[key])] == []


def test_parts_frozen_in_evaluation_mode_before_one_that_trains() -> None:
    model = fxgraft.patch(odd(), "taps", layers="before_drop", input_size=SIZE).train()
    model.before_drop.eval()
    seen = seen_by_hooks(model, ("before_drop",))
    _, acts = fxgraft.tapped(model, images())
    assert torch.equal(acts["before_drop"], seen["before_drop"])


def test_sites_of_several_tensors_give_their_containers() -> None:
    model = fxgraft.patch(odd(), "taps", layers=["pair", "grown"], input_size=SIZE)
    _, acts = fxgraft.tapped(model, images())
    assert isinstance(acts["pair"], tuple)
    assert [tuple(each.shape) for each in acts["pair"]] == [(4, 3, 8, 8), (4, 1)]
    assert isinstance(acts["grown"], list)
    assert len(acts["grown"]) == 1, "the network appends to its list later"


class Numbered(nn.Module):
    """Its additions have other numbers in training, and its training looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU()
        self.values = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            x = torch.add(x, 1)
        if self.values and self.training and x.sum() > 0:
            x = x * 2
        return self.act(x + x).mean((2, 3))


def test_a_site_that_has_another_name_in_training() -> None:
    model = fxgraft.patch(Numbered(), "taps", layers="add", input_size=SIZE)
    for training in (True, False):
        x = model.train(training).conv(images())
        _, acts = fxgraft.tapped(model, images())
        assert torch.equal(acts["add"], 2 * (x + 1 if training else x))


def test_where_training_cannot_be_looked_at_everything_is_copied() -> None:
    model = Numbered()
    model.values = True
    fxgraft.patch(model, "taps", layers=["conv", "act"], input_size=SIZE)
    assert copies(model) == {"conv": (False, True), "act": (False, True)}
    for training in (True, False):
        _, acts = fxgraft.tapped(model.train(training), images())
        assert torch.equal(acts["conv"], model.conv(images()))
        assert list(acts) == ["conv", "act"]


# Gradients.


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_truncated_network(training: bool) -> None:
    bare, model = net().train(training), tapped_net(["stage1", "stage1.1.conv2"]).train(training)
    ends = {
        "stage1": lambda: bare.stage1(bare.stem(images())),
        "stage1.1.conv2": lambda: bare.stage1[1].conv2(
            bare.stage1[1].act(bare.stage1[1].bn(bare.stage1[1].conv1(bare.stage1[0](bare.stem(images())))))
        ),
    }
    for key, truncated in ends.items():
        truncated().square().sum().backward()
        expected = gradients(bare)
        _, acts = fxgraft.tapped(model, images())
        acts[key].square().sum().backward()
        actual = gradients(model)
        assert actual.keys() == expected.keys()
        assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def test_detached_values_carry_no_gradient_and_leave_the_networks_alone() -> None:
    model = tapped_net(EVERYWHERE, detach=True)
    assert_equal_steps(step(model, images()), step(net(), images()))
    acts = fxgraft.activations(model)
    assert not [name for name, value in acts.items() if value.requires_grad]
    follows = fxgraft.tapped(tapped_net(EVERYWHERE), images())[1]
    assert not [name for name, value in follows.items() if not value.requires_grad]


# How long values live.


def test_values_are_handed_over_once_and_die_with_the_caller() -> None:
    model = tapped_net(["stage1", "stage1.0.conv2"])
    out, acts = fxgraft.tapped(model, images())
    with pytest.raises(BypassError, match=r"nothing to fetch from 'taps'(?s:.*)no pass(?s:.*)Call the model"):
        fxgraft.activations(model)
    alive = [weakref.ref(value) for value in acts.values()]
    del out, acts
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_values_that_nobody_fetched_go_when_the_next_pass_begins() -> None:
    model = tapped_net("stage1")
    kept: list[Any] = []
    handle = model.down.register_forward_hook(lambda _, args, __: kept.append(weakref.ref(args[0])))
    model(images())
    handle.remove()
    gc.collect()
    assert kept[0]() is not None
    gone: list[bool] = []
    model.stem.register_forward_hook(lambda *_: gone.append(kept[0]() is None))
    model(images(seed=1))
    assert gone == [True]
    assert torch.equal(
        fxgraft.activations(model)["stage1"], fxgraft.tapped(model, images(seed=1))[1]["stage1"]
    )


def test_a_pass_that_failed_leaves_nothing() -> None:
    model = tapped_net("stage1")
    model(images())
    model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images())
    with pytest.raises(BypassError, match="no pass of the model was made"):
        fxgraft.activations(model)


def test_a_part_called_by_itself_is_no_pass() -> None:
    model = tapped_net("stage1")
    model.stage1(model.stem(images()))
    with pytest.raises(BypassError, match="no pass"):
        fxgraft.activations(model)


# Several patches.


def test_two_patches_together_and_one_by_one() -> None:
    model = tapped_net(["stage2", "fc"])
    fxgraft.patch(model, "taps", layers=["stage1", "stage2.0"], detach=True, name="inner", input_size=SIZE)
    assert list(fxgraft.tapped(model, images())[1]) == ["stage2", "fc", "stage1", "stage2.0"]
    model(images())
    inner = fxgraft.activations(model, "inner")
    assert list(inner) == ["stage1", "stage2.0"]
    assert not inner["stage1"].requires_grad
    with pytest.raises(BypassError, match=r"no value of 'stage1', 'stage2.0'(?s:.*)fetched already"):
        fxgraft.activations(model, "inner")
    assert list(fxgraft.activations(model, "taps")) == ["stage2", "fc"]
    fxgraft.unpatch(model, "inner")
    assert list(fxgraft.tapped(model, images())[1]) == ["stage2", "fc"]


def test_one_site_tapped_twice_is_fetched_one_by_one() -> None:
    model = tapped_net("stage2")
    fxgraft.patch(model, "taps", layers="stage2", detach=True, name="other", input_size=SIZE)
    model(images())
    with pytest.raises(BypassError, match=r"'stage2' is recorded by 'taps' and by 'other'(?s:.*)name='taps'"):
        fxgraft.activations(model)
    assert torch.equal(
        fxgraft.activations(model, "other")["stage2"], fxgraft.activations(model, "taps")["stage2"]
    )


# Mistakes.


def test_no_taps() -> None:
    for model in (net(), fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)):
        counted: list[None] = []
        model.stem.register_forward_hook(lambda *_, counted=counted: counted.append(None))
        for act in (fxgraft.activations, lambda m: fxgraft.tapped(m, images())):
            with pytest.raises(UnknownGraftError, match=r"no taps on this Net(?s:.*)fxgraft\.patch"):
                act(model)
        assert counted == [], "the model does not run for nothing"
    with pytest.raises(UnknownGraftError, match=r"no taps named 'tops' on this Net(?s:.*)'taps'"):
        fxgraft.activations(tapped_net("stage1"), "tops")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layers": "stage7"}, SiteError, r"no site 'stage7' in Odd"),
        ({"layers": []}, SiteError, r"No site was named"),
        ({"layers": ["conv", 1.5]}, SiteError, r"A site is a name or a stage number, not 1\.5"),
        ({"layers": "size"}, SiteError, r"'size' holds no tensor in evaluation mode: Size returns tuple"),
        ({"layers": "only_eval"}, SiteError, r"'only_eval' is not reached in training mode"),
        ({"layers": "conv", "detach": "yes"}, ConfigError, r"detach must be True or False, got 'yes'"),
        ({"layers": "conv", "copy": 1}, ConfigError, r"copy must be True or False, got 1"),
        ({}, ConfigError, r"'taps' needs layers"),
    ],
)
def test_a_mistake_is_explained_and_touches_nothing(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = odd()
    model.conv.eval()
    before = state_of_everything(model)
    with pytest.raises(kind, match=message):
        fxgraft.patch(model, "taps", input_size=SIZE, **options)
    assert_same(before, state_of_everything(model))
    assert fxgraft.grafts(model) == []


def test_a_pass_past_a_site() -> None:
    model = tapped_net(["stage1", "fc"])
    model.forward_features(images())
    with pytest.raises(
        BypassError, match=r"no value of 'fc'(?s:.*)did not reach it(?s:.*)Call the whole model"
    ):
        fxgraft.activations(model)
    with pytest.raises(BypassError, match="no value of 'fc'"):
        fxgraft.activations(model)


def test_a_value_that_the_caller_writes_over() -> None:
    model = tapped_net(["fc", "stage1"])
    model(images()).zero_()
    with pytest.raises(BypassError, match=r"value of 'fc' was written over in place(?s:.*)copy=True"):
        fxgraft.activations(model)
    fxgraft.unpatch(model)
    fxgraft.patch(model, "taps", layers=["fc", "stage1"], copy=True, input_size=SIZE)
    out = model(images())
    expected = out.clone()
    out.zero_()
    assert torch.equal(fxgraft.activations(model)["fc"], expected)


def test_a_layer_made_in_place_since() -> None:
    model = fxgraft.patch(odd(), "taps", layers="before_plain", input_size=SIZE)
    model.plain.inplace = True
    model(images())
    with pytest.raises(BypassError, match=r"'before_plain' was written over(?s:.*)patch again"):
        fxgraft.activations(model)
    fxgraft.unpatch(model)
    fxgraft.patch(model, "taps", layers="before_plain", input_size=SIZE)
    seen = seen_by_hooks(model, ("before_plain",))
    assert torch.equal(fxgraft.tapped(model, images())[1]["before_plain"], seen["before_plain"])


def test_looking_ahead_in_patching_leaves_everything_as_it_was() -> None:
    model = odd()
    model.conv.eval()
    before = state_of_everything(model)
    fxgraft.patch(model, "taps", layers=["conv", "norm"], input_size=SIZE)
    fxgraft.unpatch(model)
    assert_same(before, state_of_everything(model))


def test_summary_and_plan_name_the_sites() -> None:
    model = tapped_net(["stage1", "fc"])
    assert "records stage1, fc (gradients flow); 0 new parameters" in str(fxgraft.summary(model))
    plan = fxgraft.patch(net(), "taps", layers=["stage1.0.add"], detach=True, input_size=SIZE, dry_run=True)
    assert "records stage1.0.add (detached)" in str(plan)


class Repeated(nn.Module):
    """Calls one block three times, as heads of detectors and networks with shared weights do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_a_site_inside_of_a_module_that_is_called_again_gives_every_value(training: bool, call: Any) -> None:
    torch.manual_seed(0)
    model = fxgraft.patch(Repeated(), "taps", layers=["block", "block.0", "block_2"]).train(training)
    firsts: list[Tensor] = []
    model.block[0].register_forward_hook(lambda module, args, out: firsts.append(out.clone()))
    for _ in range(2):
        firsts.clear()
        acts = fxgraft.tapped(call(model), images())[1]
        assert isinstance(acts["block.0"], tuple)
        assert [torch.equal(a, b) for a, b in zip(acts["block.0"], firsts, strict=True)] == [True] * 3
        assert torch.equal(acts["block"], firsts[0].relu())
        assert torch.equal(acts["block_2"], firsts[2].relu())


@pytest.mark.parametrize("method", ["rsc", "gam"])
def test_methods_that_need_one_value_say_why_there_is_none(method: str) -> None:
    with pytest.raises(SiteError, match="inside of 'block', which the model calls 3 times in one pass"):
        fxgraft.patch(Repeated(), method, layer="block.0")
