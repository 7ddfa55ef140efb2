"""The examples in docstrings run, and give what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import fxgraft

ROOT = Path(fxgraft.__file__).parent
MODULES = [
    ".".join(("fxgraft", *file.relative_to(ROOT).with_suffix("").parts))
    for file in sorted(ROOT.rglob("*.py"))
    if ">>> " in file.read_text()
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples write files
    loaded = importlib.import_module(module)
    with_examples = [each for each in doctest.DocTestFinder().find(loaded) if each.examples]
    assert with_examples
    for each in with_examples:
        runner = doctest.DocTestRunner()
        runner.run(each)
        assert runner.failures == 0, f"{each.name}: see the captured output"


def test_the_main_verbs_have_examples() -> None:
    for name in ("patch", "unpatch", "sites", "loss", "merge", "diagnostics"):
        assert ">>> " in (getattr(fxgraft, name).__doc__ or ""), name


def test_code_in_docstrings_is_an_example_or_runs_elsewhere() -> None:
    """No fences and no literal blocks, which nobody would run; the method in `fxgraft.extend` has a test of its own."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [(file, node) for file in ROOT.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    texts = [(file, ast.get_docstring(node) or "") for file, node in nodes if isinstance(node, kinds)]
    found = [str(file) for file, text in texts if "```" in text or "::\n\n" in text]
    assert found == []
