"""The tests that are left to the sweep, all or most of their cases, are there under those names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sweeping

TESTS = Path(sweeping.__file__).parent


@pytest.mark.parametrize("name", [*sweeping._SHARES, *sweeping._SWEPT])
def test_a_test_that_is_thinned_exists(name: str) -> None:
    file, _, function = name.partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
