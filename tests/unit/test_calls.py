"""Around the calls: the registry, progress, losses, merging, and where labels come from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import (
    ConfigError,
    MergeError,
    StructureError,
    TargetError,
)
from fxgraft.graph.grafting.graft_registry import registry_of
from fxgraft.graph.tracing.editing import After, Output
from fxgraft.patches import registry
from models.toys import (
    LABELS,
    Net,
    Scale,
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

pytestmark = pytest.mark.usefixtures("toy_methods")

SIZE = (3, 16, 16)


# The registry.


def test_methods_lists_what_is_registered() -> None:
    found = fxgraft.methods()
    assert found["rsc"] is fxgraft.RSC
    assert found["toy"] is Toy
    assert list(found) == sorted(found)
    found.clear()
    assert "rsc" in fxgraft.methods()


def test_a_taken_name_is_refused_unless_overridden() -> None:
    class Other(Toy):
        pass

    with pytest.raises(
        ConfigError, match=r"'toy' is taken by models\.toys\.Toy; .*Other cannot(?s:.*)override=True"
    ):
        fxgraft.register("toy")(Other)
    assert fxgraft.methods()["toy"] is Toy
    fxgraft.register("toy", override=True)(Other)
    assert fxgraft.methods()["toy"] is Other


@pytest.mark.parametrize("thing", [object, Scale, 3])
def test_only_patches_can_be_registered(thing: Any) -> None:
    with pytest.raises(ConfigError, match=r"isn't a subclass of fxgraft\.Patch"):
        fxgraft.register("thing")(thing)


def test_entry_points_of_other_packages_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Foreign(Toy):
        pass

    def registers() -> Any:
        loads.append("module")
        fxgraft.register("by_module")(type("ByModule", (Toy,), {}))
        return SimpleNamespace()

    def gives() -> Any:
        loads.append("class")
        return Foreign

    points = [SimpleNamespace(name="by_class", load=gives), SimpleNamespace(name="by_module", load=registers)]
    groups: list[str] = []
    monkeypatch.setattr(registry, "_entry_points_loaded", False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: groups.append(group) or points)
    found = fxgraft.methods()
    assert found["by_class"] is Foreign
    assert "by_module" in found
    fxgraft.methods()
    assert (groups, loads) == (["fxgraft.patches"], ["class", "module"])
    assert names(fxgraft.patch(net(), "by_class", factor=4.0)) == ["by_class"]


# Progress.


def test_progress_reaches_every_unit_now_and_later() -> None:
    class Follows(Scale):
        seen: ClassVar[list[float]] = []

        def set_progress(self, fraction: float) -> None:
            self.seen.append(fraction)

    class FollowingToy(Toy):
        def unit(self) -> Scale:
            return Follows(1)

    fxgraft.register("follows")(FollowingToy)
    model = net()
    fxgraft.set_progress(model, 0.5)  # a bare model has nothing to tell
    fxgraft.patch(model, FollowingToy(at=(("fc", Output()), ("stage1", Output()))))
    assert Follows.seen == [0.0, 0.0]
    fxgraft.set_progress(model, 0.25)
    assert Follows.seen[2:] == [0.25, 0.25]
    fxgraft.patch(model, Toy())
    assert set(Follows.seen[4:]) == {0.25}
    assert registry_of(model).context.progress == 0.25


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, torch.zeros(2)])
def test_progress_is_a_share(fraction: Any) -> None:
    model = fxgraft.patch(net(), Toy())
    with pytest.raises(ConfigError, match=r"Progress is the share of training done.*\nPass epoch / epochs"):
        fxgraft.set_progress(model, fraction)
    assert registry_of(model).context.progress == 0.0


def test_rsc_starts_when_progress_says_so() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", start=0.5, input_size=SIZE)
    model(images())  # no labels needed yet
    fxgraft.set_progress(model, 0.5)
    with pytest.raises(TargetError):
        model(images())


# Losses.


def test_losses_of_a_bare_model_are_the_criterion() -> None:
    out = torch.randn(4, 4, requires_grad=True)
    assert fxgraft.losses(net(), out, LABELS).keys() == {"criterion"}
    assert torch.equal(fxgraft.loss(net(), out, LABELS), F.cross_entropy(out, LABELS))


def test_losses_hold_what_grafts_add_and_the_criterion_they_put_in_place() -> None:
    model = net()
    fxgraft.patch(model, TrainToy(penalty=0.5), name="one")
    fxgraft.patch(model, TrainToy(penalty=0.25), name="two")
    out = torch.randn(4, 4, requires_grad=True)
    parts = fxgraft.losses(
        model, out, LABELS, criterion=lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)
    )
    assert list(parts) == ["criterion", "one.penalty", "two.penalty"]
    assert torch.equal(parts["criterion"], 4 * F.cross_entropy(out, LABELS, label_smoothing=0.1))
    assert torch.equal(parts["two.penalty"], 0.25 * out.square().mean())
    whole = fxgraft.loss(model, out, LABELS, lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1))
    torch.testing.assert_close(whole, sum(parts.values()))
    whole.backward()
    assert whole.ndim == 0
    assert out.grad is not None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: {"out": o, "aux": -o},
        lambda o: SimpleNamespace(logits=o),
        lambda o: {"logits": o},
        lambda o: SimpleNamespace(out=None, logits=o),
    ],
)
def test_the_logits_of_structured_outputs_are_found(wrap: Any) -> None:
    out = torch.randn(4, 4)
    assert torch.equal(fxgraft.loss(net(), wrap(out), LABELS), F.cross_entropy(out, LABELS))


@pytest.mark.parametrize(
    ("out", "held"),
    [
        ((torch.zeros(1),), "\nIt has: 0"),
        ({"x": torch.zeros(1), "y": torch.zeros(1)}, "\nIt has: 'x', 'y'"),
        ({"out": torch.zeros(4, 8), "logits": torch.zeros(4, 4)}, "\nIt has: 'out', 'logits'"),
        (None, ""),
    ],
)
def test_logits_that_cannot_be_found(out: Any, held: str) -> None:
    with pytest.raises(
        StructureError,
        match=f"not clear what in it are the logits.{held}(?s:.*)a method that has this option",
    ):
        fxgraft.loss(net(), out, LABELS)


# Merging.


def test_a_method_of_training_alone_merges_into_the_stock_model() -> None:
    model = net()
    fxgraft.patch(model, "rsc", layer="stage2", scope="spatial", input_size=SIZE)
    fxgraft.patch(model, TrainToy(at=(("stage1.0", After("conv1")),), learned=True))
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    fxgraft.loss(model, model(images(), target=LABELS), LABELS).backward()
    optimiser.step()
    before = state_of_everything(model)
    merged = fxgraft.merge(model)
    assert_same(before, state_of_everything(model))
    assert type(merged) is Net
    assert all("fxgraft" not in type(m).__module__ for m in merged.modules())
    assert all("_fxgraft" not in m.__dict__ for m in merged.modules())
    fresh = Net()
    fresh.load_state_dict(merged.state_dict(), strict=True)
    for each in (model, merged, fresh):
        each.eval()
    assert torch.equal(merged(images()), model(images()))
    assert torch.equal(fresh(images()), model(images()))
    assert not {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_bare_model_merges_into_a_copy_of_itself() -> None:
    model = net()
    merged = fxgraft.merge(model)
    assert merged is not model
    assert_equal_steps(step(merged, images()), step(model, images()))


def test_what_acts_in_evaluation_cannot_be_merged() -> None:
    model = net()
    fxgraft.patch(model, TrainToy(), name="fine")
    fxgraft.patch(model, Toy(), name="mine")
    before = state_of_everything(model)
    with pytest.raises(MergeError, match=r"'mine' \(Toy\) acts in evaluation too"):
        fxgraft.merge(model)
    assert_same(before, state_of_everything(model))


def test_a_method_may_fold_itself() -> None:
    class FoldingToy(Toy):
        def merge(self, graft: fxgraft.Graft, model: nn.Module) -> None:
            with torch.no_grad():
                model.fc.weight *= graft.units["0"].weight
                model.fc.bias *= graft.units["0"].weight

    fxgraft.register("folds")(FoldingToy)
    model = fxgraft.patch(net(), FoldingToy(learned=True, factor=2.0)).eval()
    merged = fxgraft.merge(model)
    assert type(merged) is Net
    assert torch.equal(merged(images()), model(images()))
    assert not torch.equal(merged.fc.weight, model.fc.weight)


# Labels.


def spy(model: nn.Module) -> list[Tensor | None]:
    """The labels that each pass of a model sees."""
    seen: list[Tensor | None] = []

    class Sees(Scale):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.run.target)
            return x

    class SeeingToy(Toy):
        def unit(self) -> Scale:
            return Sees(1)

    fxgraft.register("sees", override=True)(SeeingToy)
    fxgraft.patch(model, SeeingToy(at=(("fc", Output()),)))
    return seen


def test_labels_come_from_the_call_or_the_innermost_block() -> None:
    model = net()
    seen = spy(model)
    a, b, c = LABELS, LABELS + 1, LABELS + 2
    model(images())
    with fxgraft.targets(a):
        model(images())
        model(images())
        with fxgraft.targets(b):
            model(images())
            model(images(), target=c)
        model(images())
    model(images())
    assert [s if s is None else int(s[0]) for s in seen] == [None, 0, 0, 1, 2, 0, None]
    assert registry_of(model).context.current is None


def test_labels_are_forgotten_after_a_failing_block() -> None:
    model = net()
    seen = spy(model)
    with pytest.raises(ZeroDivisionError), fxgraft.targets(LABELS):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        model(torch.zeros(1), target=LABELS)
    model(images())
    assert seen == [None]
    assert registry_of(model).context.current is None


@pytest.mark.parametrize(
    ("index", "batch"), [(1, lambda x, y: (x, y)), ("label", lambda x, y: {"image": x, "label": y})]
)
def test_a_loader_gives_each_batch_its_labels(index: Any, batch: Any) -> None:
    model = net()
    seen = spy(model)
    loader = [batch(images(seed=i), LABELS + i) for i in range(3)]
    for given, expected in zip(fxgraft.with_targets(loader, index), loader, strict=True):
        assert given is expected
        model(given[0 if index == 1 else "image"])
    model(images())
    assert [s if s is None else int(s[0]) for s in seen] == [0, 1, 2, None]


def test_labels_of_a_loader_serve_one_training_pass() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    for x, _ in fxgraft.with_targets([(images(), LABELS)] * 2):
        model.eval()
        model(x)  # evaluation passes do not count
        model.train()
        model(x)
        with pytest.raises(TargetError, match="left over from an earlier pass"):
            model(x)
        model(x, target=LABELS)


def test_a_loader_left_early_leaves_no_labels() -> None:
    model = net()
    seen = spy(model)
    loader = fxgraft.with_targets([(images(), LABELS)] * 2)
    next(loader)
    loader.close()
    model(images())
    assert seen == [None]


def test_evaluation_needs_no_labels_and_ignores_them() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE).eval()
    bare = net().eval()
    assert torch.equal(model(images()), bare(images()))
    assert torch.equal(model(images(), target=LABELS + 99), bare(images()))


def test_compiled_calls_read_labels_from_around_them() -> None:
    """Other labels do not compile again."""
    torch.compiler.reset()
    model = fxgraft.patch(
        net(), "rsc", layer="stage2", input_size=(3, 8, 8), scope="spatial", batch_share=1.0
    )
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    x = images()
    for labels in (LABELS, LABELS.flip(0)):
        with fxgraft.targets(labels), torch._dynamo.config.patch(error_on_recompile=labels is not LABELS):
            torch.manual_seed(1)
            out = compiled(x)
        torch.manual_seed(1)
        torch.testing.assert_close(out, model(x, target=labels))
    with pytest.raises(TargetError, match="needs the labels of the batch"):
        model(x)
