"""SelfNorm on models: initialisation, parameters and their names, order with CrossNorm, saving, undoing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import fxgraft
from fxgraft import ConfigError, FxgraftWarning, MergeError, SelfNorm
from sweeping import some

SMALL: dict[str, Any] = {"input_size": (3, 64, 64)}


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=4, channels=(8, 12, 16, 20), zero_init_last=False)


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("position", some(["post", "identity", "residual", "pre"], 2))
def test_the_start_changes_no_bit_and_then_trains(gates: Any, position: Any) -> None:
    bare = resnet()
    model = fxgraft.patch(copy.deepcopy(bare), "selfnorm", gates=gates, position=position, **SMALL)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    assert torch.equal(model.eval()(x), bare.eval()(x))
    assert torch.equal(model.train()(x), bare.train()(x))
    own = fxgraft.grafts(model)[0].parameters()
    optimiser = torch.optim.SGD(own, lr=1.0)
    for _ in range(2):
        optimiser.zero_grad()
        fxgraft.loss(model, model(x), y).backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own)
    assert sum(bool(p.grad.abs().max() > 0) for p in own) > 0.9 * len(own)  # type: ignore[union-attr]
    assert not torch.equal(model.eval()(x), bare.eval()(x))


def test_authors_init_opens_gates_to_about_a_half() -> None:
    model = fxgraft.patch(resnet(), "selfnorm", init="authors", **SMALL).train()
    seen = []
    for unit in fxgraft.grafts(model)[0].units.values():
        unit.g.register_forward_hook(lambda *args: seen.append(args[2].mean()))  # type: ignore[union-attr]
    model(torch.randn(8, 3, 64, 64))
    assert torch.stack(seen).mean().item() == pytest.approx(0.5, abs=0.05)
    assert "start around 0.5" in str(fxgraft.summary(model))
    other = fxgraft.patch(resnet(), "selfnorm", **SMALL)
    assert "start as the identity" in str(fxgraft.summary(other))


def test_the_authors_start_warns_on_a_trained_network_once(recwarn: pytest.WarningsRecorder) -> None:
    fxgraft.patch(resnet(), "selfnorm", init="authors", **SMALL)
    trained = resnet()
    trained.train()(torch.randn(4, 3, 64, 64))
    fxgraft.patch(copy.deepcopy(trained), "selfnorm", **SMALL)
    assert not recwarn
    with pytest.warns(FxgraftWarning, match=r'halve its activations.*init="identity"'):
        fxgraft.patch(trained, "selfnorm", init="authors", **SMALL)
    recwarn.clear()
    fxgraft.patch(trained, "crossnorm", **SMALL)  # planned again, with the units it has
    assert not recwarn


@pytest.mark.sweep
def test_weights_that_come_after_the_patch_are_noticed_at_the_first_training_pass(
    recwarn: pytest.WarningsRecorder,
) -> None:
    trained, x = resnet(), torch.randn(4, 3, 64, 64)
    trained.train()(x)
    model = fxgraft.patch(resnet(), "selfnorm", init="authors", **SMALL)
    assert "has been trained" not in str(fxgraft.summary(model))
    model.load_state_dict(trained.state_dict(), strict=False)
    model.eval()(x)
    assert not recwarn
    assert "has been trained: every block will halve" in str(fxgraft.summary(model))
    with pytest.warns(
        FxgraftWarning, match=r'of this ResNet to about 0.5.*has been trained.*init="identity"'
    ):
        model.train()(x)
    recwarn.clear()
    model(x)  # once, and now the gates train, too
    assert "has been trained" not in str(fxgraft.summary(model))
    again = fxgraft.patch(resnet(), "selfnorm", init="authors", **SMALL)
    again.load_state_dict(model.state_dict())
    again.train()(x)  # a checkpoint with its gates
    fresh = fxgraft.patch(resnet(), "selfnorm", init="authors", **SMALL)
    for _ in range(2):
        fresh.train()(x)
    assert "has been trained" not in str(fxgraft.summary(fresh))
    identity = fxgraft.patch(copy.deepcopy(trained), "selfnorm", **SMALL)
    identity.train()(x)
    assert not recwarn


@pytest.mark.sweep
def test_the_warning_of_the_first_training_pass_breaks_no_compiled_graph() -> None:
    torch._dynamo.reset()
    trained, x = resnet(), torch.randn(4, 3, 64, 64)
    trained.train()(x)
    with pytest.warns(FxgraftWarning):
        model = fxgraft.patch(trained, "selfnorm", init="authors", **SMALL)
    twin = copy.deepcopy(model)
    torch.compile(model, backend="eager", fullgraph=True)(x)
    with pytest.warns(FxgraftWarning, match="has been trained"):
        expected = twin(x)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    assert expected.isfinite().all()


@pytest.mark.parametrize("gates", [1, 2])
def test_parameters_beside_their_block_and_without_weight_decay(gates: Any) -> None:
    bare = resnet()
    model = fxgraft.patch(copy.deepcopy(bare), SelfNorm(gates=gates), **SMALL)
    new = [key for key in model.state_dict() if key not in bare.state_dict()]
    assert all(key.startswith("layer") and ".graft_selfnorm." in key for key in new)
    assert {key.split(".graft_selfnorm.")[0] for key in new} == {
        f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)
    }
    own = fxgraft.grafts(model)[0].parameters()
    # two weights and BatchNorm's two, per channel and gate
    assert sum(p.numel() for p in own) == gates * 4 * 2 * (8 + 12 + 16 + 20)
    exempt = {id(p) for p in param_groups_weight_decay(model, 0.1)[0]["params"]}
    assert {id(p) for p in own} <= exempt


@pytest.mark.parametrize("first", ["crossnorm", "selfnorm"])
def test_the_pair_runs_in_the_authors_order(first: str) -> None:
    model = resnet()
    second = {"crossnorm": "selfnorm", "selfnorm": "crossnorm"}[first]
    for method in (first, second):
        fxgraft.patch(model, method, **SMALL)
    calls: list[str] = []
    for graft in fxgraft.grafts(model):
        for unit in graft.units.values():
            forward, name = unit.forward, graft.name

            def spy(x: Any, forward: Any = forward, name: str = name) -> Any:
                calls.append(name)
                return forward(x)

            unit.forward = spy  # type: ignore[assignment]
    model.train()(torch.randn(2, 3, 64, 64))
    assert calls == ["crossnorm", "selfnorm"] * 8


def test_other_methods_keep_their_place() -> None:
    model = resnet()
    for method, options in (
        ("selfnorm", {"layers": "layer4.1.act2"}),
        ("rsc", {"layer": "layer4.1.act2"}),
        ("crossnorm", {"layers": "layer4.1.act2"}),
    ):
        fxgraft.patch(model, method, **options, **SMALL)
    units = model.layer4[1].act2._fxgraft.training.units
    assert [unit.graft for unit in units] == ["crossnorm", "rsc", "selfnorm"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = fxgraft.patch(resnet(), "selfnorm", gates=2, layers=("layer3", "layer4"), **SMALL)
    x = torch.randn(4, 3, 64, 64)
    model.train()(x)
    fxgraft.save(model, tmp_path)
    loaded = fxgraft.load(
        timm.create_model("resnet18", num_classes=4, channels=(8, 12, 16, 20), zero_init_last=False), tmp_path
    )
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.sweep
def test_taken_off_to_the_bit_in_either_order() -> None:
    bare = resnet()
    x = torch.randn(4, 3, 64, 64)
    expected = copy.deepcopy(bare).train()(x)
    for order in (("crossnorm", "selfnorm"), ("selfnorm", "crossnorm")):
        model = copy.deepcopy(bare)
        fxgraft.patch(model, "crossnorm", **SMALL)
        fxgraft.patch(model, "selfnorm", **SMALL)
        for name in order:
            fxgraft.unpatch(model, name)
        assert list(model.state_dict()) == list(bare.state_dict())
        assert type(model.layer1[0]) is type(bare.layer1[0])
        assert torch.equal(model.train()(x), expected)


@pytest.mark.sweep
def test_evaluation_exports_and_compiles() -> None:
    torch._dynamo.reset()
    model = fxgraft.patch(resnet(), "selfnorm", gates=2, **SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_units_take_the_dtype_of_their_model(dtype: torch.dtype) -> None:
    model = fxgraft.patch(resnet().to(dtype), "selfnorm", gates=2, **SMALL).train()
    assert {p.dtype for p in fxgraft.grafts(model)[0].parameters()} == {dtype}
    out = model(torch.randn(4, 3, 64, 64, dtype=dtype))
    assert out.dtype == dtype
    out.sum().backward()


def test_autocast() -> None:
    model = fxgraft.patch(resnet(), "selfnorm", gates=2, **SMALL).train()
    fxgraft.patch(model, "crossnorm", p=1.0, active=None, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fxgraft.loss(model, model(torch.randn(4, 3, 64, 64)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_merging_says_that_it_cannot() -> None:
    with pytest.raises(MergeError, match="acts in evaluation too"):
        fxgraft.merge(fxgraft.patch(resnet(), "selfnorm", **SMALL))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"gates": 3}, "gates must be one of 1, 2"), ({"init": "zero"}, "init must be one of")],
)
def test_errors(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SelfNorm(**options)


def test_channels_inside_a_convnext_block() -> None:
    model = timm.create_model("test_convnext", num_classes=4)
    fxgraft.patch(model, "selfnorm", layers="stages.0.blocks.0.mlp", input_size=(3, 64, 64))
    (unit,) = fxgraft.grafts(model)[0].units.values()
    assert unit.layout.name == "NHWC"  # type: ignore[union-attr]
    assert unit.g.mean_weight.shape == (24,)  # type: ignore[union-attr]
    model(torch.randn(2, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize(
    ("position", "left_out"), [("post", 2), ("pre", 1), ("residual", 2), ("identity", 2)]
)
def test_units_on_tokens_that_no_prediction_reads_are_left_out(position: Any, left_out: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4)
    fxgraft.patch(model, "selfnorm", position=position, init="authors")
    (graft,) = fxgraft.grafts(model)
    assert len(graft.units) == 2 * len(model.blocks) - left_out
    model.train()(torch.randn(3, 3, 160, 160)).square().sum().backward()
    assert all(each.grad.abs().max() > 0 for each in graft.parameters() if each.ndim)  # type: ignore[union-attr]


def test_a_block_behind_which_a_class_token_alone_is_read_is_refused() -> None:
    model = timm.create_model("test_vit", num_classes=4)
    with pytest.raises(
        fxgraft.SiteError, match=r"Nothing that happens at 'blocks.5.add_1' can change a prediction"
    ):
        fxgraft.patch(model, "selfnorm", layers="blocks.5")
    averaged = timm.create_model("test_vit", num_classes=4, global_pool="avg")
    assert len(fxgraft.grafts(fxgraft.patch(averaged, "selfnorm", layers="blocks.5"))[0].units) == 2
