"""Libraries that build layers of a layer's class and wrap layers: peft's LoRA before and after a patch, and copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxgraft
from models.toys import LABELS, Net, images, net

peft = pytest.importorskip("peft")
SIZE = (3, 8, 8)


def by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def by_torch(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "torch.save": by_torch}


# A grafted class without a graft.


def grafted_conv() -> type[nn.Module]:
    return type(fxgraft.patch(net(), "taps", layers="down", input_size=SIZE).down)


def without_state() -> nn.Module:
    module = nn.Conv2d(3, 4, 3)
    module.__class__ = grafted_conv()
    return module


MADE: dict[str, Callable[[], nn.Module]] = {
    "called": lambda: grafted_conv()(3, 4, 3),
    "by name": lambda: grafted_conv()(in_channels=3, out_channels=4, kernel_size=3),
    "class set": without_state,
    "subclass": lambda: type("Mine", (grafted_conv(),), {})(3, 4, 3),
}


@pytest.mark.parametrize("made", MADE)
def test_an_instance_without_a_graft_is_one_of_its_base(made: str) -> None:
    module, bare = MADE[made](), nn.Conv2d(3, 4, 3)
    assert isinstance(module, nn.Conv2d)
    bare.load_state_dict(module.state_dict())
    expected = bare(images())
    assert isinstance(module._replicate_for_data_parallel(), nn.Conv2d)
    copies = [module, copy.copy(module), copy.deepcopy(module)]
    if made != "subclass":  # which has no name to be found by
        copies += [by_pickle(module), by_torch(module)]
        assert type(copies[-1]) is nn.Conv2d
        assert repr(module) == repr(bare)
    for each in copies:
        assert torch.equal(each(images()), expected)
    assert list(nn.Sequential(module).state_dict()) == ["0.weight", "0.bias"]


def test_the_class_of_a_patched_model_makes_bare_models() -> None:
    model = fxgraft.patch(Net(), "rsc", layer="stage2", input_size=SIZE)
    for other in (type(model)(channels=8), type(model)()):
        assert fxgraft.grafts(other) == []
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(images()), model.eval()(images()))
        assert torch.equal(other.forward_features(images()), model.forward_features(images()))
        assert "grafted" not in repr(other)
        assert torch.equal(
            fxgraft.patch(other, "taps", layers="stage2", input_size=SIZE)(images()), model(images())
        )


def test_a_part_that_holds_on_to_the_model_is_copied_with_it() -> None:
    model = fxgraft.patch(net(), "rsc", layer="stage2", input_size=SIZE)
    model.stem.__dict__["root"] = model
    for do in COPIES.values():
        twin = do(model)
        assert twin.stem.root is twin
        assert twin(images(), target=LABELS).shape == (4, 4)


def test_a_wrapper_that_hands_attributes_on_is_copied_and_looked_at_as_itself() -> None:
    class Forwards(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model = Forwards(fxgraft.patch(net(), "selfnorm", input_size=SIZE)).eval()
    twin = copy.deepcopy(model)
    assert type(twin) is Forwards
    expected = model(images())
    assert torch.equal(twin(images()), expected)
    fxgraft.patch(model, "taps", layers="inner.stage1", input_size=SIZE)
    assert torch.equal(model(images()), expected)


# LoRA.

CONVS = ["stage1.0.conv1", "stage2.1.conv2"]
METHODS: dict[str, dict[str, Any]] = {
    "selfnorm": {},
    "crossnorm": {"p": 1.0},
    "rsc": {"layer": "stage2"},
    "mixmo": {},
    "diversification": {"patch": 1},
    "taps": {"layers": ["stage1.0.conv1", "down"]},
}


def adapted(method: str, first: str, targets: list[str] = CONVS) -> tuple[nn.Module, Any]:
    """A patched network with adapters, and the wrapper around it."""
    model = net()
    for each in ("patch", "peft") if first == "patch" else ("peft", "patch"):
        if each == "patch":
            fxgraft.patch(model, method, input_size=SIZE, **METHODS[method])
        else:
            wrapper = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    return wrapper.base_model.model, wrapper


def placed(model: nn.Module) -> list[Any]:
    return [(g.name, sorted(g.units)) for g in fxgraft.grafts(model)]


@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_copies_of_a_patched_model_with_adapters_have_its_placements(method: str, first: str) -> None:
    model, wrapper = adapted(method, first)
    wrapper.train()
    out = wrapper(images(), target=LABELS)
    fxgraft.loss(wrapper, out, LABELS).backward()
    assert all(p.grad is not None for n, p in wrapper.named_parameters() if "lora_A" in n)
    keys, expected, units = list(model.state_dict()), wrapper.eval()(images()), placed(model)
    random = torch.get_rng_state()
    for do in COPIES.values():
        twin = do(wrapper)
        assert type(twin) is type(wrapper)
        inner = twin.base_model.model
        assert list(inner.state_dict()) == keys
        assert placed(inner) == units
        assert torch.equal(twin(images()), expected)
        assert torch.equal(do(model)(images()), expected)
    assert torch.equal(random, torch.get_rng_state())
    bare = copy.deepcopy(wrapper)
    fxgraft.unpatch(bare.base_model.model)
    assert set(bare.base_model.model.state_dict()) <= set(keys)


@pytest.mark.parametrize("method", ["selfnorm", "mixmo", "rsc"])
def test_adapters_merged_unmerged_and_taken_off(method: str) -> None:
    model, wrapper = adapted(method, "patch")
    wrapper.eval()
    expected, units = wrapper(images()), placed(model)
    wrapper.merge_adapter()
    torch.testing.assert_close(wrapper(images()), expected)
    torch.testing.assert_close(copy.deepcopy(wrapper)(images()), expected)
    wrapper.unmerge_adapter()
    torch.testing.assert_close(wrapper(images()), expected)
    plain = wrapper.merge_and_unload()
    torch.testing.assert_close(plain(images()), expected)
    assert placed(plain) == units
    assert not any("lora" in key for key in plain.state_dict())
    assert torch.equal(copy.deepcopy(plain)(images()), plain(images()))


@pytest.mark.parametrize("method", ["selfnorm", "mixmo"])
def test_a_saved_recipe_repeats_the_placements(method: str, tmp_path: Path) -> None:
    model, wrapper = adapted(method, "patch")
    fxgraft.save(model, tmp_path / "saved")
    other = net()
    again = peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=CONVS))
    fxgraft.load(other, tmp_path / "saved")
    assert placed(other) == placed(model)
    assert torch.equal(again.eval()(images()), wrapper.eval()(images()))


def test_peft_saves_and_loads_the_adapters_of_a_patched_model(tmp_path: Path) -> None:
    model, wrapper = adapted("selfnorm", "patch")
    wrapper.save_pretrained(tmp_path)
    other = fxgraft.patch(net(), "selfnorm", input_size=SIZE)
    other.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora" not in k}
    )
    again = peft.PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(again.eval()(images()), wrapper.eval()(images()))


def test_a_copy_repeats_what_planning_would_place_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a method would choose now, a copy has what its original has."""
    model = fxgraft.patch(net(), "crossnorm", p=1.0, input_size=SIZE)
    fxgraft.patch(model, "selfnorm", layers=["stage1"], input_size=SIZE)
    folder = fxgraft.save(model, tmp_path / "saved")
    units = placed(model)
    own = fxgraft.extend.Backbone.positions

    def positions(self: Any, position: Any = None, layers: Any = None) -> Any:
        return own(self, position, None)  # of all blocks

    monkeypatch.setattr(fxgraft.extend.Backbone, "positions", positions)
    random = torch.get_rng_state()
    for twin in (copy.deepcopy(model), by_torch(model), fxgraft.load(net(), folder)):
        assert placed(twin) == units
        assert list(twin.state_dict()) == list(model.state_dict())
        (crossnorm, _) = fxgraft.grafts(twin)
        assert {unit.count for unit in crossnorm.units.values()} == {4}
    assert torch.equal(random, torch.get_rng_state())
