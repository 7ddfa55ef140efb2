"""An exception at any line: Ctrl-C, a full memory, a full disk. A model is then as before or as after."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import fxgraft
from fxgraft.graph.grafting import passes
from fxgraft.graph.tracing import whole
from fxgraft.graph.tracing.editing import After, Output
from toys import Net, Toy, assert_same, images, net, state_of_everything

HOME = str(Path(fxgraft.__file__).parent)
SIZE = (3, 8, 8)
CALL, CHECKPOINT = nn.Module.__call__, torch.utils.checkpoint.checkpoint
INSIDE = Toy(at=(("stage1.0", After("conv1")), ("stage2", Output())), factor=3, learned=True)


class Lines:
    """Notes the lines of fxgraft that a block runs, and raises at one of them."""

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        self.at, self.error = at, error
        self.places: list[tuple[str, int]] = []

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.places) - 1 == self.at and self.error is not None:
                raise self.error
        return self._line

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(HOME) else None

    def __enter__(self) -> Lines:
        self.before = sys.gettrace()  # a measurement of coverage, perhaps
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)


def bare() -> nn.Module:
    return net().eval()


def stacked() -> nn.Module:
    model = fxgraft.patch(bare(), INSIDE, name="first")
    model.stage1.add_module("later", nn.Identity())  # behind the unit, among the children
    return fxgraft.patch(model, Toy(factor=2), name="second")


ACTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "patch": (bare, lambda m: fxgraft.patch(m, INSIDE, name="first")),
    "patch taps": (bare, lambda m: fxgraft.patch(m, "taps", layers="stage1.0", input_size=SIZE)),
    "patch another": (stacked, lambda m: fxgraft.patch(m, Toy(factor=5), name="third")),
    "unpatch one": (stacked, lambda m: fxgraft.unpatch(m, "second")),
    "unpatch": (stacked, fxgraft.unpatch),
    "sites": (stacked, lambda m: fxgraft.sites(m, input_size=SIZE)),
    "dry run": (stacked, lambda m: fxgraft.patch(m, Toy(factor=5), name="third", dry_run=True)),
    "merge": (lambda: fxgraft.patch(bare(), "rsc", layer="stage2", input_size=SIZE), fxgraft.merge),
}
LOOKS = ("sites", "dry run", "merge")


def seen(model: nn.Module) -> tuple[list[str], torch.Tensor]:
    return [g.name for g in fxgraft.grafts(model)], model(images())


@functools.cache
def after(act: str) -> tuple[list[str], torch.Tensor]:
    make, do = ACTS[act]
    model = make()
    do(model)
    return seen(model)


@contextmanager
def nothing_else_changes() -> Iterator[None]:
    chance, torch_chance = random.getstate(), torch.get_rng_state()
    yield
    assert nn.Module.__call__ is CALL
    assert torch.utils.checkpoint.checkpoint is CHECKPOINT
    assert not getattr(passes._running, "stack", ())
    assert not whole._lock._is_owned()
    assert random.getstate() == chance
    assert torch.equal(torch.get_rng_state(), torch_chance)


def check(act: str, at: int, kind: type[BaseException]) -> None:
    """Raise at one line of an act; then the model is as before or as after, and works."""
    make, do = ACTS[act]
    model = make()
    before, everything = seen(model), state_of_everything(model)
    searched = False
    with nothing_else_changes():
        try:
            with Lines(at, kind("injected")):
                do(model)
        except kind:
            pass
        except fxgraft.FxgraftError:  # what a search makes of a failure in its middle
            searched = True
        assert issubclass(kind, Exception) or not searched
        now, expected = seen(model), before
        if act not in LOOKS and now[0] != before[0]:
            expected = after(act)
        assert now[0] == expected[0]
        assert torch.equal(now[1], expected[1])
    if expected is before:
        assert_same(everything, state_of_everything(model))
    # It can still be worked with, and all can be taken off.
    if fxgraft.grafts(model):
        fxgraft.unpatch(model)
    assert not [
        n for n, m in model.named_modules() if "_fxgraft" in m.__dict__ or "Grafted" in type(m).__name__
    ]
    assert list(model.state_dict()) == list(net().state_dict())


def lines_of(act: str) -> list[tuple[str, int]]:
    make, do = ACTS[act]
    do(make())  # what is found once and remembered is remembered
    model = make()
    with Lines() as lines:
        do(model)
    return lines.places


def interrupt(act: str, kind: type[BaseException], count: int) -> None:
    """Interrupt an act at some of its lines, the same ones in every run."""
    places = range(len(lines_of(act)))
    for at in random.Random(f"{act} {kind.__name__}").sample(places, min(count, len(places))):
        check(act, at, kind)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("act", ACTS)
def test_an_interruption_at_some_lines(act: str) -> None:
    interrupt(act, KeyboardInterrupt, 6)


# What is raised in a finaliser goes nowhere: Python reports it and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "count"), [(KeyboardInterrupt, 60), (MemoryError, 20), (OSError, 20)])
@pytest.mark.parametrize("act", ACTS)
def test_an_interruption_at_more_lines(act: str, kind: type[BaseException], count: int) -> None:
    interrupt(act, kind, count)


# Names like those of grafts, and forwards set on instances.


class Named(Net):
    """Has layers of its own that are called as grafts are."""

    def __init__(self) -> None:
        super().__init__()
        self.graft_own = nn.Conv2d(8, 8, 1)
        self.stage1[0].graft_layer = nn.Linear(2, 2)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stage2(self.down(self.stage1(self.graft_own(self.stem(x)))))


def test_layers_that_are_called_as_grafts_are_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Named().eval()
    bare, keys = model(images()), list(model.state_dict())
    fxgraft.patch(model, "selfnorm", input_size=SIZE)
    fxgraft.patch(model, "rsc", layer="stage1", input_size=SIZE)
    out = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), out)
        assert list(fxgraft.unpatch(twin).state_dict()) == keys
        assert torch.equal(twin(images()), bare)
    fxgraft.save(model, tmp_path)
    assert torch.equal(fxgraft.load(Named().eval(), tmp_path)(images()), out)
    fxgraft.unpatch(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images()), bare)


def test_a_taken_name_is_refused() -> None:
    model = Named()
    before = state_of_everything(model)
    with pytest.raises(fxgraft.SiteError, match=r"'own' would put its unit where Named has 'graft_own'"):
        fxgraft.patch(model, Toy(at=(("", Output()),), learned=True), name="own")
    assert_same(before, state_of_everything(model))
    assert fxgraft.unpatch(fxgraft.patch(model, Toy(learned=True), name="own_2")) is model


@pytest.mark.parametrize("part", ["", "stage1.0"])
def test_a_forward_set_on_the_instance_afterwards(part: str) -> None:
    model = fxgraft.patch(bare(), INSIDE, name="first")
    module = model.get_submodule(part)
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before, out = state_of_everything(model), model(images())
    for act in (
        fxgraft.unpatch,
        fxgraft.sites,
        copy.deepcopy,
        fxgraft.merge,
        pickle.dumps,
        lambda m: fxgraft.patch(m, Toy(factor=5), name="third"),
    ):
        with pytest.raises(fxgraft.FxgraftError):
            act(model)
        assert_same(before, state_of_everything(model))
    for act in (fxgraft.unpatch, copy.deepcopy):
        with pytest.raises(
            fxgraft.WrappedModelError, match=r"a forward of its own after(?s:.*)del module\.forward"
        ):
            act(model)
    assert torch.equal(model(images()), out)
    module.forward = own  # as accelerate leaves it
    assert torch.equal(copy.deepcopy(model)(images()), out)
    assert torch.equal(fxgraft.unpatch(model)(images()), bare()(images()))
    assert "forward" not in module.__dict__


# Files.


def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return fxgraft.save(fxgraft.patch(bare(), "selfnorm", input_size=SIZE), tmp_path / "saved")


def refuses(folder: Path) -> None:
    model = bare()
    before = state_of_everything(model)
    start = time.monotonic()
    with pytest.raises(fxgraft.RecipeError):
        fxgraft.load(model, folder)
    assert time.monotonic() - start < 20
    assert_same(before, state_of_everything(model))


def rewritten(folder: Path, **changes: Any) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    del recipe["sha256"]
    (folder / "recipe.json").write_text(json.dumps({**recipe, **changes}))


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_between_its_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    folder = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = fxgraft.patch(bare(), "selfnorm", input_size=SIZE)
    replace = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith("recipe.json.part"):
            raise failure
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(failure):
        fxgraft.save(other, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_save_that_is_killed_between_its_moves_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    other = fxgraft.save(fxgraft.patch(net(), "selfnorm", input_size=SIZE), tmp_path / "other")
    (other / "weights.safetensors").replace(folder / "weights.safetensors")
    refuses(folder)
    rewritten(folder)  # a recipe of an earlier release, without digests
    fxgraft.load(bare(), folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    whole_file = (folder / name).read_bytes()
    content = json.loads((folder / "recipe.json").read_text())
    chance = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole_file)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            same = name == "recipe.json" and json.loads(damaged) == content  # blanks between entries
        except ValueError:
            same = False
        if not same:
            refuses(folder)


GRAFT = {"name": "mixmo", "method": "mixmo", "options": {}, "input_size": list(SIZE)}
MALFORMED: dict[str, dict[str, Any]] = {
    "size": {"grafts": [{**GRAFT, "input_size": 5}]},
    "size of text": {"grafts": [{**GRAFT, "input_size": ["a", 1, 2]}]},
    "huge size": {"grafts": [{**GRAFT, "input_size": [3, 10**18, 8]}]},
    "head": {"grafts": [{**GRAFT, "method": "diversification", "options": {"head": {"a": [1]}}}]},
    "head of numbers": {"grafts": [{**GRAFT, "method": "diversification", "options": {"head": [3, None]}}]},
    "progress": {"progress": float("nan")},
    "progress outside": {"progress": 1.5},
    "progress that is none": {"progress": True},
    "huge count": {"grafts": [{**GRAFT, "options": {"members": 10**19}}]},
    "large count": {"grafts": [{**GRAFT, "options": {"members": 10**6}}]},
    "count of text": {"grafts": [{**GRAFT, "options": {"members": "2"}}]},
    "huge float": {"grafts": [{**GRAFT, "options": {"p": 1e308}}]},
    "options in options": {"grafts": [{**GRAFT, "method": "rsc", "options": {"layer": {"a": 1}}}]},
    "unknown entry": {"verison": 1},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_recipe(tmp_path: Path, case: str) -> None:
    folder = saved(tmp_path)
    rewritten(folder, **MALFORMED[case])
    refuses(folder)


def test_a_deeply_nested_recipe(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "recipe.json").write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")
    refuses(folder)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_load_that_fails_half_way_in(tmp_path: Path, error: BaseException) -> None:
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            raise error

    folder = saved(tmp_path)
    model = bare()
    with torch.no_grad():
        model.stem.first.weight.add_(1)
    model.fc.__class__ = Refuses
    before = state_of_everything(model)
    with pytest.raises(fxgraft.RecipeError if isinstance(error, RuntimeError) else type(error)):
        fxgraft.load(model, folder)
    assert_same(before, state_of_everything(model))


@pytest.mark.parametrize("act", ["sites", "dry run", "load"])
def test_looking_draws_nothing_and_fires_no_hook(tmp_path: Path, act: str) -> None:
    folder = saved(tmp_path)
    model = bare()
    fired: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_forward_pre_hook(lambda *_: fired.append(1))
    with nothing_else_changes():
        if act == "sites":
            fxgraft.sites(model, input_size=SIZE)
        elif act == "load":
            fxgraft.load(model, folder)
        else:
            for method, cls in fxgraft.methods().items():
                with contextlib.suppress(fxgraft.FxgraftError):  # not every method fits every network
                    fxgraft.patch(model, method, dry_run=True, input_size=SIZE, **cls.example)
    assert fired == []
