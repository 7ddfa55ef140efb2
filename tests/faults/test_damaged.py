"""Folders that were damaged, cut off or made up: an error of its own, in little time, and an untouched model."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxgraft
from faults.lines import SIZE, bare, nothing_else_changes
from toys import assert_same, net, state_of_everything


def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return fxgraft.save(fxgraft.patch(bare(), "selfnorm", input_size=SIZE), tmp_path / "saved")


def refuses(folder: Path) -> None:
    model = bare()
    before = state_of_everything(model)
    start = time.monotonic()
    with pytest.raises(fxgraft.RecipeError):
        fxgraft.load(model, folder)
    assert time.monotonic() - start < 20
    assert_same(before, state_of_everything(model))


def rewritten(folder: Path, **changes: Any) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    del recipe["sha256"]
    (folder / "recipe.json").write_text(json.dumps({**recipe, **changes}))


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_between_its_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    folder = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = fxgraft.patch(bare(), "selfnorm", input_size=SIZE)
    replace = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith("recipe.json.part"):
            raise failure
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(failure):
        fxgraft.save(other, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_save_that_is_killed_between_its_moves_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    other = fxgraft.save(fxgraft.patch(net(), "selfnorm", input_size=SIZE), tmp_path / "other")
    (other / "weights.safetensors").replace(folder / "weights.safetensors")
    refuses(folder)
    rewritten(folder)  # a recipe of an earlier release, without digests
    fxgraft.load(bare(), folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    whole_file = (folder / name).read_bytes()
    content = json.loads((folder / "recipe.json").read_text())
    chance = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole_file)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            same = name == "recipe.json" and json.loads(damaged) == content  # blanks between entries
        except ValueError:
            same = False
        if not same:
            refuses(folder)


GRAFT = {"name": "mixmo", "method": "mixmo", "options": {}, "input_size": list(SIZE)}
MALFORMED: dict[str, dict[str, Any]] = {
    "size": {"grafts": [{**GRAFT, "input_size": 5}]},
    "size of text": {"grafts": [{**GRAFT, "input_size": ["a", 1, 2]}]},
    "huge size": {"grafts": [{**GRAFT, "input_size": [3, 10**18, 8]}]},
    "head": {"grafts": [{**GRAFT, "method": "diversification", "options": {"head": {"a": [1]}}}]},
    "head of numbers": {"grafts": [{**GRAFT, "method": "diversification", "options": {"head": [3, None]}}]},
    "progress": {"progress": float("nan")},
    "progress outside": {"progress": 1.5},
    "progress that is none": {"progress": True},
    "huge count": {"grafts": [{**GRAFT, "options": {"members": 10**19}}]},
    "large count": {"grafts": [{**GRAFT, "options": {"members": 10**6}}]},
    "count of text": {"grafts": [{**GRAFT, "options": {"members": "2"}}]},
    "huge float": {"grafts": [{**GRAFT, "options": {"p": 1e308}}]},
    "options in options": {"grafts": [{**GRAFT, "method": "rsc", "options": {"layer": {"a": 1}}}]},
    "unknown entry": {"verison": 1},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_recipe(tmp_path: Path, case: str) -> None:
    folder = saved(tmp_path)
    rewritten(folder, **MALFORMED[case])
    refuses(folder)


def test_a_deeply_nested_recipe(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "recipe.json").write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")
    refuses(folder)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_load_that_fails_half_way_in(tmp_path: Path, error: BaseException) -> None:
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            raise error

    folder = saved(tmp_path)
    model = bare()
    with torch.no_grad():
        model.stem.first.weight.add_(1)
    model.fc.__class__ = Refuses
    before = state_of_everything(model)
    with pytest.raises(fxgraft.RecipeError if isinstance(error, RuntimeError) else type(error)):
        fxgraft.load(model, folder)
    assert_same(before, state_of_everything(model))


@pytest.mark.parametrize("act", ["sites", "dry run", "load"])
def test_looking_draws_nothing_and_fires_no_hook(tmp_path: Path, act: str) -> None:
    folder = saved(tmp_path)
    model = bare()
    fired: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    with nothing_else_changes():
        if act == "sites":
            fxgraft.sites(model, input_size=SIZE)
        elif act == "load":
            fxgraft.load(model, folder)
        else:
            for method, cls in fxgraft.methods().items():
                with contextlib.suppress(fxgraft.FxgraftError):  # not every method fits every network
                    fxgraft.patch(model, method, dry_run=True, input_size=SIZE, **cls.example)
    assert fired == []
