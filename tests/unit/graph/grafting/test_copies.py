"""Copies of patched models: whole ones behave the same and share nothing; parts refuse to run."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import fxgraft
from fxgraft.errors import BypassError
from fxgraft.graph.grafting.graft_registry import registry_of
from fxgraft.graph.tracing.editing import After, Output
from fxgraft.patches.rsc.patch import record
from models.toys import (
    LABELS,
    Block,
    Net,
    Toy,
    assert_equal_steps,
    images,
    net,
    step,
)
from system.contract.cases import replicas

pytestmark = pytest.mark.usefixtures("toy_methods")

INSIDE = (("stage1.0", After("conv1")),)


def rsc(model: nn.Module, layer: Any = "stage2", **options: Any) -> nn.Module:
    """Patch with RSC so that it always mutes the same: no chance in it."""
    options = {"scope": "spatial", "input_size": (3, 16, 16)} | options
    return fxgraft.patch(model, "rsc", layer=layer, **options)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stacked() -> nn.Module:
    model = net()
    rsc(model)
    fxgraft.patch(model, Toy(at=(*INSIDE, ("stage1", Output())), factor=1.5, learned=True))
    fxgraft.set_progress(model, 0.5)
    return model


@pytest.mark.parametrize("way", COPIES)
def test_copies_behave_the_same_and_share_nothing(way: str) -> None:
    model = stacked()
    twin = COPIES[way](model)
    assert type(twin) is type(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [g.name for g in fxgraft.grafts(twin)] == ["rsc", "toy"]
    assert registry_of(twin) is not registry_of(model)
    assert registry_of(twin).context is not registry_of(model).context
    assert registry_of(twin).context.progress == 0.5
    for mode in (True, False):
        ours = step(model.train(mode), images(), target=LABELS)
        assert_equal_steps(step(twin.train(mode), images(), target=LABELS), ours)
    ours = {p.data_ptr() for p in model.state_dict().values() if p.numel()}
    assert not ours & {p.data_ptr() for p in twin.state_dict().values() if p.numel()}
    units = [u for m in (model, twin) for g in fxgraft.grafts(m) for u in g.units.values()]
    assert len({id(u) for u in units}) == len(units)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(p.abs().sum() > 0 for p in fxgraft.grafts(model)[1].parameters())
    fxgraft.unpatch(twin)
    assert type(twin) is Net
    assert [g.name for g in fxgraft.grafts(model)] == ["rsc", "toy"]
    assert list(twin.state_dict()) == list(net().state_dict())


@pytest.mark.parametrize("way", COPIES)
def test_parameters_of_a_copied_graft_are_those_it_trains(way: str) -> None:
    twin = COPIES[way](stacked())
    own = fxgraft.grafts(twin)[1].parameters()
    assert {id(p) for p in own} == {id(p) for n, p in twin.named_parameters() if "graft_" in n}
    assert len(own) == 2


def test_a_bare_copy_of_a_patched_model_is_made_by_unpatching_it() -> None:
    bare, twin = net(), fxgraft.unpatch(copy.deepcopy(stacked()))
    assert pickle.dumps(twin.state_dict()) == pickle.dumps(bare.state_dict()) or all(
        torch.equal(a, b) for a, b in zip(twin.state_dict().values(), bare.state_dict().values(), strict=True)
    )
    assert_equal_steps(step(twin, images()), step(bare, images()))


def test_a_shallow_copy_runs_and_leaves_the_original_alone() -> None:
    model = stacked()
    twin = copy.copy(model)
    assert twin is not model
    assert twin.stage1 is model.stage1
    assert_equal_steps(step(twin, images(), target=LABELS), step(model, images(), target=LABELS))


def test_a_part_copied_without_its_model_refuses_to_run() -> None:
    model = stacked()
    part = copy.deepcopy(model.stage1[0])
    with pytest.raises(
        BypassError,
        match=r"copied out of a patched model, without the model\.\n.*\n.*after fxgraft.unpatch\(model\)",
    ):
        part(torch.randn(2, 8, 8, 8))
    assert [name for name in part.state_dict() if "graft_" in name] == []
    model(images(), target=LABELS)  # the model itself is unharmed
    host = net()
    host.stage1[0] = part
    fxgraft.patch(host, Toy(at=INSIDE, factor=3))
    fxgraft.unpatch(host)
    assert type(host.stage1[0]) is Block
    host(images())


def test_dataparallel_replicas_run_in_threads_with_their_own_labels() -> None:
    model = stacked()
    halves = [(images(seed=1), LABELS), (images(seed=2), LABELS.flip(0))]
    expected = []
    for x, y in halves:
        with record(model) as records:
            expected.append((step(model, x, target=y)[0], records[0].mask))
    assert not torch.equal(expected[0][0], expected[1][0])

    model.eval()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # threads share one generator
    expected = [step(model, x, target=y)[0] for x, y in halves]
    results: dict[int, Any] = {}
    gate = threading.Barrier(2)

    def run(index: int, replica: nn.Module) -> None:
        try:
            for _ in range(3):
                gate.wait(timeout=20)
                results[index] = replica(halves[index][0], target=halves[index][1]).detach()
        except Exception as error:
            results[index] = error

    made = replicas(model, len(halves))
    threads = [threading.Thread(target=run, args=(i, replica)) for i, replica in enumerate(made)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        if isinstance(results[index], Exception):
            raise results[index]
        assert torch.equal(results[index], expected[index])
    assert registry_of(model).context.current is None
    assert_equal_steps(step(model, *halves[0][:1], target=LABELS), step(model, *halves[0][:1], target=LABELS))


def test_a_shallow_copy_shares_its_grafts_and_is_not_changed() -> None:
    model = net()
    fxgraft.patch(model, Toy(factor=2))
    twin = copy.copy(model)
    for act in (lambda: fxgraft.unpatch(twin), lambda: fxgraft.patch(twin, Toy(factor=3), name="two")):
        with pytest.raises(fxgraft.WrappedModelError, match=r"shallow copy \(copy.copy\)"):
            act()
    assert len(fxgraft.grafts(model)) == 1
    assert fxgraft.grafts(fxgraft.unpatch(model)) == []


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_model_and_a_part_of_it_that_are_both_patched_travel(inner_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(timm.create_model("test_resnet", num_classes=6), nn.Linear(6, 4))
    acts = [
        lambda: fxgraft.patch(model, "rsc", layer="0.layer4", input_size=(3, 64, 64)),
        lambda: fxgraft.patch(model[0], "selfnorm", input_size=(3, 64, 64)),
    ]
    for act in reversed(acts) if inner_first else acts:
        act()
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    fxgraft.loss(model, model.train()(x, target=y), y).backward()
    out = model.eval()(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), out)
        assert [graft.name for graft in fxgraft.grafts(twin)] == ["rsc", "selfnorm"]
