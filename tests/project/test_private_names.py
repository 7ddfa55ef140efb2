"""Private names of torch stand in one module, and each of them is there; what happens without one is as it says."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fxgraft
from fxgraft import _torch

ROOT = Path(fxgraft.__file__).parent
HERE = Path(_torch.__file__)
FILES = {file: ast.parse(file.read_text()) for file in ROOT.rglob("*.py")}
PYTHON = {"_getframe", "_fields"}  # of Python itself
OPERATORS = [*_torch.COPIES, *_torch.BATCH_NORMS, *_torch.RMS_NORMS, *_torch.SOFTMAXES, _torch.PRELU]
LATER = [
    *("_sample_dirichlet", "_assert_async"),
    *("_foreach_mul", "_foreach_mul_", "_foreach_norm", "_foreach_sub"),
]
OF_C = [
    *("_are_functorch_transforms_active", "_current_graph_task_id", "_len_torch_function_stack"),
    *("_functorch.get_interpreter_stack", "_functorch.TransformType.Vmap"),
    *("_functorch.is_functorch_wrapped_tensor", "_functorch.get_unwrapped"),
    "_autograd._top_saved_tensors_default_hooks",
]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """The private names that the library gives itself."""
    found: set[str] = set()
    for tree in FILES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) in ("self", "new", "twin", "local") else set()
            elif isinstance(node, ast.Dict):  # bodies of classes that are made
                found |= {
                    key.value
                    for key in node.keys
                    if isinstance(key, ast.Constant) and "fxgraft" in str(key.value)
                }
    return found


OWN = own_names() | PYTHON | {"_bound"}


def used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The private names that a source uses and the library does not give itself."""
    for node in ast.walk(tree):
        names: list[Any] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(each.name for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for each in node.names for part in each.name.split(".")]
        yield from ((each, node.lineno) for each in names if private(each) and each not in OWN)  # type: ignore[attr-defined]


def test_private_names_of_torch_stand_in_one_module() -> None:
    listed = {name for names in _torch.ATTRIBUTES.values() for name in names}
    found = [
        f"{file.relative_to(ROOT)}:{line} uses {name}"
        for file, tree in FILES.items()
        if file != HERE
        for name, line in used(tree)
        if name not in listed
    ]
    assert not found, f"{found}: take it in fxgraft/_torch.py, and say there what happens without it."


def test_names_are_found_in_every_form() -> None:
    source = (
        "from torch._x import y\nfrom torch import _z\nimport torch._w\ntorch._a.b\nm._c\ngetattr(m, '_d', 1)\n"
        "_not_ours = 1\nself._not_ours\nm.__dict__"
    )
    assert {name for name, _ in used(ast.parse(source))} == {"_x", "_z", "_w", "_a", "_c", "_d", "_not_ours"}


def imported() -> list[tuple[str, str]]:
    nodes = [node for node in ast.walk(FILES[HERE]) if isinstance(node, ast.ImportFrom)]
    pairs = [(str(node.module), each.name) for node in nodes for each in node.names]
    return [(module, name) for module, name in pairs if "._" in module or private(name)]


def need(there: bool, name: str) -> None:
    assert there, (
        f"torch {torch.__version__} has no {name}, which it had in {_torch.SEEN}: fxgraft/_torch.py says what for, and "
        "what happens without it."
    )


@pytest.mark.parametrize(("module", "name"), imported())
def test_torch_has_what_is_imported(module: str, name: str) -> None:
    try:
        home: Any = importlib.import_module(module)
    except ImportError:
        home = None
    there = hasattr(home, name) or importlib.util.find_spec(f"{module}.{name}") is not None
    need(there, f"{module}.{name}")


@pytest.mark.parametrize("name", sorted(OF_C))
def test_torch_has_what_is_asked_of_its_core(name: str) -> None:
    home: Any = torch._C
    for part in name.split("."):
        home = getattr(home, part, None)
    need(home is not None, f"torch._C.{name}")


@pytest.mark.parametrize("name", sorted(LATER))
def test_torch_has_the_functions_that_are_looked_up(name: str) -> None:
    need(hasattr(torch, name), f"torch.{name}")


@pytest.mark.parametrize(
    ("home", "name"), [*_torch.SETTINGS.values(), *_torch.GRADIENT_SWITCHES, *_torch.SEEDING], ids=str
)
def test_torch_has_what_its_settings_are_read_by(home: Any, name: str) -> None:
    need(hasattr(home, name), f"{home.__name__}.{name}")


@pytest.mark.parametrize("name", [name for name in vars(_torch) if name.startswith("GLOBAL_")], ids=str.lower)
def test_torch_has_lists_of_hooks_for_all_modules(name: str) -> None:
    need(vars(_torch)[name] is not _torch._NO_HOOKS, f"torch.nn.modules.module._{name.lower()}")


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_torch_has_the_operators(name: str) -> None:
    need(hasattr(torch.ops.aten, name), f"torch.ops.aten.{name}")


def holders() -> dict[str, list[Any]]:
    """Objects that have the attributes that are listed, by the name they are listed under."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    layer, replica = nn.Linear(1, 1), nn.Linear(1, 1)._replicate_for_data_parallel()
    return {
        "torch.nn.Module": [layer],
        "torch.nn.Conv2d": [nn.Conv2d(1, 1, 1)],
        "torch.Tensor": [torch.zeros(1)],
        "torch.UntypedStorage": [torch.zeros(1).untyped_storage()],
        "torch.ops.aten.relu.default": [torch.ops.aten.relu.default],
        "torch.fx.Tracer": [torch.fx.Tracer()],
        "torch.compile(...)": [torch.compile(layer, backend="eager")],
        "torch.nn.DataParallel(...)": [replica],
        "torch.distributed.fsdp.fully_shard(...)": [FSDPModule, FSDPState()],
    }


@pytest.mark.parametrize(
    ("where", "name"), [(where, name) for where, names in _torch.ATTRIBUTES.items() for name in names]
)
def test_torch_has_the_attributes(where: str, name: str) -> None:
    need(any(hasattr(each, name) for each in holders()[where]), f"{name} of {where}")


def again() -> ModuleType:
    """Run the module once more, in a torch that lacks something."""
    spec = importlib.util.spec_from_file_location("again", HERE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("module", "name"), [("torch", "_foreach_sub"), ("torch.nn.modules.conv", "_ConvNd")]
)
def test_without_what_nothing_stands_in_for_the_import_says_so(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(
        ImportError, match=rf"(?s)private name that this torch .*'{name}'.*Install a newer fxgraft"
    ):
        again()


def test_without_transforms_none_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert torch.func.vmap(lambda x: x + again().transforms_active())(torch.zeros(2)).tolist() == [0, 0]


def test_without_the_stack_of_transforms_any_is_taken_for_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.vmapped())
        return x.sum()

    seen: list[bool] = []
    torch.func.grad(inside)(torch.zeros(2))
    torch.func.vmap(inside)(torch.zeros(2))
    monkeypatch.delattr(torch._C._functorch, "TransformType")  # type: ignore[attr-defined]
    torch.func.grad(inside)(torch.zeros(2))
    assert (seen, _torch.vmapped()) == ([False, True, True], False)


def test_without_the_number_of_a_backward_pass_none_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    assert again().graph_task() == -1


def test_without_torchs_own_draw_a_distribution_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    concentration = torch.full((5, 3), 0.7)
    torch.manual_seed(1)
    usual = _torch.sample_dirichlet(concentration)
    torch.manual_seed(1)
    drawn = torch.distributions.Dirichlet(concentration).sample()
    assert torch.equal(drawn, usual)
    monkeypatch.delattr(torch, "_sample_dirichlet")
    monkeypatch.setattr(torch.distributions.Dirichlet, "rsample", lambda self, _: drawn)
    assert _torch.sample_dirichlet(concentration) is drawn


def test_without_a_way_to_ask_there_are_hooks_on_saved_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _torch.top_saved_tensors_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert _torch.top_saved_tensors_hooks() is not None
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # type: ignore[attr-defined]
    assert _torch.top_saved_tensors_hooks() is not None


def test_without_a_list_of_hooks_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.modules.module, "_global_forward_hooks")
    assert again().GLOBAL_FORWARD_HOOKS == {}
