"""What the source must keep to: the direction of its imports, the size of its files, documentation."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest

import fxgraft

ROOT = Path(fxgraft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
GRAPH = [f for f in FILES if f.parent.name == "graph"]
FUNCTIONAL = [f for f in FILES if f.parent.name == "functional"]
METHODS = [f for f in FILES if "patches" in f.parts and f.name not in ("__init__.py", "base.py")]
FOUNDATION = {"fxgraft.graph", "fxgraft.errors"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_name(file: Path) -> str:
    parts = ("fxgraft", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> set[str]:
    """Absolute names of all modules a source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            base = ".".join(part for part in (start, node.module or "") if part)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def inside(names: set[str], *packages: str) -> set[str]:
    return {n for n in names if any(n == p or n.startswith(p + ".") for p in packages)}


def test_imports_are_seen_in_every_form() -> None:
    source = "import fxgraft.patches\ndef f():\n  from ..patches import rsc\n  from fxgraft import patches"
    assert inside(imports(source, "fxgraft.graph"), "fxgraft.patches") == {
        "fxgraft.patches",
        "fxgraft.patches.rsc",
    }


@pytest.mark.parametrize("file", GRAPH, ids=name_of)
def test_the_graph_layer_knows_no_method(file: Path) -> None:
    ours = inside(imports(file.read_text(), "fxgraft.graph"), "fxgraft")
    assert {n for n in ours if not inside({n}, "fxgraft.graph", "fxgraft.errors")} == set()


@pytest.mark.parametrize("file", FUNCTIONAL, ids=name_of)
def test_the_tensor_functions_know_no_model(file: Path) -> None:
    ours = inside(imports(file.read_text(), "fxgraft.functional"), "fxgraft")
    assert {n for n in ours if not inside({n}, "fxgraft.functional", "fxgraft.errors")} == set()


@pytest.mark.parametrize("file", METHODS, ids=name_of)
def test_a_method_knows_no_other_method_and_no_api(file: Path) -> None:
    ours = inside(imports(file.read_text(), "fxgraft.patches"), "fxgraft")
    known = inside(ours, "fxgraft.patches", "fxgraft.api", "fxgraft.recipe")
    assert known - inside(known, "fxgraft.patches.base") - {"fxgraft.patches"} == set()


def test_the_graph_layer_works_without_the_methods() -> None:
    """Import a second fxgraft whose patches cannot be imported."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "fxgraft"}
    package = types.ModuleType("fxgraft")
    package.__path__ = [str(ROOT)]
    try:
        for name in kept:
            del sys.modules[name]
        sys.modules["fxgraft"] = package
        sys.modules.update({f"fxgraft.{name}": None for name in ("patches", "api", "functional", "recipe")})  # type: ignore[dict-item]
        for file in GRAPH:
            module = importlib.import_module(module_name(file))
            assert module.__file__ == str(file)
            assert module is not kept.get(module.__name__)
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "fxgraft"]:
            del sys.modules[name]
        sys.modules.update(kept)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 400


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_is_checked_by_assert(file: Path) -> None:
    """``python -O`` drops assertions, and they say nothing to a user."""
    lines = [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]
    assert lines == []


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name in ("graph", "patches", "functional")], ids=name_of
)
def test_only_torch_draws_random_numbers(file: Path) -> None:
    names = imports(file.read_text(), module_name(file))
    assert "numpy" not in names
    # The standard library's generator may be put back after the user's code was traced, not drawn from.
    drawn = re.findall(
        r"\brandom\.(?!getstate|setstate)\w+\(", re.sub(r"torch\.random\.\w+\(", "", file.read_text())
    )
    assert drawn == []


@pytest.mark.parametrize("name", [n for n in fxgraft.__all__ if n != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(fxgraft, name)
    own = thing.__dict__.get("__doc__") if isinstance(thing, type) else thing.__doc__
    assert own
    assert not own.startswith(f"{name}("), "the docstring that dataclasses make says nothing"
    if not isinstance(thing, type):
        documented = own.split("Args:")[-1]
        asked = [p for p in inspect.signature(thing).parameters if p not in ("self",)]
        missing = [p for p in asked if not re.search(rf"\*{{0,2}}\b{p}\b", documented)]
        assert len(asked) <= 1 or "Args:" not in own or missing == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_module_and_public_definition_is_documented(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree)
    kinds = (ast.FunctionDef, ast.ClassDef)
    missing = [
        n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)
    ]
    assert missing == []


def test_the_public_names_are_sorted_and_complete() -> None:
    assert sorted(set(fxgraft.__all__)) == sorted(fxgraft.__all__)
    public = {n for n, v in vars(fxgraft).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(fxgraft.__all__) - {"__version__"}


def test_every_module_can_be_imported() -> None:
    for module in pkgutil.walk_packages(fxgraft.__path__, "fxgraft."):
        if ".integrations" not in module.name and not module.name.endswith("__main__"):
            assert importlib.util.find_spec(module.name) is not None
