"""The matrix of tools and methods: what tests write down, and what the README makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.__main__ import FOLDER
from benchmarks.matrix import LOOPS, matrix_table
from tools.readme import own_methods

from system.contract.test_loops import SITUATIONS
from works_with import PROPERTY, Matrix, method_of

CONTRACT = Path(__file__).parents[1] / "contract"
MARK = re.compile(r'mark\.works_with\(\s*"([^"]+)"')


def report(feature: str, method: str, **outcome: Any) -> Any:
    outcome = {"when": "call", "passed": True, "failed": False, "skipped": False, **outcome}
    return SimpleNamespace(user_properties=[(PROPERTY, (feature, method))], nodeid="test_x", **outcome)


def written(path: Path, *reports: Any) -> str:
    said: list[str] = []
    matrix = Matrix(path)
    for each in reports:
        matrix.pytest_runtest_logreport(each)
    matrix.pytest_terminal_summary(SimpleNamespace(write_line=lambda text, **_: said.append(text)))  # type: ignore[arg-type]
    return said[0]


EXPECTED = {"passed": False, "skipped": True, "wasxfail": "a reason"}


def test_cells_are_kept_until_a_test_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "works_with.json"
    assert written(path, report("a", "rsc"), report("a", "mixmo", **EXPECTED)).endswith("is written")
    written(path, report("b", "rsc"), report("a", "mixmo"), report("b", "mixmo", when="setup"))
    assert json.loads(path.read_text())["features"] == {
        "a": {"mixmo": "yes", "rsc": "yes"},
        "b": {"rsc": "yes"},
    }


def test_one_expected_failure_decides_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "works_with.json"
    for order in (
        [report("a", "rsc"), report("a", "rsc", **EXPECTED)],
        [report("a", "rsc", **EXPECTED), report("a", "rsc")],
    ):
        written(path, *order)
        assert json.loads(path.read_text())["features"] == {"a": {"rsc": "no: a reason"}}
    table = matrix_table(path)
    assert "| a | – (1) |" in table
    assert table.endswith("1. a reason")


def test_loops_are_a_table_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "works_with.json"
    written(path, report("a tool", "rsc"), report(f"{LOOPS}a loop", "rsc"))
    assert "| a tool | ✓ |" in matrix_table(path)
    assert "loop" not in matrix_table(path)
    assert "| a loop | ✓ |" in matrix_table(path, loops=True)
    assert "tool" not in matrix_table(path, loops=True)


def test_nothing_is_written_with_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "works_with.json"
    failed = {"passed": False, "failed": True}
    assert "is not written: ['test_x']" in written(path, report("a", "rsc"), report("a", "taps", **failed))
    assert "is not written: no cell" in written(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("parameters", "method"),
    [
        ({"kind": "ddp", "name": "crossnorm, consistency"}, "crossnorm"),
        ({"cell": SimpleNamespace(method="rsc")}, "rsc"),
        ({"method": "padain", "n": 3}, None),
    ],
)
def test_the_method_of_a_test(parameters: dict[str, Any], method: str | None) -> None:
    assert method_of(parameters) == method


def test_the_committed_matrix_has_every_cell() -> None:
    features = json.loads((FOLDER / "works_with.json").read_text(encoding="utf-8"))["features"]
    marked = {name for file in CONTRACT.glob("*.py") for name in MARK.findall(file.read_text())}
    assert set(features) == {*marked, *(f"{LOOPS}{name}" for name in SITUATIONS)}
    assert all(set(found) == set(own_methods()) for found in features.values())
