"""How much of the zoo fits: what is tried, what is kept, and what the tables say."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from benchmarks import coverage
from benchmarks import zoo as benchmark
from benchmarks.coverage import (
    architectures,
    category,
    examine,
    family,
    lacking,
    meta_dirichlet,
    structure,
    tried_methods,
)
from benchmarks.zoo import Zoo, run
from benchmarks.zoo_tables import claim, plot, shares, summary
from rich.console import Console
from torch import Tensor, nn

from fxgraft.errors import ConfigError
from sweeping import some

RECORDS: dict[str, Any] = {
    "timm/a": {
        "family": "timm/x",
        "bare": None,
        "methods": {
            "rsc": {"plan": 0.5, "steps": None},
            "mixmo": {"plan": 2.0, "refused": "StructureError: no"},
        },
        "stack": {"of": ["rsc"], "plan": 1.0, "steps": None},
    },
    "timm/b": {
        "family": "timm/x",
        "bare": None,
        "methods": {"rsc": {"plan": 0.1, "failed": "RuntimeError: 3"}, "mixmo": {"plan": 1.0, "steps": None}},
        "stack": {"of": [], "plan": 1.0, "steps": "training: RuntimeError: 4"},
    },
}
STRUCTURES: dict[str, Any] = {
    "timm/a": {"family": "timm/x", "structure": "1", "modules": 5, "parameters": 50},
    "timm/a_large": {"family": "timm/y", "structure": "1", "modules": 50, "parameters": 500},
    "timm/a_larger": {"family": "timm/y", "structure": "1", "modules": 60, "parameters": 600},
    "timm/b": {"family": "timm/x", "structure": "2", "modules": 7, "parameters": 70},
    "timm/b_large": {"family": "timm/x", "structure": "2", "modules": 9, "parameters": 90},
    "timm/c": {"family": "timm/y", "unbuilt": "ImportError: a package"},
    "timm/d": {"family": "timm/y", "structure": "3", "modules": 1, "parameters": 10},
}


@pytest.mark.parametrize("name", some(["timm/test_resnet", "torchvision/lraspp_mobilenet_v3_large"], 1))
def test_an_architecture(name: str) -> None:
    put_back = meta_dirichlet()
    try:
        found = examine(name)
    finally:
        put_back()
    assert found["bare"] is None
    assert set(found["methods"]) == set(tried_methods())
    dense = name.startswith("torchvision/lraspp")
    for method, tried in found["methods"].items():
        assert "failed" not in tried
        assert tried.get("steps") is None, method
        assert ("refused" in tried) == (dense and method in ("mixmo", "diversification")), method
    assert found["stack"]["steps"] is None
    assert {"taps", "rsc"} <= {*found["stack"]["of"]}


def test_both_libraries_are_there() -> None:
    names = architectures()
    assert len(names) == len(set(names)) > 1000
    assert {"timm/resnet50", "torchvision/resnet50", "torchvision/fcn_resnet50"} <= set(names)
    assert not [name for name in names if "quantized" in name or "rcnn" in name]
    assert family("timm/resnet50") == "timm/resnet"
    assert family("torchvision/fcn_resnet50") == "torchvision/fcn"


class Auxiliary(nn.Module):
    """A network whose auxiliary classifier, which runs in training alone, needs larger images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        if self.training:
            nn.functional.max_pool2d(maps, 128)
        return self.fc(maps.mean((2, 3)))


def test_images_are_large_enough_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_built", lambda name, **_: Auxiliary())
    found = coverage.small_network("torchvision/x")
    assert found is not None
    assert found[1] == (3, 128, 128)


def test_refusals_of_one_kind() -> None:
    one = "StructureError: There is no residual join in VovNet, so it has no position 'post'.\nmore"
    other = "StructureError: There is no residual join in Inception3, so it has no position 'pre'."
    token = "StructureError: The classifier 'head' of {} does not read the global average of a map."
    assert category(token.format("Xcit")) == category(token.format("VisionTransformer"))
    assert category(one) == category(other) != category("StructureError: There is no stem in VovNet.")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("timm/resnet50", "timm/resnet101", True),
        ("timm/vit_tiny_patch16_224", "timm/vit_base_patch32_224", True),
        ("timm/resnet50", "timm/resnet50d", False),
        ("timm/resnet18", "timm/resnet50", False),
        ("timm/resnet18", "torchvision/resnet18", False),
        ("torchvision/regnet_x_400mf", "torchvision/regnet_x_800mf", True),  # computes its widths as tensors
    ],
)
def test_what_is_of_one_structure(one: str, other: str, same: bool) -> None:
    assert (structure(one)["structure"] == structure(other)["structure"]) is same


def test_what_cannot_be_built_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise ImportError(f"{name} needs a package")

    monkeypatch.setattr(coverage, "build", refused)
    assert structure("timm/resnet18") == {
        "family": "timm/resnet",
        "unbuilt": "ImportError: timm/resnet18 needs a package",
    }


def test_the_smallest_of_each_structure_then_the_largest_then_the_rest(tmp_path: Path) -> None:
    found = Zoo(tmp_path / "zoo.json")
    found.structures = dict(STRUCTURES)
    everything = ["timm/a", "timm/b", "timm/d", "timm/a_larger", "timm/b_large", "timm/a_large"]
    assert found.missing() == everything
    assert found.missing("timm/a*") == ["timm/a", "timm/a_larger", "timm/a_large"]
    found.records = {"timm/a_large": RECORDS["timm/a"]}
    assert found.missing() == ["timm/b", "timm/d", "timm/a_larger", "timm/b_large", "timm/a"]


def test_tables(tmp_path: Path) -> None:
    found = Zoo(tmp_path / "zoo.json")
    found.structures, found.records = dict(STRUCTURES), dict(RECORDS)
    assert set(found.known()) == {*STRUCTURES} - {"timm/c", "timm/d"}
    assert shares(found.known()) == {"rsc": (3, 5), "mixmo": (2, 5), "all together": (3, 5)}
    text = summary(found)
    for line in (
        "5 of 7 architectures, by 2 of them that were tried; 1 could not be built here; "
        "1 are of a structure that was not tried yet.",
        "| `rsc` | 3 | 5 | 60.0% |",
        "| rsc | 0.50 | 0.5 |",
        "| timm/a | mixmo | 2.0 |",
        "| rsc | 2 | CRASH RuntimeError: … | timm/b | RuntimeError: 3 |",
        "| timm/x | 1/3 | 2/3 | 1/3 |",
        "| timm/c | not built: ImportError: a package |",
    ):
        assert line in text
    plot(found, tmp_path / "zoo.png")
    assert (tmp_path / "zoo.png").stat().st_size > 1000


def test_places_are_counted_by_themselves(tmp_path: Path) -> None:
    """One that runs is not counted as checked, and what is wrong is listed."""
    found = Zoo(tmp_path / "zoo.json")
    found.structures, found.records = dict(STRUCTURES), dict(RECORDS)
    assert found.unchecked() == ["timm/d", "timm/a", "timm/b"]
    found.places = {
        "timm/a": {"wrong": []},
        "timm/b": {"wrong": ["a gate", "a map"]},
        "timm/d": {"failed": "it takes two images"},
    }
    found.write()
    found = Zoo(tmp_path / "zoo.json")
    assert found.unchecked() == []
    text = summary(found)
    assert "without a table, it was checked on 2 (1 of them wrong in something)." in text
    assert "| timm/x | 1/3 | 2/3 | 1/3 | 1/2 |" in text
    assert "| timm/b | a gate; a map |" in text
    assert "Of 7 architectures of timm and torchvision, 3 train with every method they allow" in claim(found)
    assert "checked by invariants on 1, from 1 of 2 model files." in claim(found)


def test_model_files_without_a_check_come_first_then_what_most_have(tmp_path: Path) -> None:
    found = Zoo(tmp_path / "zoo.json")
    found.structures, found.records = dict(STRUCTURES), {**RECORDS, "timm/d": RECORDS["timm/a"]}
    assert found.incomplete() == ["timm/a", "timm/b", "timm/d"]
    found.structures["timm/e"] = {"family": "timm/x", "structure": "4", "modules": 1, "parameters": 1}
    found.places = {"timm/e": {"wrong": []}}
    assert found.unchecked() == ["timm/d", "timm/a", "timm/b"]
    found.places["timm/other"] = {"wrong": []}
    found.structures["timm/other"] = {"family": "timm/y", "structure": "5", "modules": 2, "parameters": 2}
    assert found.unchecked() == ["timm/a", "timm/b", "timm/d"]


def test_the_smallest_to_check_has_the_fewest_parameters(tmp_path: Path) -> None:
    """The widths of a network say nothing about how many modules it has."""
    found = Zoo(tmp_path / "zoo.json")
    found.structures = {
        "timm/giant": {"family": "timm/x", "structure": "1", "modules": 5, "parameters": 10**9},
        "timm/deep": {"family": "timm/x", "structure": "1", "modules": 50, "parameters": 10},
    }
    assert found.unchecked() == ["timm/deep"]
    found.structures["timm/encoder"] = {"family": "timm/x", "structure": "2", "modules": 5, "parameters": 1}
    found.records["timm/encoder"] = {**RECORDS["timm/a"], "bare": "training: no logits"}
    assert found.unchecked() == ["timm/deep"]


def test_parameters_are_counted_where_they_were_not(tmp_path: Path) -> None:
    found = Zoo(tmp_path / "zoo.json")
    known = structure("timm/test_resnet")
    assert known["parameters"] == sum(
        each.numel() for each in coverage.build("timm/test_resnet").parameters()
    )
    found.structures = {"timm/test_resnet": known, "timm/test_vit": {"family": "timm/x", "unbuilt": "no"}}
    assert not {"timm/test_resnet", "timm/test_vit"} & set(found.unseen())
    del known["parameters"]
    assert "timm/test_resnet" in found.unseen()


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    complete = {
        **RECORDS["timm/a"],
        "methods": dict.fromkeys(tried_methods(), RECORDS["timm/a"]["methods"]["rsc"]),
    }

    def examined(name: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
        tried.append(name if known is None else f"{name} without {', '.join(lacking(known))}")
        return complete

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    monkeypatch.setattr(benchmark, "examine", examined)
    monkeypatch.setattr(benchmark, "check_places", lambda name: {"wrong": []})
    path = tmp_path / "zoo.json"
    pattern = "timm/test_*"
    run(Zoo(path), Console(quiet=True), pattern, 2, minutes=0)
    assert tried == []
    run(Zoo(path), Console(quiet=True), "timm/test_resnet", 2, minutes=None)
    assert tried == ["timm/test_resnet"]
    wanted = Zoo(path).unseen(pattern)
    assert len(wanted) > 3
    run(Zoo(path), Console(quiet=True), pattern, 2, minutes=None)
    found = Zoo(path)
    assert sorted(tried[1:]) == sorted(wanted)
    assert found.unseen(pattern) == found.missing(pattern) == []
    assert len(found.environments) == 1
    found.records["timm/test_resnet"] = {
        **complete, "methods": {name: each for name, each in complete["methods"].items() if name != "dsu"}
    }  # fmt: skip
    found.write()
    assert Zoo(path).incomplete() == ["timm/test_resnet"]
    run(Zoo(path), Console(quiet=True), pattern, 2, minutes=None)
    assert tried[-1] == "timm/test_resnet without dsu"
    assert Zoo(path).incomplete() == []
    run(Zoo(path), Console(quiet=True), "timm/test_resnet", 2, minutes=None, places=True)
    assert Zoo(path).places == {"timm/test_resnet": {"wrong": []}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "isn't a file of this benchmark"),
        ("{", "isn't a file of this benchmark"),
        (
            json.dumps({"protocol": "x", "environments": [], "structures": {}, "tried": {}}),
            "is of another protocol: x",
        ),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Zoo(tmp_path / "zoo.json")
