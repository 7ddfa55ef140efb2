"""What a folder of runs remembers of its comparison: another one is never taken for the same."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import fxgraft
from fxgraft.errors import ConfigError
from unit.comparison.images import DOMAINS, write_classes, write_domains
from unit.comparison.small import Small


def refused(run, match, **changes):
    with pytest.raises(ConfigError, match=rf"another protocol:(?s:.*){match}"):
        run(**changes)


def test_other_images_of_the_same_number(run, tmp_path):
    first = write_domains(tmp_path / "first" / "img")
    second = write_domains(tmp_path / "second" / "img", domains=("green", "blue", "red"))
    run(data=first, seeds=1)
    refused(run, "digest", data=second, seeds=1)
    moved = tmp_path / "moved" / "img"
    shutil.copytree(first, moved)
    assert len(run(data=moved, seeds=1).records) == 2


def test_other_images_to_test_on_and_to_adapt_to(run, tmp_path):
    places = [write_classes(tmp_path / f"{name}" / "set", domain, 4) for domain, name in enumerate("abc")]
    for option in ("test", "target"):
        shared = {
            "data": places[0],
            "hold_out": None,
            "seeds": 1,
            "grafts": "adapt_batchnorm",
            "training": {"batch_size": 4, "epochs": 1},
            "out": tmp_path / option,
        }
        run(**shared, **{option: places[1]})
        refused(run, rf"{option}.digest", **shared, **{option: places[2]})
        refused(run, rf"{option}: .* there, None now", **shared)


def test_images_that_were_added(run, tmp_path):
    place, tested = write_classes(tmp_path / "grow", 0, 12), write_classes(tmp_path / "tested", 1, 4)
    shared = {"data": place, "hold_out": None, "test": tested, "seeds": 1}
    run(**shared)
    write_classes(place, 0, 20)
    refused(run, r"images\.: 24 there, 40 now", **shared)


def test_images_that_changed_in_place(run, tmp_path, data):
    before = run(seeds=1)
    shutil.rmtree(data)
    write_domains(data, domains=("red", "green", "blue"))
    after = run(seeds=1, out=tmp_path / "again")
    assert before.records[0]["epoch_loss"] != after.records[0]["epoch_loss"]


def test_models_and_loops_with_one_name(run, tmp_path):
    def of(width):
        return lambda num_classes: Small(num_classes, width)

    run(model=of(4), seeds=1)
    refused(run, "architecture", model=of(5), seeds=1)
    shared = {"seeds": 1, "training": None, "out": tmp_path / "loops"}
    run(train=lambda model, images, validation, seed: [0.5], **shared)
    refused(run, "loop", train=lambda model, images, validation, seed: [0.25], **shared)


def test_code_that_was_edited(run, tmp_path, monkeypatch):
    """A function of a module keeps its name when its code changes, and so does one that a text names."""
    monkeypatch.syspath_prepend(tmp_path)
    code = """
from unit.comparison.small import Small
def build(num_classes):
    return Small(num_classes, 4)
def train(model, images, validation, seed):
    return [{loss}]
"""
    for loss in (0.5, 0.25):
        (tmp_path / "edited.py").write_text(code.format(loss=loss))
        sys.modules.pop("edited", None)
        importlib.invalidate_caches()
        edited = importlib.import_module("edited")
        shared = {"model": "edited:build", "train": edited.train, "training": None, "seeds": 1}
        if loss == 0.5:
            run(**shared)
        else:
            refused(run, r"loop: edited:train#", **shared)
    (tmp_path / "edited.py").write_text(code.format(loss=0.5).replace(", 4)", ", 5)"))
    sys.modules.pop("edited")
    importlib.invalidate_caches()
    refused(run, r"model: edited:build#", **{**shared, "train": importlib.import_module("edited").train})


def test_another_partial(run):
    run(model=functools.partial(Small, width=4), seeds=1)
    refused(run, "model: partial", model=functools.partial(Small, width=5), seeds=1)


def test_settings_that_tuning_would_choose_now(run, monkeypatch):
    shared = {"tune": {"lr": [1e-5, 0.05]}, "seeds": 1}
    found = run(**shared)
    assert {str(r["tuned"]) for r in found.records if "tuning" not in r} >= {
        str(dict(found.tuned["bare"]["red"]))
    }
    other = next(row for row in ({"lr": 1e-5}, {"lr": 0.05}) if row != found.tuned["bare"]["red"])

    def score(self, record):
        return float(record["tuning"] == other)

    monkeypatch.setattr("fxgraft.comparison.experiment._Runner._score", score)
    with pytest.raises(ConfigError, match=r"trained with lr=.* and tuning chooses lr=.* now(?s:.*)metric"):
        run(**shared, metric="ece")


def test_a_method_of_ones_own_goes_to_other_processes(run):
    from models.toys import TrainToy

    fxgraft.register("travelling", override=True)(TrainToy)
    try:
        found = run(grafts="travelling", workers=2, seeds=1)
        assert found.complete
    finally:
        from fxgraft.patches import registry

        registry._registry.pop("travelling")


class Loop:
    """A loop of a rate."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, model, images, validation, seed):
        return [self.rate]

    def run(self, model, images, validation, seed):
        return [self.rate]


def closed_over(rate):
    return lambda model, images, validation, seed: [rate]


def by_default(rate):
    return lambda model, images, validation, seed, rate=rate: [rate]


@pytest.mark.parametrize("make", [Loop, lambda rate: Loop(rate).run, closed_over, by_default])
def test_functions_that_differ_in_what_they_hold(run, make):
    shared = {"seeds": 1, "training": None}
    run(train=make(0.5), **shared)
    refused(run, "loop", train=make(0.25), **shared)
    assert len(run(train=make(0.5), **shared).records) == 2


IDENTITY = """
import functools
from fxgraft.comparison.protocol import _path
names = {"alpha", "beta", "gamma", "delta"}
def rate(step): return 0.5
print(_path(lambda seed: seed in {"alpha", "beta", "gamma"} and names), _path(functools.partial(print, rate)))
"""


def test_names_of_functions_are_the_same_in_every_process():
    said = {
        subprocess.run(
            [sys.executable, "-c", IDENTITY],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }
    assert len(said) == 1


def test_other_images_of_the_same_size(run, tmp_path):
    for seed in (0, 1):
        place = write_domains(
            tmp_path / f"{seed}" / "img", domains=("red", "green", "blue") if seed else DOMAINS
        )
        for file in place.rglob("*.png"):
            with Image.open(file) as image:
                image.save(file.with_suffix(".bmp"))
            file.unlink()
    run(data=tmp_path / "0" / "img", seeds=1)
    refused(run, "digest", data=tmp_path / "1" / "img", seeds=1)


def test_spellings_of_a_folder(run, data, monkeypatch):
    run(seeds=1)
    monkeypatch.chdir(data / "red")
    for spelling in ("..", "../../data", f"{data}/red/.."):
        assert len(run(data=spelling, seeds=1).records) == 2
