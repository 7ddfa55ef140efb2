"""`fxgraft.diagnostics`: what the last training pass did, as scalars for loggers."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxgraft
from fxgraft import extend
from fxgraft.patches import registry
from fxgraft.patches.diversification.patch import record as suppressed
from fxgraft.patches.rsc.patch import record as muted
from models.toys import LABELS, Toy, images, net

SIZE = (3, 8, 8)


def patched(*methods: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = net() if model is None else model
    for each in methods:
        fxgraft.patch(model, each, input_size=SIZE, **options)
    return model


def test_rsc_tells_what_its_records_tell() -> None:
    model = patched("rsc", layer="stage2")
    assert fxgraft.diagnostics(model) == {}
    with muted(model) as records:
        model(images(), target=LABELS)
    found = fxgraft.diagnostics(model)
    assert found == {
        "rsc.muted": pytest.approx((records[0].mask == 0).double().mean().item()),
        "rsc.samples": pytest.approx(records[0].selected.double().mean().item()),
    }
    assert 0 < found["rsc.muted"] < 1
    model.eval()(images())
    assert fxgraft.diagnostics(model) == found, "evaluation changes nothing"


def test_rsc_before_its_start_has_muted_nothing() -> None:
    model = patched("rsc", layer="stage2", start=0.5)
    model(images(), target=LABELS)
    assert fxgraft.diagnostics(model) == {"rsc.muted": 0, "rsc.samples": 0}


def test_selfnorm_tells_its_gates_and_their_mean() -> None:
    model = patched("selfnorm", gates=2)
    gates = [unit.f for unit in fxgraft.grafts(model)[0].units.values()]
    nn.init.ones_(gates[0].norm.weight)
    model(images())
    found = fxgraft.diagnostics(model)
    assert found["selfnorm.gate"] == 1  # as the identity
    of_means = {name: value for name, value in found.items() if name.startswith("selfnorm.mean_gate.")}
    assert len(of_means) == 4
    assert found["selfnorm.mean_gate"] == pytest.approx(sum(of_means.values()) / 4)
    assert len({*of_means.values()}) == 2, "one gate was opened by its statistics"


def test_crossnorm_counts_its_units() -> None:
    model = patched("crossnorm", p=1.0, active=3)
    model(images())
    assert fxgraft.diagnostics(model) == {"crossnorm.active": 3}
    model = patched("crossnorm", consistency=True, p=1.0)
    out = model(images(), target=LABELS)
    assert fxgraft.diagnostics(model) == {"crossnorm.active": 0}
    parts = fxgraft.losses(model, out, LABELS)
    found = fxgraft.diagnostics(model)
    assert found == {
        "crossnorm.active": 1,
        "crossnorm.consistency": pytest.approx(parts["crossnorm.consistency"].item()),
    }


def test_diversification_tells_the_suppressed_share() -> None:
    model = patched("diversification", patch=1)
    with suppressed(model) as records:
        model(images(), target=LABELS)
    assert records[0].mask is not None
    share = records[0].mask.double().mean().item()
    assert fxgraft.diagnostics(model) == {"diversification.suppressed": pytest.approx(share)}


def test_mixmo_tells_how_often_members_agree() -> None:
    model = patched("mixmo")
    out = model(images(), target=LABELS)
    agreement = (out[0].argmax(-1) == out[1].argmax(-1)).double().mean().item()
    assert fxgraft.diagnostics(model) == {"mixmo.agreement": pytest.approx(agreement)}


def test_gam_tells_both_sides_of_the_game() -> None:
    model = patched("gam", layers=["stage2", "fc"])
    game = fxgraft.gam.gam_losses(model, images(), images(seed=1))
    found = fxgraft.diagnostics(model)
    assert found["gam.accuracy.fc"] == pytest.approx(game.accuracy["fc"].item())
    assert found["gam.drift"] == pytest.approx(game.parts["drift"].item())
    assert {"gam.discriminator.stage2", "gam.mapping.stage2"} <= found.keys()


def test_grafts_of_a_stack_and_of_a_part_have_names_of_their_own() -> None:
    inner = patched("selfnorm", "crossnorm")
    fxgraft.patch(inner, "rsc", layer="stage2", input_size=SIZE, name="late")
    outer = nn.Sequential(inner, nn.Linear(4, 4))
    with fxgraft.targets(LABELS):
        outer(images())
    found = fxgraft.diagnostics(outer)
    assert {"0.selfnorm.gate", "0.crossnorm.active", "0.late.muted"} <= found.keys()
    assert fxgraft.diagnostics(inner)["late.muted"] == found["0.late.muted"]
    fxgraft.unpatch(inner, "late")
    assert fxgraft.diagnostics(outer) == {}, "what was taken off says nothing"


def test_tensorboard_takes_them(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
    model, seen = patched("rsc", "selfnorm"), []
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            model(images(seed=step), target=LABELS)
            for name, value in fxgraft.diagnostics(model).items():
                writer.add_scalar(name, value, step)
            seen.append(fxgraft.diagnostics(model)["rsc.muted"])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("rsc.muted")] == pytest.approx(seen)


def test_copies_start_without_and_keep_to_themselves() -> None:
    model = patched("rsc", layer="stage2")
    model(images(), target=LABELS)
    found = fxgraft.diagnostics(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fxgraft.diagnostics(twin) == {}
        twin(images(seed=5), target=LABELS)
        assert fxgraft.diagnostics(twin).keys() == found.keys()
        assert fxgraft.diagnostics(model) == found


def test_another_thread_may_log_and_train() -> None:
    model, found = patched("crossnorm", model=patched("selfnorm"), p=1.0), []  # type: ignore[var-annotated]
    threads = [threading.Thread(target=lambda: found.append(model(images()))) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 4
    assert fxgraft.diagnostics(model)["crossnorm.active"] == 1


def test_compiled_in_one_graph_and_not_again() -> None:
    torch.compiler.reset()
    model = patched("selfnorm")
    fxgraft.patch(model, "crossnorm", input_size=SIZE, p=1.0, active=2)
    fxgraft.patch(model, "rsc", input_size=SIZE, layer="stage1")
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    compiled(images(), target=LABELS).sum().backward()
    first = fxgraft.diagnostics(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(images(seed=1), target=LABELS).sum().backward()
    assert fxgraft.diagnostics(compiled).keys() == first.keys()
    assert first["crossnorm.active"] == 2
    assert first["selfnorm.gate"] == 1
    assert 0 < first["rsc.muted"] < 1


def test_wrapped_for_several_processes() -> None:
    model = patched("rsc", layer="stage2")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        fxgraft.loss(wrapped, wrapped(images(), target=LABELS), LABELS).backward()
        assert fxgraft.diagnostics(wrapped) == fxgraft.diagnostics(model) != {}
    finally:
        dist.destroy_process_group()


def test_what_is_kept_holds_no_graph_and_no_map() -> None:
    model = patched("selfnorm", "diversification", "rsc", model=net())
    model(images(), target=LABELS)
    for graft in fxgraft.grafts(model):
        for values in graft.measured().values():
            for each in values:
                assert not isinstance(each, Tensor) or (each.grad_fn is None and not each.requires_grad)


def test_a_transform_of_torch_func_leaves_nothing_behind() -> None:
    model = patched("selfnorm")
    state, buffers = dict(model.named_parameters()), {k: v.clone() for k, v in model.named_buffers()}

    def total(parameters: dict[str, Tensor]) -> Tensor:
        plain = {k: v.clone() for k, v in buffers.items()}
        return torch.func.functional_call(model, {**plain, **parameters}, (images(),)).sum()

    for each in model.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.eval()  # its counter cannot be written to inside a transform
    torch.func.grad(total)(state)
    assert all(math.isfinite(value) for value in fxgraft.diagnostics(model).values())


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


class Noise(extend.Unit):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        run = self.current
        if run is not None:
            run.measure("deviation", noise.square())
        return x + noise


@dataclass(frozen=True, kw_only=True)
class Noisy(extend.LayeredPatch):
    train_only = True
    wrong: bool = False

    def place(self, backbone: extend.Backbone, make: extend.Make) -> Any:
        return [
            backbone.place(s, make(s.name, Noise), evaluation=False) for s in backbone.sites(self.layers or 0)
        ]

    def diagnostics(self, graft: extend.Graft) -> Any:
        found = super().diagnostics(graft)
        return "much" if self.wrong else {name: math.sqrt(value) for name, value in found.items()}


@pytest.mark.usefixtures("_registry")
def test_a_method_of_somebody_else_measures_and_computes() -> None:
    fxgraft.register("noisy")(Noisy)
    model = patched("noisy", layers=["stage1", "stage2"])
    assert fxgraft.diagnostics(model) == {}
    model(images())
    assert fxgraft.diagnostics(model)["noisy.deviation"] == pytest.approx(1, abs=0.2)
    wrong = patched("noisy", layers="stage1", wrong=True)
    with pytest.raises(
        fxgraft.MethodError, match=r"(?s)Noisy.diagnostics returned 'much'.*dictionary of numb"
    ):
        fxgraft.diagnostics(wrong)


def test_the_methods_of_another_package_say_what_their_cards_explain() -> None:
    model = patched("padain", layers="stage1", p=1.0)
    model(images())
    (name,) = fxgraft.diagnostics(model)
    assert name == f"padain.{next(iter(fxgraft.methods()['padain'].measures))}"


@pytest.mark.usefixtures("_registry")
def test_a_method_that_measures_nothing_says_nothing() -> None:
    fxgraft.register("toy")(Toy)
    model = fxgraft.patch(net(), "toy", at=(), input_size=SIZE)
    model(images())
    assert fxgraft.diagnostics(model) == {}
