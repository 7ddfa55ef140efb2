"""``fxgraft merge``: what trainings leave behind becomes a file that timm reads."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from typer.testing import CliRunner

import fxgraft
from fxgraft.cli.commands import app
from fxgraft.cli.merging import read_checkpoint
from models.toys import net
from sweeping import some

NAME, CLASSES, SIZE = "resnet18", 5, 64


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["merge", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def trained(method: str | None = "mixmo", **options: Any) -> nn.Module:
    """A patched model whose tensors, those of the graft included, are not what they started as."""
    model = timm.create_model(NAME, num_classes=CLASSES)
    if method is not None:
        fxgraft.patch(model, method, input_size=(3, SIZE, SIZE), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def saved_by_timm(model: nn.Module, folder: Path, ema: nn.Module | None = None) -> Path:
    """Save as timm's train.py does."""
    arguments = argparse.Namespace(model=NAME, num_classes=CLASSES, in_chans=None, model_kwargs={}, lr=0.1)
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=arguments,
        model_ema=ema,
        checkpoint_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=0.5)
    return folder


def check(out: Path, expected: nn.Module, message: str) -> None:
    found = timm.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(out)).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(found(x), expected.eval()(x), rtol=1e-4, atol=1e-4)
    assert f"num_classes={CLASSES}" in message
    built = re.search(r"timm\.create_model\(.*\)", message)
    assert built is not None
    assert eval(built.group(), {"timm": timm}).fc.out_features == CLASSES


@pytest.mark.parametrize("which", some(["folder", "file"], 1))
@pytest.mark.parametrize(
    ("method", "options", "specs"),
    [
        ("mixmo", {"members": 3}, ["mixmo:members=3"]),
        ("rsc", {"layer": "layer4"}, ["rsc:layer=layer4"]),
        (None, {}, []),
    ],
)
def test_a_run_of_timms_script(
    method: str | None, options: dict[str, Any], specs: list[str], which: str, tmp_path: Path
) -> None:
    model = trained(method, **options)
    source = saved_by_timm(model, tmp_path)
    out = tmp_path / "stock.safetensors"
    grafts = [word for spec in specs for word in ("--graft", spec)]
    source = source if which == "folder" else source / "last.pth.tar"
    check(out, model, run(source, "--out", out, "--input-size", SIZE, *grafts))


def test_a_wrapped_runs_averaged_weights(tmp_path: Path) -> None:
    model = trained()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.fc.weight.zero_()  # type: ignore[union-attr,operator]
    source, out = saved_by_timm(model, tmp_path, ema), tmp_path / "stock.safetensors"
    options = ("--out", out, "--graft", "mixmo", "--input-size", SIZE)
    check(out, ema.module, run(source, *options, "--ema"))
    check(out, model, run(source, *options))


def test_a_file_of_save(tmp_path: Path) -> None:
    model = trained("mixmo", members=2)
    file = fxgraft.save(model, tmp_path / "run.safetensors")
    out = tmp_path / "new" / "stock.safetensors"
    check(out, model, run(file, "--out", out))
    check(out, model, run(file, "--model", NAME, "--out", out))
    error = run(file, "--graft", "mixmo", "--out", out, code=2)
    assert "says itself which grafts" in error


def test_a_file_of_a_model_of_ones_own_has_to_be_merged_in_python(tmp_path: Path) -> None:
    file = fxgraft.save(fxgraft.patch(net(), "rsc", layer="stage1", input_size=(3, 8, 8)), tmp_path)
    assert "does not say which model" in run(file, "--out", tmp_path / "stock.safetensors", code=2)


@pytest.mark.parametrize("prefix", some(["module._orig_mod.", "module.", ""], 1))
def test_a_plain_state_dict(prefix: str, tmp_path: Path) -> None:
    model = trained("mixmo")
    file, out = tmp_path / "weights.pt", tmp_path / "stock.safetensors"
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, file)
    check(out, model, run(file, "--model", NAME, "--graft", "mixmo", "--input-size", SIZE, "--out", out))


ERRORS: dict[str, tuple[tuple[object, ...], str]] = {
    "no model": (("plain.pt",), "does not say which model.*--model NAME"),
    "not there": (("nothing.pt",), "cannot be read: No such file"),
    "empty folder": (("empty",), r"neither what fxgraft.save writes.*model_best\.pth\.tar or last\.pth\.tar"),
    "no checkpoint": (("text.pt",), "cannot be read"),
    "code": (("code.pt", "--model", NAME), "cannot be read"),
    "no weights": (("odd.pt", "--model", NAME), "no weights that can be told.*'epoch'"),
    "a list": (("list.pt", "--model", NAME), "holds a list"),
    "no graft given": (("plain.pt", "--model", NAME), "has tensors of 'mixmo'.*--graft mixmo:key=value"),
    "another model": (
        ("plain.pt", "--model", "resnet10t", "--graft", "mixmo"),
        "missing.*unexpected.*--graft",
    ),
    "not foldable": (
        ("selfnorm.pt", "--model", NAME, "--graft", "selfnorm"),
        "stock weights cannot express it",
    ),
    "no method": (("plain.pt", "--model", NAME, "--graft", "mixmi"), "no method 'mixmi'.*'mixmo'"),
    "grammar": (
        ("plain.pt", "--model", NAME, "--graft", "mixmo:members"),
        "METHOD:key=value,.*for example rsc",
    ),
    "reserved": (
        ("plain.pt", "--model", NAME, "--graft", "mixmo:dry_run=True"),
        "'dry_run'.*isn.t an option",
    ),
    "no average": (("plain.pt", "--model", NAME, "--ema"), "no averaged weights"),
    "suffix": (("plain.pt", "--model", NAME, "--out", "stock.pth"), r"must end in \.safetensors"),
    "a word": (("word.pt", "--model", NAME), r"cannot be read"),
    "an empty file": (("empty.pt", "--model", NAME), r"cannot be read: "),
    "folder for a file": (("plain.pt", "--model", NAME, "--out", "."), r"Pass 'model\.safetensors'"),
    "no place": (
        ("plain.pt", "--model", NAME, "--graft", "mixmo", "--out", "text.pt/stock.safetensors"),
        "Cannot write",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("errors")
    torch.save(trained().state_dict(), place / "plain.pt")
    (place / "word.pt").write_text("hello")
    (place / "empty.pt").touch()
    torch.save(trained("selfnorm").state_dict(), place / "selfnorm.pt")
    torch.save({"state_dict": run}, place / "code.pt")
    torch.save({"epoch": 3, "names": ["a"]}, place / "odd.pt")
    torch.save([1], place / "list.pt")
    (place / "text.pt").write_text("no checkpoint")
    (place / "empty").mkdir()
    return place


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_plain_message(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments, message = ERRORS[what]
    before = sorted(folder.rglob("*"))
    error = run(*arguments, code=2)
    assert re.search(message, error, re.DOTALL), error
    assert "Traceback" not in error
    assert sorted(folder.rglob("*")) == before


def test_checkpoints_say_what_they_were_built_with(tmp_path):
    weights = {"fc.weight": torch.ones(2, 3)}
    given = argparse.Namespace(model="resnet18", num_classes=2, in_chans=1, model_kwargs={"width": 8})
    torch.save({"state_dict": weights, "args": given}, tmp_path / "last.pth.tar")
    trained = read_checkpoint(tmp_path)
    assert (trained.model, trained.classes, trained.options) == ("resnet18", 2, {"width": 8, "in_chans": 1})
    save_file(
        {f"module._orig_mod.{key}": value for key, value in weights.items()}, tmp_path / "w.safetensors"
    )
    plain = read_checkpoint(tmp_path / "w.safetensors")
    assert (plain.model, list(plain.weights)) == (None, ["fc.weight"])
