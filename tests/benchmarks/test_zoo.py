"""How much of the zoo fits: what is tried, what is kept, and what the tables say."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from benchmarks.coverage import architectures, category, examine, family, meta_dirichlet
from benchmarks.zoo import Zoo, plot, run, shares, summary
from rich.console import Console

import fxgraft
from benchmarks import zoo as benchmark
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
    "timm/c": {"family": "timm/y", "unbuilt": "ImportError: a package"},
}


@pytest.mark.parametrize("name", some(["timm/test_resnet", "torchvision/lraspp_mobilenet_v3_large"], 1))
def test_an_architecture(name: str) -> None:
    put_back = meta_dirichlet()
    try:
        found = examine(name)
    finally:
        put_back()
    assert found["bare"] is None
    assert set(found["methods"]) == set(fxgraft.methods())
    dense = name.startswith("torchvision/lraspp")
    for method, tried in found["methods"].items():
        assert "failed" not in tried
        assert tried.get("steps") is None, method
        assert ("refused" in tried) == (dense and method in ("mixmo", "diversification", "manifold_mixup")), (
            method
        )
    assert found["stack"]["steps"] is None
    assert {"taps", "rsc"} <= {*found["stack"]["of"]}


def test_both_libraries_are_there() -> None:
    names = architectures()
    assert len(names) == len(set(names)) > 1000
    assert {"timm/resnet50", "torchvision/resnet50", "torchvision/fcn_resnet50"} <= set(names)
    assert not [name for name in names if "quantized" in name or "rcnn" in name]
    assert family("timm/resnet50") == "timm/resnet"
    assert family("torchvision/fcn_resnet50") == "torchvision/fcn"


def test_refusals_of_one_kind() -> None:
    one = "StructureError: There is no residual join in VovNet, so it has no position 'post'.\nmore"
    other = "StructureError: There is no residual join in Inception3, so it has no position 'pre'."
    assert category(one) == category(other) != category("StructureError: There is no stem in VovNet.")


def test_tables(tmp_path: Path) -> None:
    found = Zoo(tmp_path / "zoo.json")
    found.records = dict(RECORDS)
    assert shares(found.records) == {"rsc": (1, 2), "mixmo": (1, 2), "all together": (1, 2)}
    text = summary(found)
    for line in (
        "2 architectures of ",
        "| rsc | 1 | 2 | 50.0% |",
        "| timm/a | mixmo | 2.0 |",
        "| rsc | 1 | CRASH RuntimeError: … | timm/b | RuntimeError: 3 |",
        "| timm/x | 1/2 | 1/2 | 1/2 |",
    ):
        assert line in text
    plot(found, tmp_path / "zoo.png")
    assert (tmp_path / "zoo.png").stat().st_size > 1000


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def examined(name: str) -> dict[str, Any]:
        tried.append(name)
        return RECORDS["timm/a"]

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    monkeypatch.setattr(benchmark, "examine", examined)
    path = tmp_path / "zoo.json"
    pattern = "timm/test_*"
    everything = Zoo(path).missing(pattern)
    run(Zoo(path), Console(quiet=True), pattern, 2, minutes=0)
    assert tried == []
    found = Zoo(path)
    found.records = {everything[0]: RECORDS["timm/b"]}
    found.write()
    run(Zoo(path), Console(quiet=True), pattern, 2, minutes=None)
    assert sorted(tried) == sorted(everything[1:])
    assert Zoo(path).missing(pattern) == []
    assert Zoo(path).records[everything[0]] == RECORDS["timm/b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no file of this benchmark"),
        ("{", "is no file of this benchmark"),
        (json.dumps({"protocol": "x", "environments": [], "architectures": {}}), "is of another protocol: x"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Zoo(tmp_path / "zoo.json")
