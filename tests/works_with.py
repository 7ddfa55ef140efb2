"""What works with what, written down while the tests run: `pytest -m "" --works-with FILE`.

A test with the mark ``works_with(feature)`` stands for a cell of the matrix, of the method that it has among its
parameters. Several tests may stand for one cell; it says "yes" where all of them pass, and the reason of the expected
failure where one is expected. ``where={"kind": "ddp"}`` says which of a test's cases the mark is for.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tools.readme import own_methods

from fxgraft.environment import environment
from fxgraft.io.atomic_write import write_text

PROPERTY = "works_with"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--works-with", type=Path, metavar="FILE", help="write what works with what")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "works_with(feature, where={}): a cell of the matrix of what works")
    path = config.getoption("--works-with")
    if path is not None and not hasattr(config, "workerinput"):  # the process that hears of all tests
        config.pluginmanager.register(Matrix(path), "works-with")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for mark in item.iter_markers("works_with"):
            where = mark.kwargs.get("where", {})
            method = method_of(parameters)
            if method in own_methods() and all(parameters.get(key) == value for key, value in where.items()):
                item.user_properties.append((PROPERTY, (mark.args[0], method)))


def method_of(parameters: dict[str, Any]) -> str | None:
    """Return the method among a test's parameters: of a cell of the sweep, or a name of its own."""
    for value in parameters.values():
        name = getattr(value, "method", value)
        if isinstance(name, str) and name.partition(",")[0] in own_methods():
            return name.partition(",")[0]
    return None


class Matrix:
    """Collects the outcome of every cell, and writes them when the tests are over.

    Args:
        path: the file; cells that no test of this run stands for stay, and with a failure it is not written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, str]] = defaultdict(dict)
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == PROPERTY:
                feature, method = value  # type: ignore[misc]
                self._enter(report, str(feature), str(method))

    def _enter(self, report: pytest.TestReport, feature: str, method: str) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif hasattr(report, "wasxfail") and report.skipped:
            self.cells[feature][method] = f"no: {report.wasxfail}"
        elif report.when == "call" and report.passed:
            self.cells[feature].setdefault(method, "yes")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.failed or not self.cells:
            terminalreporter.write_line(f"{self.path} is not written: {self.failed or 'no cell'}", red=True)
            return
        known = json.loads(self.path.read_text())["features"] if self.path.exists() else {}
        features = {
            feature: {
                method: said
                for method in own_methods()
                if (said := self.cells[feature].get(method, known.get(feature, {}).get(method)))
            }
            for feature in sorted({*known, *self.cells})
        }
        content = {"environment": environment("cpu"), "features": features}
        write_text(self.path, json.dumps(content, indent=1) + "\n")
        terminalreporter.write_line(f"{self.path} is written")
