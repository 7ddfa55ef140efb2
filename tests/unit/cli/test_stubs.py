"""What editors see of `fxgraft.patch` is what the registry has."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import typer
from tools import stubs
from tools.readme import own_methods
from tools.stubs import STUB, stub
from typer.testing import CliRunner

import fxgraft


def overloads() -> dict[str, list[str]]:
    """The keyword arguments of each overload, by the method that it is for."""
    tree = ast.parse(STUB.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert {node.name for node in functions} == {"patch"}
    return {
        ast.unparse(node.args.args[1].annotation): [each.arg for each in node.args.kwonlyargs]  # type: ignore[arg-type]
        for node in functions
    }


def test_the_stub_is_written_from_the_registry() -> None:
    assert STUB.read_text() == stub(), "python -m tools.stubs --write"


def test_the_command_compares_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(stubs.main)
    monkeypatch.setattr(stubs, "STUB", tmp_path / "__init__.pyi")
    stubs.STUB.write_text("old")
    stale = CliRunner().invoke(app, ["--check"])
    assert stale.exit_code == 1
    assert "python -m tools.stubs --write" in stale.output
    assert CliRunner().invoke(app, ["--write"]).exit_code == 0
    assert stubs.STUB.read_text() == stub()
    assert CliRunner().invoke(app, ["--check"]).exit_code == 0


def test_every_option_of_every_method_completes() -> None:
    found = overloads()
    common = {"name", "dry_run", "input_size"}
    for name, method in own_methods().items():
        options = {field.name for field in dataclasses.fields(method)}
        assert set(found[f"Literal['{name}']"]) - {"layer"} == options | common | {"preset"}
        assert ("layer" in found[f"Literal['{name}']"]) == issubclass(method, fxgraft.extend.LayeredPatch)
    assert set(found["Patch"]) == common
    assert {"str", "str | Patch"} <= found.keys(), "methods of other packages, and plans"


def test_the_stub_hands_on_every_public_name() -> None:
    tree = ast.parse(STUB.read_text())
    imported = [
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fxgraft.")
        for alias in node.names
    ]
    assert sorted([*imported, "patch"]) == sorted(fxgraft._MODULE_OF)
