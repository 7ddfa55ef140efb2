"""What is on a model is looked up: at the same cost in any network, and never as it was before."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.graph.grafting.lookup import patched_parts, unwrapped

X, Y = torch.randn(4, 3, 32, 32), torch.arange(4)


def backbone(*methods: str) -> nn.Module:
    model = timm.create_model("test_resnet", num_classes=4)
    for method in methods or ("rsc",):
        fxgraft.patch(model, method)
    return model


class Around(nn.Module):
    """A model of one's own around a backbone, with so many modules beside it."""

    def __init__(self, backbone: nn.Module, modules: int = 0) -> None:
        super().__init__()
        self.rest = nn.Sequential(
            *(nn.Sequential(*(nn.Identity() for _ in range(9))) for _ in range(modules // 10))
        )
        self.backbone = backbone

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.backbone(x, **options)  # type: ignore[no-any-return]


class Wrapper(nn.Module):
    """What DistributedDataParallel is to a lookup: one child of that name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count the calls that Python makes in the block, those of functions written in C among them."""
    calls = [0]

    def note(_frame: Any, event: str, _argument: Any) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


ASKS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "loss": lambda model, out: fxgraft.loss(model, out, Y),
    "extra_loss": lambda model, out: fxgraft.extra_loss(model, out, Y),
    "set_progress": lambda model, _: fxgraft.set_progress(model, 0.5),
    "diagnostics": lambda model, _: fxgraft.diagnostics(model),
}
INSIDE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "wrapped": Wrapper,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("beside", ["alone", "beside a copy"])
@pytest.mark.parametrize("wrap", INSIDE)
def test_asking_costs_as_many_calls_in_a_large_network(wrap: str, beside: str) -> None:
    made: dict[int, dict[str, int]] = {}
    for size in (10, 5000):
        gc.collect()  # patched models of other tests, which are counted while they live
        model = Around(backbone("rsc", "crossnorm"), size)
        average = copy.deepcopy(model.backbone) if beside == "beside a copy" else None
        whole = INSIDE[wrap](model)
        out = model(X, target=Y)
        for ask in ASKS.values():
            ask(whole, out)
        made[size] = {}
        for name, ask in ASKS.items():
            with counting() as calls:
                ask(whole, out)
            made[size][name] = calls[0]
        del model, average, whole, out
    assert made[10] == made[5000]
    assert all(0 < count < 1000 for count in made[10].values())


def test_a_large_patched_model_costs_no_more_than_a_small_one() -> None:
    made = []
    for size in (10, 5000):
        gc.collect()
        model = fxgraft.patch(Around(backbone("mixmo")), "rsc", layer="backbone.layer4")
        fxgraft.set_progress(model, 0.5)  # else the first passes look for where the model is
        model.rest.extend(nn.Identity() for _ in range(size))
        out = model(X, target=Y)
        fxgraft.loss(model, out, Y)
        with counting() as calls:
            fxgraft.loss(model, out, Y)
        made.append(calls[0])
        del model, out
    assert made[0] == made[1]


def names(model: nn.Module) -> list[str]:
    return list(patched_parts(model))


def test_a_part_that_is_patched_after_it_was_put_inside_is_found() -> None:
    model = Around(timm.create_model("test_resnet", num_classes=4))
    assert names(model) == []
    fxgraft.patch(model.backbone, "rsc")
    assert names(model) == ["backbone"]


def test_a_part_that_was_patched_before_it_is_put_inside_is_found() -> None:
    model, part = Around(backbone()), backbone()
    assert names(model) == ["backbone"]
    model.teacher = part
    assert names(model) == ["backbone", "teacher"]


def test_a_patched_part_inside_of_what_is_put_inside_is_found() -> None:
    model, inner = Around(nn.Identity()), nn.Sequential(nn.Identity(), backbone())
    assert names(model) == []
    model.rest.append(inner)
    assert names(model) == ["rest.0.1"]


@pytest.mark.parametrize("new", [backbone, nn.Identity], ids=["patched", "bare"])
def test_a_part_that_is_exchanged_is_not_found_any_more(new: Callable[[], nn.Module]) -> None:
    model = Around(backbone())
    old, later = model.backbone, new()
    assert list(patched_parts(model).values()) == [old]
    model.backbone = later
    assert list(patched_parts(model).values()) == ([later] if new is backbone else [])
    model._modules["backbone"] = old  # past the hooks of torch
    assert list(patched_parts(model).values()) == [old]
    del model.backbone
    assert names(model) == []


def test_a_model_that_is_put_inside_where_nobody_sees_it_is_found_once_it_trains() -> None:
    """``ModuleList.insert`` writes past the hooks of torch."""
    model = nn.ModuleList([backbone()])
    other = backbone("crossnorm")
    assert names(model) == ["0"]
    model.insert(0, other)
    other(X, target=Y)
    assert names(model) == ["0", "1"]


def test_grafts_that_are_taken_off_and_put_on_again_are_followed() -> None:
    model = Around(backbone("rsc", "crossnorm"))
    assert len(fxgraft.grafts(model)) == 2
    fxgraft.unpatch(model.backbone, "rsc")
    assert [graft.name for graft in fxgraft.grafts(model)] == ["crossnorm"]
    fxgraft.unpatch(model.backbone)
    assert names(model) == []
    fxgraft.patch(model.backbone, "rsc")
    assert names(model) == ["backbone"]


def test_a_failed_patch_and_a_look_at_the_bare_model_leave_the_answer() -> None:
    model = Around(backbone())
    for _ in range(2):
        with pytest.raises(fxgraft.FxgraftError):
            fxgraft.patch(model.backbone, "rsc", layer="no such layer", name="second")
        fxgraft.sites(model.backbone)
        assert names(model) == ["backbone"]


def test_a_head_that_is_exchanged_leaves_the_grafts() -> None:
    model = Around(backbone())
    assert names(model) == ["backbone"]
    model.backbone.reset_classifier(3)  # type: ignore[operator]
    out = model(X, target=Y % 3)
    assert torch.isfinite(fxgraft.loss(model, out, Y % 3))
    assert [graft.name for graft in fxgraft.grafts(model)] == ["rsc"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_grafts_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = Around(backbone())
    before = patched_parts(model)
    twin = duplicate(model)
    assert names(twin) == ["backbone"]
    assert fxgraft.grafts(twin)[0] is not fxgraft.grafts(model)[0]
    assert patched_parts(model) == before
    fxgraft.unpatch(twin.backbone)  # type: ignore[arg-type]
    assert (names(twin), names(model)) == ([], ["backbone"])
    model.teacher = twin
    assert names(model) == ["backbone"]


def test_a_shallow_copy_is_found_as_well() -> None:
    part = backbone()
    model = Around(part)
    assert names(model) == ["backbone"]
    model.other = copy.copy(part)
    assert names(model) == ["backbone", "other"]


def test_what_is_loaded_is_found(tmp_path: Any) -> None:
    fxgraft.save(backbone(), tmp_path / "run")
    model = Around(timm.create_model("test_resnet", num_classes=4))
    assert names(model) == []
    fxgraft.load(model.backbone, tmp_path / "run")
    assert names(model) == ["backbone"]


def test_the_grafts_of_a_merged_copy_are_gone() -> None:
    model = Around(backbone())
    assert (names(fxgraft.merge(model)), names(model)) == ([], ["backbone"])


def test_a_model_of_ones_own_with_a_child_named_module_is_no_wrapper() -> None:
    model = Around(backbone())
    model.module = nn.Linear(2, 2)
    assert unwrapped(model) is model
    assert names(model) == ["backbone"]
    assert names(Wrapper(model)) == ["backbone"]


def test_nothing_is_kept_alive() -> None:
    model = Around(backbone())
    patched_parts(model)
    gone = weakref.ref(model), weakref.ref(model.backbone)
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_threads_find_what_is_there() -> None:
    model, parts = Around(backbone()), [backbone(), backbone("crossnorm")]
    wrong: list[Any] = []
    over = threading.Event()

    def ask() -> None:
        try:
            while not over.is_set():
                found = patched_parts(model)
                if list(found) != ["backbone"] or found["backbone"] not in parts:
                    wrong.append(found)
        except Exception as error:
            wrong.append(error)

    model.backbone = parts[0]
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        model.backbone = parts[turn % 2]
        assert patched_parts(model) == {"backbone": parts[turn % 2]}
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_modules_that_compiled_code_makes_break_no_graph() -> None:
    backbone()

    class Making(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.Sequential(nn.ReLU(), nn.Flatten())(x)  # type: ignore[no-any-return]

    assert torch.compile(Making(), backend="eager", fullgraph=True)(X).shape == (4, 3072)


def test_a_loss_of_grafts_that_remember_nothing_costs_the_same_for_a_deep_network() -> None:
    made = []
    for depth in (1, 300):
        gc.collect()
        model = nn.Sequential(nn.Sequential(*(nn.Softplus() for _ in range(depth))), backbone("selfnorm"))
        x = torch.zeros(4, 3, 32, 32, requires_grad=True)
        out = model(x)
        fxgraft.loss(model, out, Y)
        with counting() as calls:
            fxgraft.loss(model, out, Y)
        made.append(calls[0])
        del model, out
    assert made[0] == made[1]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_a_part_that_is_inserted_is_told_and_found(container: type[Any]) -> None:
    """`insert` writes past torch's own hook for what is registered."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = container()
            self.members.append(timm.create_model("test_resnet", num_classes=4))

        def forward(self, x: Tensor) -> Tensor:
            return sum(member(x) for member in self.members)  # type: ignore[return-value]

    part = timm.create_model("test_resnet", num_classes=4)
    fxgraft.patch(part, "crossnorm", consistency=True, p=1.0)
    fxgraft.loss(part, part(X), Y).backward()
    whole = Ensemble()
    fxgraft.loss(whole, whole(X), Y).backward()
    whole.members.insert(1, part)
    fxgraft.losses(whole, whole(X), Y)  # this one lacks it
    with pytest.warns(fxgraft.FxgraftWarning, match=r"'members\.1' is newly found.* last 2 training passes"):
        assert "members.1.crossnorm.consistency" in fxgraft.losses(whole, whole(X), Y)
    assert "members.1.crossnorm.consistency" in fxgraft.losses(whole, whole(X), Y)
    assert names(whole) == ["members.1"]
