"""The public calls: on, off, all or nothing, and what they tell."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxgraft
from fxgraft.errors import (
    ConfigError,
    FxgraftError,
    MergeError,
    StructureError,
    UnknownGraftError,
)
from fxgraft.graph.tracing.editing import After, Output
from models.toys import (
    LABELS,
    Block,
    Gain,
    Net,
    Toy,
    TrainToy,
    assert_equal_steps,
    assert_same,
    images,
    names,
    net,
    state_of_everything,
    step,
)

pytestmark = [
    pytest.mark.usefixtures("toy_methods"),
    pytest.mark.filterwarnings(
        "ignore:'.*' did nothing in a training pass.*is in evaluation mode"
    ),  # as `prepared`
]

SIZE = (3, 16, 16)


# Putting on.


def test_the_string_form_is_the_typed_form() -> None:
    a, b = net(), net()
    assert fxgraft.patch(a, "rsc", layer="stage1", scope="channel", input_size=SIZE) is a
    assert fxgraft.patch(b, fxgraft.RSC(layer="stage1", scope="channel"), input_size=SIZE) is b
    assert (
        fxgraft.grafts(a)[0].patch
        == fxgraft.grafts(b)[0].patch
        == fxgraft.RSC(layer="stage1", scope="channel")
    )
    assert_equal_steps(step(a, images(), target=LABELS), step(b, images(), target=LABELS))


def test_a_graft_is_named_after_its_method_or_as_asked() -> None:
    model = net()
    fxgraft.patch(model, "rsc", layer="stage1", input_size=SIZE)
    fxgraft.patch(model, "rsc", layer="stage2", name="late", input_size=SIZE)
    assert names(model) == ["rsc", "late"]
    assert repr(fxgraft.grafts(model)[1]).startswith("Graft('late', RSC(layers='stage2'")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"layer": "stage1"}, r"'rsc' is on the model already with these settings, as 'rsc'"),
        (
            {"layer": "stage1", "name": "other"},
            r"'rsc' is on the model already with these settings, as 'rsc'",
        ),
        ({"layer": "stage2"}, r"graft named 'rsc' on the model already(?s:.*)name=\"rsc_2\""),
        (
            {"layer": "stage2", "name": "rsc"},
            r"graft named 'rsc' on the model already(?s:.*)Choose another name",
        ),
    ],
)
def test_the_same_twice_is_refused(second: dict[str, Any], message: str) -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage1", input_size=SIZE)
    before = state_of_everything(model)
    with pytest.raises(ConfigError, match=message):
        fxgraft.patch(model, "rsc", input_size=SIZE, **second)
    assert_same(before, state_of_everything(model))
    assert names(model) == ["rsc"]


@pytest.mark.parametrize("name", ["two words", "a.b", "1st", "a-b"])
def test_a_name_must_be_an_identifier(name: str) -> None:
    with pytest.raises(ConfigError, match="name must be an identifier"):
        fxgraft.patch(net(), "rsc", name=name)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_dry_run_leaves_no_trace(patched: bool, fails: bool) -> None:
    model = net()
    if patched:
        fxgraft.patch(model, "rsc", layer="stage1", input_size=SIZE)
        fxgraft.patch(model, Toy(at=(("stage2", Output()), ("stage1.0", After("conv1"))), learned=True))
    before = state_of_everything(model)
    expected = step(model, images(), target=LABELS if patched else None) if patched else step(model, images())
    patch = Toy(
        at=(("stage2.0", After("conv1")), ("fc", Output())), factor=7, learned=True, fail=1 if fails else None
    )
    if fails:
        with pytest.raises(StructureError, match="unit 1 finds nothing"):
            fxgraft.patch(model, patch, name="tried", dry_run=True)
    else:
        plan = fxgraft.patch(model, patch, name="tried", dry_run=True)
        assert isinstance(plan, fxgraft.Plan)
        assert (plan.name, plan.patch) == ("tried", patch)
        assert plan.actions == (
            ("stage2.0", "Gain after conv1", "training and evaluation"),
            ("fc", "Gain output", "training and evaluation"),
        )
        lines = str(plan).splitlines()
        assert lines[0] == "tried: times 7"
        assert lines[1] == "  stage2.0: Gain after conv1, in training and evaluation"
    assert_same(before, state_of_everything(model))
    assert names(model) == (["rsc", "toy"] if patched else [])
    again = step(model, images(), target=LABELS) if patched else step(model, images())
    assert_equal_steps(again, expected)


# Taking off.


def stack(model: nn.Module) -> list[str]:
    """Four grafts that overlap: same owner, same node, container, model, with and without parameters."""
    fxgraft.patch(model, "rsc", layer="stage1.0.conv2", scope="spatial", input_size=SIZE)
    fxgraft.patch(
        model, Toy(at=(("stage1.0", After("conv2")), ("", Output())), factor=3, learned=True), name="a"
    )
    fxgraft.patch(
        model, Toy(at=(("stage1.0", After("conv2")), ("stage1", Output())), factor=5, learned=True), name="b"
    )
    fxgraft.patch(model, TrainToy(at=(("stage2.1", After("bn")), ("fc", Output()))), name="c")
    return ["rsc", "a", "b", "c"]


def prepared() -> Net:
    """A network with everything that undoing could get wrong."""
    model = net().train()
    model.stage1[1].bn.eval()
    model.stage2.eval()
    model.stem.first.weight.requires_grad_(False)
    model.fc.register_forward_hook(lambda _m, _a, out: out * 1.0)
    model.stage1[0].register_forward_pre_hook(lambda _m, args: None)
    model.note = "mine"
    return model


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, id="-".join(order), marks=[pytest.mark.sweep] if number > 1 else [])
        for number, order in enumerate(itertools.permutations(["rsc", "a", "b", "c"]))
        if number % 9 == 1
    ],
)
@pytest.mark.sweep
def test_grafts_come_off_in_any_order(order: tuple[str, ...]) -> None:
    model = prepared()
    bare = state_of_everything(model)
    expected = {}
    for mode in (True, False):
        expected[mode] = step(model.train(mode), images())
    model.train()
    model.stage1[1].bn.eval()
    model.stage2.eval()
    assert_same(bare, state_of_everything(model))
    added = stack(model)
    for index, name in enumerate(order):
        assert fxgraft.unpatch(model, name) is model
        left = [n for n in added if n not in order[: index + 1]]
        assert names(model) == left
        fresh = prepared()
        stack(fresh)
        fxgraft.unpatch(fresh, *[n for n in added if n not in left])
        assert list(fresh.state_dict()) == list(model.state_dict())
        labels = {"target": LABELS} if left else {}
        assert_equal_steps(step(model, images(), **labels), step(fresh, images(), **labels))
    assert_same(bare, state_of_everything(model))
    assert type(model) is Net
    assert type(model.stage1[0]) is Block
    for mode in (True, False):
        assert_equal_steps(step(model.train(mode), images()), expected[mode])


@pytest.mark.parametrize("how", ["all", "several", "handles"])
def test_several_or_all_come_off_at_once(how: str) -> None:
    model = prepared()
    before = state_of_everything(model)
    stack(model)
    handles = fxgraft.grafts(model)
    arguments = {"all": [], "several": ["c", "a", "rsc", "b"], "handles": handles[::-1]}[how]
    fxgraft.unpatch(model, *arguments)
    assert_same(before, state_of_everything(model))
    assert fxgraft.grafts(model) == []


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("wanted", [["nope"], ["rsc", "nope"]])
def test_unpatching_what_is_not_there(patched: bool, wanted: list[str]) -> None:
    model = net()
    if patched:
        fxgraft.patch(model, "rsc", layer="stage1", input_size=SIZE)
    before = state_of_everything(model)
    with pytest.raises(UnknownGraftError, match=r"no graft '(nope|rsc)' on this Net"):
        fxgraft.unpatch(model, *wanted)
    assert_same(before, state_of_everything(model))


def test_unpatching_a_bare_model() -> None:
    with pytest.raises(UnknownGraftError, match="no graft on this Net"):
        fxgraft.unpatch(net())


# All or nothing.


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("fail", [0, 1, 2])
def test_a_failure_at_any_site_leaves_everything_as_it_was(fail: int, first: bool) -> None:
    model = prepared()
    if not first:
        stack(model)
    before, present = state_of_everything(model), names(model)
    labels = {} if first else {"target": LABELS}
    expected = step(model, images(), **labels)
    units = [dict(graft.units) for graft in fxgraft.grafts(model)]
    at = (("stage1.0", Output()), ("stage2", Output()), ("", After("flatten")))
    with pytest.raises(StructureError, match=f"unit {fail} finds nothing"):
        fxgraft.patch(model, Toy(at=at, learned=True, fail=fail, factor=11), name="late")
    assert_same(before, state_of_everything(model))
    assert names(model) == present
    assert [dict(graft.units) for graft in fxgraft.grafts(model)] == units
    assert_equal_steps(step(model, images(), **labels), expected)


class RefusingToy(Toy):
    def on_installed(self, graft, backbone) -> None:
        raise RuntimeError("injected")


@pytest.mark.parametrize("first", [False, True])
def test_a_failure_after_writing_is_undone(first: bool) -> None:
    fxgraft.register("refuses")(RefusingToy)
    model = prepared()
    if not first:
        stack(model)
    before, present = state_of_everything(model), names(model)
    labels = {} if first else {"target": LABELS}
    expected = step(model, images(), **labels)
    with pytest.raises(RuntimeError, match="injected"):
        fxgraft.patch(model, RefusingToy(at=(("stage2.0", Output()),)))
    assert_same(before, state_of_everything(model))
    assert names(model) == present
    assert_equal_steps(step(model, images(), **labels), expected)
    if not first:
        fxgraft.unpatch(model)
        assert type(model) is Net


def test_a_failure_keeps_what_an_earlier_probe_knows() -> None:
    """RSC looks through what acts in evaluation; planning again looks at the bare model first."""
    model = net()
    fxgraft.patch(model, "rsc", layer="stage1", scope="spatial", batch_share=1, input_size=SIZE)
    fxgraft.patch(model, Toy(at=(("stage2", Output()),), factor=-1))
    expected = step(model, images(), target=LABELS)
    for dry_run in (False, True):
        with pytest.raises(StructureError):
            fxgraft.patch(model, Toy(fail=0), name="late", dry_run=dry_run)
        assert_equal_steps(step(model, images(), target=LABELS), expected)
    fxgraft.patch(model, Toy(at=(("fc", Output()),)), name="late", dry_run=True)
    assert_equal_steps(step(model, images(), target=LABELS), expected)
    fxgraft.sites(model, input_size=SIZE)
    assert_equal_steps(step(model, images(), target=LABELS), expected)


# Telling.


def test_grafts_lists_in_order_and_is_a_copy() -> None:
    model = net()
    assert fxgraft.grafts(model) == []
    stack(model)
    fxgraft.grafts(model).clear()
    assert names(model) == ["rsc", "a", "b", "c"]
    assert len(fxgraft.grafts(model)[1].parameters()) == 2
    assert fxgraft.grafts(model)[0].parameters() == []


def test_the_summary() -> None:
    model = net()
    assert str(fxgraft.summary(model)) == "Net: no grafts"
    fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE)
    fxgraft.patch(model, Toy(learned=True, factor=4, modes="training"), name="mine")
    summary = fxgraft.summary(model)
    assert str(summary).splitlines() == [
        "Net: 2 grafts, in order of action",
        "  rsc = rsc: stage2 (NCHW; closed form); 0 new parameters; "
        "needs labels in training, absent in evaluation",
        "  mine = toy: times 4; 1 new parameters",
    ]
    assert repr(summary) == str(summary)
    assert summary.__rich__().row_count == 2
    first, second = json.loads(json.dumps(summary.to_dict()))["grafts"]
    assert first == {
        "name": "rsc", "method": "rsc", "options": {"layers": "stage2"}, "where": "stage2 (NCHW; closed form)",
        "units": ["stage2"], "parameters": 0, "notes": ["needs labels in training", "absent in evaluation"],
    }  # fmt: skip
    assert (second["name"], second["parameters"]) == ("mine", 1)


def test_a_graft_of_many_units_is_summarised_in_short() -> None:
    model = fxgraft.patch(net(), "taps", layers="**.conv*", input_size=SIZE)
    (graft,) = fxgraft.summary(model).grafts
    assert len(graft.units) == 8
    first, second, *_, last = graft.units
    assert graft.where == f"records {first}, {second}, … {last} (8 units) (gradients flow)"
    assert fxgraft.grafts(model)[0].where(most=8) == ", ".join(graft.units)


@pytest.mark.parametrize("kind", ["before", "after", "added", "another", "frozen"])
def test_the_summary_notes_an_optimizer_that_lacks_the_new_parameters(kind: str) -> None:
    model = net()
    old = torch.optim.SGD(model.parameters(), 0.1)
    fxgraft.patch(model, Toy(learned=True))
    new = fxgraft.grafts(model)[0].parameters()
    given: Any = old
    if kind == "after":
        given = torch.optim.SGD(model.parameters(), 0.1)
    if kind == "added":
        old.add_param_group({"params": new})
    if kind == "another":
        given = (each for each in (old, torch.optim.SGD(new, 0.1)))
    if kind == "frozen":
        new[0].requires_grad_(False)
    noted = "parameters of it are not in the optimizer" in str(fxgraft.summary(model, given))
    assert noted is (kind == "before")
    assert "optimizer" not in str(fxgraft.summary(model))


def test_the_summary_counts_the_parameters_that_an_optimizer_lacks() -> None:
    inner = net()
    whole = nn.Sequential(inner)
    fxgraft.patch(inner, Toy(learned=True))
    fxgraft.patch(inner, "selfnorm", input_size=SIZE)
    own = fxgraft.grafts(whole)[1].parameters()
    optimizer = torch.optim.SGD(own[:1], 0.1)
    text = str(fxgraft.summary(whole, optimizer))
    assert "parameters of it are not in the optimizer" in text.splitlines()[1]
    assert f"{len(own) - 1} of {len(own)} parameters of it are not in the optimizer" in text.splitlines()[2]


def test_the_summary_takes_optimizers_of_the_model_only() -> None:
    model = fxgraft.patch(net(), Toy(learned=True))
    with pytest.raises(ConfigError, match="No parameter of this Net is in the optimizer"):
        fxgraft.summary(model, torch.optim.SGD(net().parameters(), 0.1))
    with pytest.raises(ConfigError, match="has param_groups, and this Parameter has none"):
        fxgraft.summary(model, model.parameters())  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"(?s)this float has none.*fxgraft.summary\(model, \[one, other\]\)"
    ):
        fxgraft.summary(model, 0.1)  # type: ignore[arg-type]


def test_every_error_is_of_the_library_and_of_the_builtin_it_refines() -> None:
    kinds = {name: getattr(fxgraft, name) for name in fxgraft.__all__ if name.endswith("Error")}
    assert len(kinds) > 10
    for name, kind in kinds.items():
        assert issubclass(kind, FxgraftError)
        if name != "FxgraftError":
            assert (
                len([b for b in kind.__mro__ if b.__module__ == "builtins" and issubclass(b, Exception)]) > 1
            )
    assert str(fxgraft.UnknownGraftError("a\nb")) == "a\nb"
    assert str(UnknownGraftError()) == ""


def test_gain_is_the_only_registered_unit_of_a_stack() -> None:
    model = net()
    stack(model)
    assert {type(m) for n, m in model.named_modules() if "graft_" in n} == {Gain}


def test_a_graft_of_another_model_by_the_same_name() -> None:
    own, other = net(), fxgraft.patch(net(), "selfnorm", input_size=SIZE)
    fxgraft.patch(own, "dsu", name="selfnorm", input_size=SIZE)
    with pytest.raises(UnknownGraftError, match=r"'selfnorm' that was given is another model's(?s:.*)DSU\("):
        fxgraft.unpatch(own, fxgraft.grafts(other)[0])
    assert len(fxgraft.grafts(own)) == 1
    fxgraft.unpatch(copy.deepcopy(other), fxgraft.grafts(other)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_that_cannot_be_copied() -> None:
    model = net()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    fxgraft.patch(model, "dsu", input_size=SIZE)
    model(images()).sum().backward()
    with pytest.raises(MergeError, match=r"cannot be copied(?s:.*)torch\.no_grad\(\)"):
        fxgraft.merge(model)
    with torch.no_grad():
        model(images())
    assert not fxgraft.grafts(fxgraft.merge(model))
