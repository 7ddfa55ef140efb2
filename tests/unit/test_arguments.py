"""Arguments of public calls, held against the types that the calls declare."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import fxgraft
from fxgraft.arguments import check_arguments, fits, path_at
from fxgraft.comparison.data import read_data
from fxgraft.errors import ConfigError
from fxgraft.models import load_weights
from models.toys import Net, net


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [3, np.int64(3)], [True, 3.0, "3", None]),
        (float, [3, 0.5, np.float32(0.5), np.int64(1)], [False, "0.5", 1j]),
        (bool, [True], [1, "yes"]),
        (str, ["a"], [b"a", Path("a")]),
        (str | None, ["a", None], [3]),
        (str | Path, ["a", Path("a")], [None]),
        (Literal["a", "b"], ["a"], ["c", 3]),
        (Sequence[int], [[1], (1, 2), range(3), np.arange(3), []], ["12", b"12", {1}, {1: 2}, [1.5], 3]),
        (tuple[int, ...], [(3, 64), [3, 64]], [64, "64", {3, 64}]),
        (Mapping[str, Any], [{}, {"a": None}], [{1: 2}, ["a"], 3]),
        (Callable[..., Any], [len, print], ["len", None]),
        (Any, [None, 3, object()], []),
    ],
)
def test_what_fits_an_annotation(hint: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not fits(value, hint)] == []
    assert [value for value in wrong if fits(value, hint)] == []


def test_the_first_that_does_not_fit_is_named() -> None:
    def act(size: int, *, names: Sequence[str] = ()) -> None: ...

    check_arguments(act, {"size": 3, "names": ["a"], "unknown": object()})
    with pytest.raises(
        ConfigError, match=r"act: names is declared as Sequence\[str\], and got \[3\] \(list\)"
    ):
        check_arguments(act, {"size": 3, "names": [3]})


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ([np.int64(-1)], (-1,)),
        (np.array([-1]), (-1,)),
        (np.array(-1), -1),
        (range(2), (0, 1)),
        ((name for name in ["stage2"]), ("stage2",)),
    ],
)
def test_layers_become_names_and_numbers_that_a_recipe_holds(layers: Any, kept: Any) -> None:
    assert fxgraft.RSC(layers=layers).layers == kept


@pytest.mark.parametrize("layers", [{"stage1"}, {"stage1": 1}, b"stage1"])
def test_layers_without_an_order_are_refused(layers: Any) -> None:
    with pytest.raises(ConfigError, match="layers must be names or stage numbers, in order"):
        fxgraft.RSC(layers=layers)


def test_a_patch_that_was_made_takes_the_same_arguments() -> None:
    graft = fxgraft.grafts(fxgraft.patch(net(), fxgraft.RSC(layer="stage2"), input_size=[3, 16, 16]))[0]
    assert graft.input_size == (3, 16, 16)
    with pytest.raises(ConfigError, match=r"patch: name is declared as str \| None, and got 3"):
        fxgraft.patch(net(), fxgraft.RSC(), name=3)  # type: ignore[arg-type]


def test_numbers_and_sizes_of_numpy_are_taken(tmp_path: Path) -> None:
    """They are Python's from then on, so that a recipe holds them."""
    model = fxgraft.patch(
        net(), "crossnorm", p=np.float32(0.25), views=np.int64(2), input_size=np.array([3, 16, 16])
    )
    graft = fxgraft.grafts(model)[0]
    assert (type(graft.patch.p), graft.patch.p) == (float, 0.25)
    assert graft.input_size == (3, 16, 16)
    again = fxgraft.load(fxgraft.save(model, tmp_path / "run.safetensors"), net())
    assert fxgraft.grafts(again)[0].patch == graft.patch
    third = fxgraft.RSC(layer=-1, spatial_drop=Fraction(1, 3)).spatial_drop
    assert (type(third), third) == (float, 1 / 3)
    patch = fxgraft.Diversification(patch=(np.int64(3), np.int64(2)))
    assert json.dumps(patch.to_dict()["patch"]) == "[3, 2]"


def test_paths_are_of_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_at("~/runs") == tmp_path / "runs"
    assert path_at(tmp_path) == tmp_path
    torch.save(net().state_dict(), tmp_path / "net.pt")
    model = Net()
    load_weights(model, "~/net.pt")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in net().state_dict().items())
    with pytest.raises(ConfigError, match=f"There is no {tmp_path}/photos"):
        fxgraft.compare("~/photos", grafts="rsc", out=tmp_path / "out")


@pytest.mark.parametrize("path", [3, "a\0b", "x" * 5000], ids=["number", "zero byte", "long"])
def test_what_no_system_calls_a_path(path: Any) -> None:
    for act in (path_at, functools.partial(load_weights, net()), read_data):
        with pytest.raises(ConfigError, match="cannot be the path of a file"):
            act(path)
