"""Files that were damaged, cut off or made up: an error of its own, in little time, and an untouched model."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxgraft
import recipes
from models.toys import assert_same, state_of_everything
from system.faults.lines import SIZE, bare, nothing_else_changes


def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return fxgraft.save(fxgraft.patch(bare(), "selfnorm", input_size=SIZE), tmp_path / "saved.safetensors")


def refuses(file: Path) -> None:
    model = bare()
    before = state_of_everything(model)
    start = time.monotonic()
    with pytest.raises(fxgraft.RecipeError):
        fxgraft.load(model, file)
    assert time.monotonic() - start < 20
    assert_same(before, state_of_everything(model))


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = saved(tmp_path)
    whole_file = file.read_bytes()
    header = 8 + int.from_bytes(whole_file[:8], "little")
    content = json.loads(whole_file[8:header])
    chance = random.Random(0)
    for place in [chance.randrange(end) for end in (header, len(whole_file)) for _ in range(60)]:
        damaged = bytearray(whole_file)
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            same = place < header and json.loads(damaged[8:header]) == content  # blanks between entries
        except ValueError:
            same = False
        if not same:
            refuses(file)


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
    file = saved(tmp_path)
    recipes.rewrite(file, **MALFORMED[case])
    refuses(file)


def test_a_deeply_nested_recipe(tmp_path: Path) -> None:
    file = saved(tmp_path)
    save_file({"a": torch.ones(2)}, file, {"fxgraft": '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"})
    refuses(file)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_load_that_fails_half_way_in(tmp_path: Path, error: BaseException) -> None:
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            raise error

    file = saved(tmp_path)
    model = bare()
    with torch.no_grad():
        model.stem.first.weight.add_(1)
    model.fc.__class__ = Refuses
    before = state_of_everything(model)
    with pytest.raises(fxgraft.RecipeError if isinstance(error, RuntimeError) else type(error)):
        fxgraft.load(model, file)
    assert_same(before, state_of_everything(model))


@pytest.mark.parametrize("act", ["sites", "dry run", "load"])
def test_looking_draws_nothing_and_fires_no_hook(tmp_path: Path, act: str) -> None:
    file = saved(tmp_path)
    model = bare()
    fired: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    with nothing_else_changes():
        if act == "sites":
            fxgraft.sites(model, input_size=SIZE)
        elif act == "load":
            fxgraft.load(model, file)
        else:
            for method, cls in fxgraft.methods().items():
                with contextlib.suppress(fxgraft.FxgraftError):  # not every method fits every network
                    fxgraft.patch(model, method, dry_run=True, input_size=SIZE, **cls.example)
    assert fired == []
