"""Saving and loading: the round trip, resuming in another process, and what a recipe may not be."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxgraft
import recipes
from models.volumes import video_net

SIZE = (3, 24, 24)


class Net(nn.Module):
    """A small backbone with BatchNorm and dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.layer2(self.layer1(x)).mean((2, 3))))


class Other(Net):
    """The same tensors under another class."""


def net(seed: int = 0, width: int = 8, cls: type[Net] = Net) -> Net:
    torch.manual_seed(seed)
    return cls(width)


def patched(seed: int = 0) -> Net:
    model = net(seed)
    fxgraft.patch(model, "rsc", layer=["layer1", "layer2"], start=0.25, input_size=SIZE)
    fxgraft.patch(
        model, "rsc", layer="layer2.0", name="late", scope="channel", batch_share=0.5, input_size=SIZE
    )
    fxgraft.set_progress(model, 0.5)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(6, *SIZE, generator=g), torch.randint(5, (6,), generator=g)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, total: int) -> list[float]:
    losses = []
    for step in steps:
        fxgraft.set_progress(model, step / total)
        x, y = batch(step)
        loss = fxgraft.loss(model, model(x, target=y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def step_of(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    x, y = batch(0)
    out = model.train()(x, target=y)
    fxgraft.loss(model, out, y).backward()
    return [out.detach(), *(p.grad for p in model.parameters()), *model.state_dict().values()]


def bitwise(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def untouched(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether a model is bare, and its tensors are as they were."""
    same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return same and type(model) in (Net, Other) and not fxgraft.grafts(model)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


# --- the round trip


def test_round_trip(tmp_path: Path) -> None:
    model = patched()
    file = fxgraft.save(model, tmp_path / "deep" / "run.safetensors")
    assert list((tmp_path / "deep").iterdir()) == [file]

    bare = net(seed=1)
    loaded = fxgraft.load(bare, file)
    assert loaded is bare
    assert [(g.name, g.patch, g.input_size) for g in fxgraft.grafts(loaded)] == [
        (g.name, g.patch, g.input_size) for g in fxgraft.grafts(model)
    ]
    assert str(fxgraft.summary(loaded)) == str(fxgraft.summary(model))
    assert bitwise(step_of(loaded), step_of(model))
    fxgraft.unpatch(loaded)
    assert type(loaded) is Net


@pytest.mark.parametrize("place", ["folder", "name without suffix", "file"])
def test_a_folder_stands_for_the_file_in_it(tmp_path: Path, place: str) -> None:
    path = {"folder": tmp_path, "name without suffix": tmp_path / "run", "file": tmp_path / "a.safetensors"}[
        place
    ]
    file = fxgraft.save(patched(), path)
    assert file == (path if place == "file" else path / "fxgraft.safetensors")
    assert len(fxgraft.grafts(fxgraft.load(net(), path))) == 2
    assert len(fxgraft.grafts(fxgraft.load(str(path), model=net()))) == 2
    assert len(fxgraft.grafts(fxgraft.load(path=path, model=net()))) == 2


def test_the_weights_are_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    model = patched()
    assert bitwise(
        [value for _, value in sorted(load_file(fxgraft.save(model, tmp_path)).items())],
        [value for _, value in sorted(model.state_dict().items())],
    )


def test_the_recipe_is_data_that_a_person_can_read(tmp_path: Path) -> None:
    recipe, _ = recipes.read(fxgraft.save(patched(), tmp_path))
    assert (recipe["format"], recipe["version"]) == ("fxgraft-recipe", 2)
    assert recipe["progress"] == 0.5
    assert recipe["architecture"]["class"] == "Net"
    assert [g["name"] for g in recipe["grafts"]] == ["rsc", "late"]
    assert recipe["grafts"][0]["options"] == {"layers": ["layer1", "layer2"], "start": 0.25}
    assert recipe["grafts"][0]["input_size"] == list(SIZE)
    assert torch.__version__.startswith(recipe["versions"]["torch"])


def test_progress_is_part_of_it(tmp_path: Path) -> None:
    model = patched()
    fxgraft.set_progress(model, 0.1)  # before the start of "rsc"
    fxgraft.save(model, tmp_path)
    loaded = fxgraft.load(net(), tmp_path)
    units = [unit for graft in fxgraft.grafts(loaded) for unit in graft.units.values()]
    assert [unit.active for unit in units if hasattr(unit, "active")] == [False, False, True]


def test_without_weights_the_backbone_is_left_alone(tmp_path: Path) -> None:
    model = patched()
    file = fxgraft.save(model, tmp_path, weights=False)
    assert load_file(file) == {}  # RSC has no tensors of its own
    bare = net(seed=1)
    state = copied(bare)
    fxgraft.load(bare, tmp_path)
    assert len(fxgraft.grafts(bare)) == 2
    assert all(torch.equal(value, state[key]) for key, value in bare.state_dict().items())
    bare.load_state_dict(model.state_dict())
    assert bitwise(step_of(bare), step_of(model))


def test_saving_leaves_the_model_alone_and_replaces_an_earlier_file(tmp_path: Path) -> None:
    model = patched()
    state = copied(model)
    file = fxgraft.save(model, tmp_path)
    first = file.read_bytes()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    train(model, adam(model), range(1), 4)
    fxgraft.save(model, tmp_path)
    assert file.read_bytes() != first
    assert list(tmp_path.iterdir()) == [file]


def test_tied_and_strided_weights_survive(tmp_path: Path) -> None:
    model = patched().to(memory_format=torch.channels_last)
    model.layer1[1].bias = model.layer1[1].weight
    fxgraft.save(model, tmp_path)
    loaded = fxgraft.load(net(seed=1), tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.sweep
def test_resuming_in_a_new_process_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = patched()
    optimizer = adam(whole)
    torch.manual_seed(5)
    expected = train(whole, optimizer, range(6), 6)

    first = patched()
    optimizer = adam(first)
    torch.manual_seed(5)
    losses = train(first, optimizer, range(3), 6)
    fxgraft.save(first, tmp_path / "run")
    torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "rest.pt")

    here = Path(__file__).parents[2]
    code = (
        "import sys, json, torch; from pathlib import Path; import fxgraft; from unit.io import test_save_load as t\n"
        "torch.set_num_threads(1)\n"
        "folder = Path(sys.argv[1]); model = t.net(seed=9)\n"
        "fxgraft.load(model, folder / 'run'); optimizer = t.adam(model)\n"
        "rest = torch.load(folder / 'rest.pt'); optimizer.load_state_dict(rest['optimizer'])\n"
        "torch.set_rng_state(rest['rng'])\n"
        "print(json.dumps(t.train(model, optimizer, range(3, 6), 6)))\n"
        "torch.save(model.state_dict(), folder / 'end.pt')\n"
    )
    paths = f"import sys; sys.path[:0] = {[str(here), str(Path(fxgraft.__file__).parents[1])]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + code, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert losses + json.loads(done.stdout) == expected
    end = torch.load(tmp_path / "end.pt")
    for key, value in whole.state_dict().items():
        assert torch.equal(end[key], value), key


# --- what saving refuses


def test_a_bare_model_has_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(fxgraft.RecipeError, match="no graft on this Net, so there is no recipe"):
        fxgraft.save(net(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_of_clips(tmp_path: Path) -> None:
    size = (3, 4, 16, 16)
    fxgraft.save(fxgraft.patch(video_net(), "rsc", layer="layer1", input_size=size), tmp_path)
    loaded = fxgraft.load(video_net(), tmp_path)
    assert [graft.input_size for graft in fxgraft.grafts(loaded)] == [size]


def test_options_that_json_cannot_hold(tmp_path: Path) -> None:
    file = fxgraft.save(patched(), tmp_path)
    before = file.read_bytes()
    model = patched(seed=1)
    object.__setattr__(fxgraft.grafts(model)[0].patch, "output", {1, 2})
    with pytest.raises(fxgraft.RecipeError, match="an option that JSON cannot hold"):
        fxgraft.save(model, tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["run.pt", "run-1.5", "taken.safetensors"])
def test_names_that_say_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken.safetensors" / "fxgraft.safetensors").mkdir(parents=True)
    with pytest.raises(
        fxgraft.RecipeError, match=r"isn.t a name for a safetensors file\.\n.*\n.*\.safetensors, or pass"
    ):
        fxgraft.save(patched(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    file = fxgraft.save(patched(), tmp_path)
    before = file.read_bytes()
    other = patched(seed=1)
    fxgraft.set_progress(other, 0.9)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxgraft.io.save_load.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fxgraft.save(other, tmp_path)
    assert file.read_bytes() == before
    loaded = fxgraft.load(net(seed=2), tmp_path)
    assert bitwise(list(loaded.state_dict().values()), list(patched().state_dict().values()))


# --- what loading refuses


def edited(**changes: Any) -> Any:
    return lambda file: recipes.rewrite(file, **changes)


def graft(**changes: Any) -> Any:
    entry = {"name": "rsc", "method": "rsc", "options": {}, "input_size": list(SIZE), **changes}
    return edited(grafts=[entry], placements=[])


def cut(share: float) -> Any:
    def edit(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])

    return edit


def written(content: bytes) -> Any:
    return lambda file: file.write_bytes(content)


def weights(edit: Any, signed: bool = True) -> Any:
    def change(file: Path) -> None:
        recipe, tensors = recipes.read(file)
        recipes.write(file, recipe, edit(tensors), signed=signed)

    return change


def content(value: Any) -> Any:
    return lambda file: recipes.write(file, value, {})


REFUSED = {
    "cut in half": (cut(0.5), r"cannot be read: .*\n.*cut short"),
    "cut at its end": (cut(0.999), r"cannot be read: .*\n.*cut short"),
    "cut in its header": (cut(0.01), r"cannot be read: .*\n.*cut short"),
    "empty": (written(b""), "cannot be read"),
    "a zip": (written(b"PK\x03\x04 a zip"), "cannot be read"),
    "text": (written(b'{"model": "resnet18"}'), "cannot be read"),
    "weights alone": (
        lambda file: save_file({"a": torch.ones(2)}, file),
        r"There is no recipe in .*weights alone\.\n.*\n.*load_backbone",
    ),
    "foreign JSON": (content({"model": "resnet18"}), "isn't a recipe of fxgraft"),
    "foreign JSON list": (content([1, 2]), "isn't a recipe of fxgraft"),
    "gone": (lambda file: file.unlink(), "There is no recipe at .*: no such file"),
    "newer version": (edited(version=3), r"is of version 3; this fxgraft reads version 2.*\n.*\nUpgrade"),
    "no version": (edited(version=...), "is of version None"),
    "a bit flipped in its metadata": (
        lambda file: file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"qt"', 1)),
        "its metadata holds something other than the format and the recipe",
    ),
    "no digest": (lambda file: recipes.rewrite(file, sha256=..., signed=False), "its digest is missing"),
    "another recipe": (
        lambda file: recipes.rewrite(file, progress=0.6, signed=False),
        "that of another content",
    ),
    "other weights": (
        weights(lambda t: {**t, "fc.bias": t["fc.bias"] + 1}, signed=False),
        "that of another content",
    ),
    "other type of weights": (
        weights(lambda t: {**t, "fc.bias": t["fc.bias"].view(torch.int32)}, signed=False),
        "that of another content",
    ),
    "no grafts": (edited(grafts=...), "'grafts' is missing or of the wrong kind"),
    "grafts of a wrong kind": (edited(grafts={"rsc": {}}), "'grafts' is missing or of the wrong kind"),
    "graft of a wrong kind": (edited(grafts=["rsc"]), "a graft in it is not whole"),
    "graft without options": (graft(options=None), "a graft in it is not whole"),
    "progress of a wrong kind": (edited(progress="half"), "'progress' is missing or of the wrong kind"),
    "no architecture": (edited(architecture={}), "its architecture is not whole"),
    "no constructor": (edited(build=...), "does not say what made it"),
    "half a constructor": (edited(build={"library": "timm"}), "its constructor is not whole"),
    "foreign tensors": (weights(lambda t: {"a": torch.ones(2)}), "do not fit the recipe: .* tensors differ"),
    "a tensor missing": (
        weights(lambda t: {k: v for k, v in t.items() if k != "fc.bias"}),
        "the first is 'fc.bias'",
    ),
    "a tensor more": (weights(lambda t: {**t, "fc.more": torch.ones(2)}), "1 tensors differ.*'fc.more'"),
    "a tensor of another shape": (
        weights(lambda t: {**t, "fc.bias": torch.ones(6)}),
        "1 tensors differ, the first is 'fc.bias'",
    ),
    "unknown method": (graft(method="rcs"), "There is no method 'rcs'"),
    "unknown option": (graft(options={"laier": "layer1"}), "no option 'laier'"),
    "option out of range": (graft(options={"spatial_drop": 7}), "spatial_drop must be a share"),
    "unknown layer": (graft(options={"layer": "layer7"}), "There is no site 'layer7'"),
    "a name that is none": (graft(name="a b"), "not named once each"),
    "a name given twice": (
        edited(
            grafts=[{"name": "a", "method": "rsc", "options": {"layer": x}} for x in ("layer1", "layer2")],
            placements=[],
        ),
        "not named once each",
    ),
}


@pytest.mark.parametrize(("damage", "match"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_file_leaves_the_model_alone(tmp_path: Path, damage: Any, match: str) -> None:
    damage(fxgraft.save(patched(), tmp_path))
    model = net(seed=1)
    model.layer1[1].eval()
    flags = [m.training for m in model.modules()]
    state = copied(model)
    with pytest.raises(fxgraft.FxgraftError, match=match):
        fxgraft.load(model, tmp_path)
    assert untouched(model, state)
    assert [m.training for m in model.modules()] == flags
    assert all("_fxgraft" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_with_the_file_is_a_recipe_error(tmp_path: Path, name: str) -> None:
    damage, _ = REFUSED[name]
    damage(fxgraft.save(patched(), tmp_path))
    with pytest.raises(fxgraft.RecipeError):
        fxgraft.load(net(), tmp_path)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (net(cls=Other), "another architecture: Net, not Other"),
        (net(width=6), "a Net with other layers or sizes"),
        (nn.Sequential(net()), "Net, not Sequential"),
    ],
    ids=["class", "sizes", "wrapped"],
)
def test_another_architecture(tmp_path: Path, model: nn.Module, match: str) -> None:
    fxgraft.save(patched(), tmp_path)
    cls, state = type(model), copied(model)
    with pytest.raises(fxgraft.RecipeError, match=match):
        fxgraft.load(model, tmp_path)
    assert type(model) is cls
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_patched_model_is_not_loaded_into(tmp_path: Path) -> None:
    fxgraft.save(patched(), tmp_path)
    model = net(seed=1)
    fxgraft.patch(model, "rsc", layer="layer1", input_size=SIZE)
    with pytest.raises(fxgraft.RecipeError, match=r"patched already.*\n.*unpatch"):
        fxgraft.load(model, tmp_path)
    assert [g.patch.layer for g in fxgraft.grafts(model)] == ["layer1"]
    fxgraft.load(fxgraft.unpatch(model), tmp_path)
    assert len(fxgraft.grafts(model)) == 2


FORMER = Path(__file__).parent / "former_recipe"


def test_a_folder_of_a_development_version_loads_with_a_note(tmp_path: Path) -> None:
    with pytest.warns(
        fxgraft.FxgraftWarning, match=r"a folder of a development version.*\n.*\nSave the model again"
    ):
        loaded = fxgraft.load(net(seed=1), FORMER)
    assert bitwise(step_of(loaded), step_of(patched()))
    fxgraft.save(loaded, tmp_path)
    fxgraft.load(net(seed=1), tmp_path)
    with (
        pytest.warns(fxgraft.FxgraftWarning, match="a folder of a development version"),
        pytest.raises(fxgraft.RecipeError, match=r"does not say how its Net was made.*\n.*\nPass it"),
    ):
        fxgraft.load(FORMER)


def without(key: str) -> Any:
    def edit(folder: Path) -> None:
        recipe = json.loads((folder / "recipe.json").read_text())
        del recipe[key]
        (folder / "recipe.json").write_text(json.dumps(recipe))

    return edit


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, folder / "weights.safetensors")


FORMER_REFUSED = {
    "no digests": (without("sha256"), "its digests are missing"),
    "no version": (without("version"), "is of version None; this fxgraft reads version 1"),
    "another recipe": (without("versions"), "those of another content"),
    "other weights": (other_weights, "those of another content or other weights"),
    "no weights": (
        lambda folder: (folder / "weights.safetensors").unlink(),
        "cannot be read: .*No such file",
    ),
    "half a recipe": (
        lambda folder: (folder / "recipe.json").write_text('{"format'),
        "its recipe isn't JSON",
    ),
}


@pytest.mark.parametrize(("damage", "match"), FORMER_REFUSED.values(), ids=FORMER_REFUSED)
def test_a_damaged_folder_of_a_development_version(tmp_path: Path, damage: Any, match: str) -> None:
    shutil.copytree(FORMER, tmp_path / "run")
    damage(tmp_path / "run")
    model = net(seed=1)
    state = copied(model)
    with pytest.raises(fxgraft.RecipeError, match=match):
        fxgraft.load(model, tmp_path / "run")
    assert untouched(model, state)


@pytest.mark.parametrize("path", [None, 3, "a\0b", "x" * 5000], ids=["none", "number", "zero byte", "long"])
def test_what_no_system_calls_a_file(path: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fxgraft.RecipeError, match="cannot be the path of a file"):
        fxgraft.save(patched(), path)
    if isinstance(path, str):
        with pytest.raises(fxgraft.RecipeError, match="cannot be the path of a file"):
            fxgraft.load(path)


def test_the_users_home_and_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fxgraft.save(patched(), "~/run.safetensors") == tmp_path / "run.safetensors"
    assert fxgraft.grafts(fxgraft.load("~/run.safetensors", net()))
    with pytest.raises(fxgraft.RecipeError, match=r"an address of the hub(.|\n)*push_to_hub"):
        fxgraft.save(patched(), "hf-hub:me/run")


def test_what_is_no_path() -> None:
    with pytest.raises(
        fxgraft.RecipeError, match=r"reads a file, and got None\.\nPass what fxgraft.save returned"
    ):
        fxgraft.load(net())


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(fxgraft.RecipeError, match="There is no recipe at"):
        fxgraft.load(net(), tmp_path / "nowhere")


def test_the_same_model_makes_the_same_bytes(tmp_path: Path) -> None:
    """safetensors hashes the entries of its metadata with another seed for each file."""
    model = fxgraft.patch(net(), "rsc")
    contents = {fxgraft.save(model, tmp_path / f"{n}.safetensors").read_bytes() for n in range(8)}
    assert len(contents) == 1


def test_a_part_that_another_patched_model_has_as_well(tmp_path: Path) -> None:
    other, model = fxgraft.patch(net(), "selfnorm"), net()
    model.layer2 = other.layer2
    fxgraft.patch(model, "rsc", layer="layer1")
    with pytest.raises(fxgraft.RecipeError, match="belongs to a graft of another model"):
        fxgraft.save(model, tmp_path / "run.safetensors")


def test_a_failed_load_leaves_parts_of_other_models_as_they_were(tmp_path: Path, monkeypatch: Any) -> None:
    file = fxgraft.save(patched(), tmp_path / "run.safetensors")
    model = net()
    model.layer2 = copy.deepcopy(fxgraft.patch(net(), "rsc", layer="layer2").layer2)
    kind = [type(module) for module in model.modules()]
    monkeypatch.setattr("fxgraft.io.save_load._load_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fxgraft.load(file, model)
    assert [type(module) for module in model.modules()] == kind


def test_models_without_memory(tmp_path: Path) -> None:
    file = fxgraft.save(
        fxgraft.patch(timm.create_model("test_resnet"), "selfnorm"), tmp_path / "run.safetensors"
    )
    before = file.read_bytes()
    with torch.device("meta"):
        empty = timm.create_model("test_resnet")
    with pytest.raises(fxgraft.RecipeError, match="tensors of this ResNet are on the device 'meta'"):
        fxgraft.load(file, model=empty)
    assert not fxgraft.grafts(empty)
    with pytest.raises(fxgraft.RecipeError, match=r"device 'meta'(?s:.*)model\.to_empty"):
        fxgraft.save(fxgraft.patch(empty, "rsc"), file)
    assert file.read_bytes() == before
    fxgraft.load(file, model=fxgraft.unpatch(empty).to_empty(device="cpu"))


def test_a_model_that_was_built_otherwise(tmp_path: Path) -> None:
    def built(**options: Any) -> nn.Module:
        return timm.create_model("test_resnet", num_classes=5, **options)

    file = fxgraft.save(fxgraft.patch(built(global_pool="max"), "dsu"), tmp_path / "run.safetensors")
    with pytest.warns(
        fxgraft.FxgraftWarning, match=r"global_pool='max'.*differs from it in .*'global_pool\.pool'"
    ):
        fxgraft.load(file, model=built())
    other = built(global_pool="max")
    other.bn1.eps = 0.1
    with pytest.warns(fxgraft.FxgraftWarning, match=r"differs from it in the attribute 'bn1\.eps'"):
        fxgraft.load(file, model=other)
    same = built(global_pool="max")
    same.register_forward_hook(lambda module, args, out: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxgraft.load(file, model=same)
