"""What methods cost: what is measured, what is kept, what the tables say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.coverage import STACK
from benchmarks.overhead import Overhead, file_of, overhead_table, subjects
from rich.console import Console

from fxgraft.cli.readme import own_methods
from fxgraft.errors import ConfigError

SETTINGS: dict[str, Any] = {"batch": 2, "size": 64, "rounds": 1, "min_run_time": 0.0, "threads": 1}
QUIET = Console(quiet=True)


def test_every_method_alone_and_those_that_go_together() -> None:
    chosen = subjects(())
    assert [patches[0][0] for patches in chosen[:-1]] == list(own_methods())
    assert [method for method, _ in chosen[-1]] == list(STACK)
    assert subjects(["taps", "rsc:layer=layer4"]) == [
        [("taps", {"layers": -1})],
        [("rsc", {"layer": "layer4"})],
    ]


def test_a_measurement_goes_on_and_is_not_repeated(tmp_path: Path) -> None:
    path = file_of(tmp_path, "cpu", compiled=False)
    assert path.name == "overhead.json"
    assert file_of(tmp_path, "cuda:1", compiled=True).name == "overhead-cuda1-compiled.json"
    methods = subjects(["rsc", "diversification"])
    together = [("rsc", {}), ("diversification", {})]
    Overhead(path, SETTINGS).run(["test_vit"], methods[:1], QUIET)
    first = json.loads(path.read_text())
    found = Overhead(path, SETTINGS)
    found.run(["test_vit"], [*methods, together], QUIET)
    assert json.loads(path.read_text())["reports"] == first["reports"]
    assert [(each["model"], each["method"]) for each in found.refused] == [("test_vit", "diversification")]
    assert found.reports[0].patch_seconds > 0
    assert "| test_vit | rsc |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000
    head, _, noise, row = overhead_table(path).splitlines()
    assert head == "| training step | test_vit |"
    assert noise.startswith("| *bare again* | ")
    assert row.startswith("| `rsc` | ")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "is no file of this benchmark"), (None, "with other settings: batch, size")],
)
def test_other_files_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    if content is None:
        Overhead(path, SETTINGS).run(["test_resnet"], subjects(["taps"]), QUIET)
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Overhead(path, {**SETTINGS, "batch": 4, "size": 32})
