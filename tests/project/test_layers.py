"""What the source must keep to: the direction of its imports, the size of its files, documentation."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import statistics
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

import fxgraft

ROOT = Path(fxgraft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Every file belongs to the first entry that it lies in. A file imports from rows above its own, and from its own
# row as long as no circle comes of it; `only` narrows that down.
LAYERS: list[tuple[str, ...]] = [
    (
        "_einops.py",
        "_torch.py",
        "arguments.py",
        "errors.py",
        "io/atomic_write.py",
        "io/header.py",
        "io/__init__.py",
        "io/graft_file.py",
        "io/packaged_weights.py",
        "io/reachable.py",
        "models.py",
        "spec.py",
    ),
    (
        "graph/dataflow/",
        "graph/tracing/",
        "graph/atomic.py",
        "graph/names.py",
        "graph/wrapped_models.py",
        "graph/__init__.py",
    ),
    ("graph/runtime/",),
    ("graph/structure/",),
    ("graph/grafting/",),
    (
        "functional/",
        "patches/base.py",
        "patches/blocks.py",
        "patches/options.py",
        "patches/draws.py",
        "patches/maps.py",
        "patches/registry.py",
        "patches/preset.py",
        "patches/pictures.py",
    ),
    ("extend.py", "patches/__init__.py"),
    ("patches/",),
    ("inspection.py",),
    ("api.py", "training_loss.py"),
    (
        "adaptation/",
        "io/constructor.py",
        "io/hub.py",
        "io/hub_client.py",
        "io/recipe.py",
        "io/save_load.py",
        "io/backbone_weights.py",
    ),
    ("__init__.py", "mixmo.py", "gam.py"),
    ("environment.py",),
    ("io/images.py", "viz/"),
    ("comparison/",),
    ("bench/", "integrations/", "timm/"),
    ("cli/",),
]
METHODS_USE = ("fxgraft._torch", "fxgraft.extend", "fxgraft.errors", "fxgraft.functional")
"""What a built-in method may use besides its own folder: what anybody's method may, and shared tensor functions."""


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_name(file: Path) -> str:
    parts = ("fxgraft", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def rank(file: Path) -> int:
    name = name_of(file)
    found = [row for row, layer in enumerate(LAYERS) for each in layer if name == each]
    found += [
        row for row, layer in enumerate(LAYERS) for each in layer if each[-1] == "/" and name.startswith(each)
    ]
    assert found, f"{name} has no place in LAYERS"
    return found[0]


def imports(source: str, package: str) -> set[str]:
    """Absolute names of all modules that a source imports when it runs, wherever in it the import stands."""
    found = set()
    tree = ast.parse(source)
    for branch in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(branch.test) == "TYPE_CHECKING":  # never runs
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            base = ".".join(part for part in (start, node.module or "") if part)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            # `from package import name`: the module of that name if there is one, else the package itself
            found |= {name for name in inner if name in MODULES} or {base}
    return found


def own_imports(file: Path) -> set[str]:
    package = module_name(file) if file.name == "__init__.py" else module_name(file).rpartition(".")[0]
    return {name for name in imports(file.read_text(), package) if name in MODULES}


def inside(names: set[str], *packages: str) -> set[str]:
    return {n for n in names if any(n == p or n.startswith(p + ".") for p in packages)}


def test_imports_are_seen_in_every_form() -> None:
    source = (
        "import fxgraft.api\ndef f():\n  from ..patches import draws\n  from fxgraft.patches.rsc import RSC\n"
        "if TYPE_CHECKING:\n  import fxgraft.errors"
    )
    found = imports(source, "fxgraft.graph")
    assert found == {"fxgraft.api", "fxgraft.patches.draws", "fxgraft.patches.rsc"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_import_runs_up(file: Path) -> None:
    own = rank(file)
    assert {name for name in own_imports(file) if rank(MODULES[name]) > own} == set()


def test_no_circle() -> None:
    waiting = {module_name(file): own_imports(file) - {module_name(file)} for file in FILES}
    while free := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert waiting == {}


@pytest.mark.parametrize("file", [f for f in FILES if rank(f) == LAYERS.index(("patches/",))], ids=name_of)
def test_a_method_goes_through_the_door(file: Path) -> None:
    home = ".".join(module_name(file).split(".")[:3])
    assert own_imports(file) - inside(own_imports(file), home, *METHODS_USE) == set()


@pytest.mark.parametrize("file", [f for f in FILES if "graph" in f.parts], ids=name_of)
def test_the_graph_layer_has_no_word_of_a_method(file: Path) -> None:
    words = {*fxgraft.methods(), *(cls.__name__ for cls in fxgraft.methods().values())} - {"taps", "Taps"}
    assert (
        re.findall(
            rf"\b({'|'.join(words)}|MIMO|class maps?|styles?|mut(?:e|ed|ing)|members?)\b", file.read_text()
        )
        == []
    )


def test_the_graph_layer_works_without_the_methods() -> None:
    """Import a second fxgraft that has nothing but the graph layer."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "fxgraft"}
    package = types.ModuleType("fxgraft")
    package.__path__ = [str(ROOT)]
    try:
        for name in kept:
            del sys.modules[name]
        sys.modules["fxgraft"] = package
        others = {n.split(".")[1] for n in MODULES if n.count(".")} - {"graph", "errors", "_torch", "_einops"}
        sys.modules.update({f"fxgraft.{name}": None for name in others})  # type: ignore[dict-item]
        for file in (f for f in FILES if "graph" in f.parts):
            module = importlib.import_module(module_name(file))
            assert module.__file__ == str(file)
            assert module is not kept.get(module.__name__)
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "fxgraft"]:
            del sys.modules[name]
        sys.modules.update(kept)


def test_the_house_is_one_of_small_rooms() -> None:
    lengths = [len(file.read_text().splitlines()) for file in FILES if file.name != "__init__.py"]
    assert statistics.median(lengths) < 200
    folders = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 14} == {}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 600


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
    public = [n for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"]
    missing = [
        n.name
        for n in public
        if not ast.get_docstring(n) and "overload" not in map(ast.unparse, n.decorator_list)
    ]
    assert missing == []


def test_the_public_names_are_sorted_and_complete() -> None:
    assert sorted(set(fxgraft.__all__)) == sorted(fxgraft.__all__)
    for name in fxgraft.__all__:
        getattr(fxgraft, name)  # those that are imported for themselves too
    public = {n for n, v in vars(fxgraft).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(fxgraft.__all__) - {"__version__"}


def test_every_module_can_be_imported() -> None:
    for module in pkgutil.walk_packages(fxgraft.__path__, "fxgraft."):
        if ".integrations" not in module.name and not module.name.endswith("__main__"):
            assert importlib.util.find_spec(module.name) is not None
