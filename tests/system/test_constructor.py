"""Which constructor made a model: found where it can be proved, written down, and called by `fxgraft.load`."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import fxgraft
import my_models
import recipes
from fxgraft.io.constructor import Constructor, constructor_of, given_constructor
from sweeping import some

SIZE = (3, 32, 32)


def timm_with_other_head() -> nn.Module:
    model = timm.create_model("test_resnet", drop_path_rate=0.2, in_chans=3)
    model.fc = nn.Linear(model.num_features, 7)
    return model


def timm_with_notes() -> nn.Module:
    """Trainers note things on models, which their classes do not read."""
    model = timm.create_model("test_resnet", num_classes=4)
    model._is_accelerate_prepared = True
    return model


def timm_changed_since() -> nn.Module:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    model.set_grad_checkpointing(True)
    model.blocks[0].norm1.eps = 0.5
    model.head_drop.p = 0.25
    return model


def torchvision_with_other_head() -> nn.Module:
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(512, 7)
    model.maxpool.stride = 1
    return model


def from_transformers() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


BUILT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm": (lambda: timm.create_model("test_resnet", num_classes=4), "timm"),
    "timm, another head": (timm_with_other_head, "timm"),
    "timm, changed since": (timm_changed_since, "timm"),
    "timm, with notes": (timm_with_notes, "timm"),
    "timm, other arguments": (
        lambda: timm.create_model("test_resnet", in_chans=1, output_stride=16, global_pool="max"),
        "timm",
    ),
    "torchvision": (lambda: torchvision.models.mobilenet_v2(num_classes=3), "torchvision"),
    "torchvision, another head": (torchvision_with_other_head, "torchvision"),
    "transformers": (from_transformers, "transformers"),
}


def outputs(model: nn.Module, channels: int = 3) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        out = model.eval()(torch.randn(2, channels, 32, 32))
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("what", BUILT)
def test_a_saved_model_is_made_again(tmp_path: Path, what: str) -> None:
    make, library = BUILT[what]
    model = make()
    channels = getattr(model, "in_chans", 3)
    layer = {"transformers": "resnet.encoder.stages.1", "timm, changed since": "blocks.1"}.get(
        what, "features.3" if "mobilenet" in type(model).__name__.lower() else "layer2"
    )
    # Of the model itself: a copy of some models shares parts with it.
    fxgraft.patch(model, "selfnorm", layer=layer, position="output", input_size=(channels, 32, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    file = fxgraft.save(model, tmp_path)
    assert recipes.read(file)[0]["build"]["library"] == library
    random = torch.get_rng_state()
    loaded = fxgraft.load(file)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(outputs(loaded, channels), outputs(model, channels))
    assert [str(m) for m in fxgraft.unpatch(loaded).modules()] == [
        str(m) for m in fxgraft.unpatch(model).modules()
    ]
    again = constructor_of(loaded)
    assert isinstance(again, Constructor)
    assert again == constructor_of(model)


@pytest.mark.parametrize("method", some([m for m, cls in fxgraft.methods().items() if cls.saves], 2))
def test_grafts_are_no_part_of_it(method: str) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    bare = constructor_of(model)
    fxgraft.patch(model, method, **fxgraft.methods()[method].example)
    assert isinstance(bare, Constructor)
    assert constructor_of(model) == bare


def test_types_of_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    model = fxgraft.patch(timm.create_model("test_resnet").bfloat16(), "rsc")
    model.bn1.float()
    loaded = fxgraft.load(fxgraft.save(model, tmp_path))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }


def changed_layer(model: nn.Module) -> None:
    model.layer1[0].conv1 = nn.Conv2d(32, 32, 5, padding=2, bias=False)


def hooked(model: nn.Module) -> None:
    model.layer1.register_forward_hook(lambda *_: None)


def of_another_class(model: nn.Module) -> None:
    class Act(nn.ReLU):
        pass

    model.act1 = Act(inplace=True)


def other_forward(model: nn.Module) -> None:
    model.layer1.forward = lambda x: x  # type: ignore[method-assign]


def tied(model: nn.Module) -> None:
    model.layer1[0].bn2 = model.layer1[0].bn1


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.fc)


UNKNOWN: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a layer": (changed_layer, "layer1.0.conv1"),
    "a hook": (hooked, "forward_hooks on 'layer1'"),
    "a class": (of_another_class, "the class of 'act1'"),
    "a forward": (other_forward, "the attribute 'layer1.forward'"),
    "a module more": (lambda m: m.add_module("more", nn.ReLU()), "the module 'more'"),
    "tied layers": (tied, "the sharing of 'layer1.0.bn2'"),
    "a parametrization": (parametrized, "parametrizations"),
    "an attribute less": (lambda m: delattr(m, "head_hidden_size"), "the attribute 'head_hidden_size'"),
    "a network in an attribute": (lambda m: m.__dict__.update(teacher=nn.ReLU()), "the attribute 'teacher'"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_cannot_be_proved_is_said(tmp_path: Path, what: str) -> None:
    change, difference = UNKNOWN[what]
    model = timm.create_model("test_resnet", num_classes=4)
    change(model)
    fxgraft.patch(model, "rsc", layer="layer3")
    file = fxgraft.save(model, tmp_path)
    with pytest.raises(fxgraft.RecipeError, match=r"does not say how its \w+ was made") as raised:
        fxgraft.load(file)
    assert difference in str(raised.value)
    assert "model=model" in str(raised.value)


def own(width: int = 4) -> nn.Module:
    return fxgraft.patch(my_models.build(width), "rsc", layer="layer1", input_size=SIZE)


PYTHON = {"library": "python", "name": "my_models:build", "options": {"width": 6}}


@pytest.mark.parametrize("name", ["build", "computing"])
def test_a_function_of_ones_own(tmp_path: Path, name: str) -> None:
    model = own(6)
    model.drop.p = 0.5
    file = fxgraft.save(model, tmp_path, build={**PYTHON, "name": f"my_models:{name}"})
    with pytest.raises(fxgraft.RecipeError, match=r"which code runs here\.\n.*\nPass trust=True.*my_models"):
        fxgraft.load(file)
    loaded = fxgraft.load(file, trust=True)
    assert loaded.drop.p == 0.5
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            {**PYTHON, "options": {"width": 5}},
            "differs from it in the tensor 'fc.weight', the tensor 'layer1.0",
        ),
        ({**PYTHON, "options": {"wide": 5}}, "unexpected keyword argument 'wide'"),
        ({**PYTHON, "options": {"width": my_models}}, "JSON cannot hold its arguments"),
        ({**PYTHON, "name": "my_models:nothing", "options": {}}, "returned a NoneType"),
        ({**PYTHON, "name": "my_models:gone"}, "Cannot import 'my_models:gone'"),
        ({**PYTHON, "name": "not_there:build"}, "No module named 'not_there'"),
        (
            {**PYTHON, "name": "__main__:build"},
            r"where another process would not find it\.\nMove the function",
        ),
        ({"library": "timm", "name": "test_resnet"}, "does not make this model: .*the module"),
        ({"library": "timm", "name": "resnet999"}, "has no model 'resnet999'"),
        (
            {"library": "timm", "name": "test_resnet", "options": {"checkpoint_path": "a.pt"}},
            "'checkpoint_path' is about weights",
        ),
        ({"library": "torchvision", "name": "resnet999"}, "torchvision has no model 'resnet999'"),
        ({"library": "keras", "name": "a"}, r"does not\.\nIt has .library. \(timm, torchvision"),
        ("my_models:build", r"does not\.\nIt has .library."),
    ],
)
def test_what_a_user_says_is_checked(tmp_path: Path, build: Any, match: str) -> None:
    model = own(6)
    with pytest.raises(fxgraft.ConfigError, match=match):
        fxgraft.save(model, tmp_path / "run.safetensors", build=build)
    assert list(tmp_path.iterdir()) == []


def test_an_attribute_that_the_class_reads_is_none_of_them(tmp_path: Path) -> None:
    model = fxgraft.patch(my_models.Reads(4), "rsc", layer="layer1", input_size=SIZE)
    build = {"library": "python", "name": "my_models:Reads", "options": {"width": 4}}
    fxgraft.save(model, tmp_path, build=build)
    model._note = 2.0
    fxgraft.save(model, tmp_path, build=build)
    model.note = 2.0  # under a name that any code may read
    with pytest.raises(fxgraft.ConfigError, match="differs from it in the attribute 'note'"):
        fxgraft.save(model, tmp_path, build=build)
    del model.note
    model.scale = 2.0
    with pytest.raises(fxgraft.ConfigError, match="differs from it in the attribute 'scale'"):
        fxgraft.save(model, tmp_path, build=build)


def test_what_a_user_says_of_a_library(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", output_stride=16)
    del model._model_args  # older releases of timm do not note it
    fxgraft.patch(model, "rsc")
    with pytest.raises(fxgraft.RecipeError, match="differs from it in"):
        fxgraft.load(fxgraft.save(model, tmp_path))
    build = {"library": "timm", "name": "test_resnet", "options": {"output_stride": 16}}
    loaded = fxgraft.load(fxgraft.save(model, tmp_path, build=build))
    assert torch.equal(outputs(loaded), outputs(model))


def test_weights_of_grafts_alone_make_no_model(tmp_path: Path) -> None:
    model = fxgraft.patch(timm.create_model("test_resnet"), "selfnorm")
    file = fxgraft.save(model, tmp_path, weights=False)
    with pytest.raises(
        fxgraft.RecipeError, match=r"weights of the grafts alone.*\n.*start at random\.\n.*model=model"
    ):
        fxgraft.load(file)
    fxgraft.load(file, model=timm.create_model("test_resnet"))


MADE = Constructor("timm", "test_resnet", {"num_classes": 4}).as_data()
FAILS: dict[str, tuple[dict[str, Any], str]] = {
    "not installed": (
        {"library": "python", "name": "not_there:build"},
        r"cannot be imported.*\n.*\nInstall it",
    ),
    "unknown here": (
        {"name": "resnet999"},
        r"timm .* has no model 'resnet999'.*\n.*another version.*\n.*model=",
    ),
    "a hub": ({"name": "hf-hub:owner/model"}, "has no model 'hf-hub:owner/model'"),
    "a folder": ({"name": "local-dir:/tmp"}, "has no model 'local-dir:/tmp'"),
    "a checkpoint": ({"options": {"checkpoint_path": "/tmp/a.pt"}}, "'checkpoint_path' is about weights"),
    "unknown argument": ({"options": {"depht": 4}}, r"fails here: .*depht"),
    "other sizes": (
        {"options": {"num_classes": 5}},
        r"made for another architecture.*\n.*timm .*\n.*num_classes=5",
    ),
    "another class": ({"name": "test_vit"}, "made for another architecture"),
    "a setting that is none": (
        {"settings": {"layer1": {"width": 4}}},
        "makes no module 'layer1' with an attribute",
    ),
    "a module that is none": ({"settings": {"layer9": {"p": 4}}}, "makes no module 'layer9'"),
    "a hidden setting": ({"settings": {"": {"_modules": 4}}}, "entry of the wrong kind"),
    "a setting of another kind": ({"settings": {"": {"drop_rate": {}}}}, "entry of the wrong kind"),
    "no library": ({"library": "keras"}, "entry of the wrong kind"),
    "a class of transformers that isn't a model": (
        {"library": "transformers", "name": "Trainer"},
        "has no model",
    ),
}


@pytest.mark.parametrize("what", FAILS)
def test_a_recipe_whose_constructor_fails(tmp_path: Path, what: str) -> None:
    changes, match = FAILS[what]
    file = fxgraft.save(fxgraft.patch(timm.create_model("test_resnet", num_classes=4), "rsc"), tmp_path)
    recipes.rewrite(file, build={**MADE, **changes})
    with pytest.raises(fxgraft.RecipeError, match=match):
        fxgraft.load(file, trust=True)


def test_nothing_is_imported_without_trust(tmp_path: Path) -> None:
    file = fxgraft.save(own(6), tmp_path, build=PYTHON)
    recipes.rewrite(file, build={**Constructor("python", "antigravity:build").as_data()})
    with pytest.raises(fxgraft.RecipeError, match="which code runs here"):
        fxgraft.load(file)
    assert "antigravity" not in sys.modules


def test_a_model_is_looked_at_and_left_alone() -> None:
    model = timm_with_other_head()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parts = [(name, id(part)) for name, part in [*model.named_modules(), *model.named_parameters()]]
    constructor_of(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert parts == [(name, id(part)) for name, part in [*model.named_modules(), *model.named_parameters()]]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Tanh()
        self.fc = nn.Linear(4, 2)
        self.chosen, self.act = [self.first], self.first.forward
        self.scale = torch.ones(1)
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.chosen[0](self.conv(x)) * self.scale + self.shift
        return self.fc(self.act(x).mean((2, 3))) * getattr(self.fc, "temperature", 1.0)


CHANGES: dict[str, Callable[[_Parts], object]] = {
    "the numbers of scale": lambda m: m.scale.fill_(2.0),
    "the numbers of shift": lambda m: m.shift.fill_(2.0),
    "the attribute 'fc.temperature'": lambda m: setattr(m.fc, "temperature", 3.0),
    "the attribute 'act'": lambda m: setattr(m, "act", m.second.forward),
    "the attribute 'chosen'": lambda m: m.chosen.__setitem__(0, m.second),
    "forward_hooks on ''": lambda m: m.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("difference", CHANGES)
def test_what_a_constructor_does_not_make_is_found(difference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("my_models.parts", _Parts, raising=False)
    model = _Parts()
    assert isinstance(given_constructor({"library": "python", "name": "my_models:parts"}, model), Constructor)
    CHANGES[difference](model)
    with pytest.raises(fxgraft.ConfigError, match=f"differs from it in {re.escape(difference)}"):
        given_constructor({"library": "python", "name": "my_models:parts"}, model)


def test_grafts_of_a_part_are_no_business_of_a_recipe(tmp_path: Path) -> None:
    model = nn.Sequential(fxgraft.patch(timm.create_model("test_resnet", num_classes=4), "selfnorm"))
    fxgraft.patch(model, "taps", layers=["0.layer1"], input_size=(3, 64, 64))
    with pytest.raises(
        fxgraft.RecipeError, match=r"have grafts of their own: '0'(?s:.*)merge the parts first"
    ):
        fxgraft.save(model, tmp_path / "run.safetensors")
