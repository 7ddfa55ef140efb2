"""What the command line does without importing torch: cards, and refusing what cannot be right."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools.facts import facts
from tools.readme import own_methods

import fxgraft
from fxgraft.cli.method_facts import STORED

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["timm"] = None  # an import fails
sys.argv = ["fxgraft", *sys.argv[1:]]
from fxgraft.cli.commands import app
app()
"""


def command(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(fxgraft.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stored_facts_are_what_the_methods_say() -> None:
    live, own = facts(), tuple(f"{name}," for name in own_methods())
    for each in live.values():  # the tests install methods of another package, which are beside these
        beside = each["sections"].pop("not beside", "").splitlines()
        if kept := [line for line in beside if line.startswith(own)]:
            each["sections"]["not beside"] = "\n".join(kept)
    assert json.loads(STORED.read_text()) == live, "python -m tools.facts --write"


def test_cards_need_no_torch(tmp_path: Path) -> None:
    listed, shown = (command(words, tmp_path) for words in (["info"], ["info", "rsc"]))
    assert listed.returncode == shown.returncode == 0, listed.stderr + shown.stderr
    assert all(name in listed.stdout for name in own_methods())
    assert all(f"│ {field.name}" in shown.stdout for field in dataclasses.fields(fxgraft.RSC))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("info rcs", "There is no method 'rcs'. Close matches: 'rsc'"),
        ("bench resnet18 --graft rcs", "There is no method 'rcs'"),
        ("bench resnet18 --graft rsc:layer", "is not key=value"),
        ("bench resnet18 --graft-file nowhere.yaml", "No such file"),
        ("bench resnet18 --graft-file unknown.yaml", "There is no method 'rcs'"),
        ("bench resnet18 --graft rsc:layer=[4", "leaves a '[' open"),
        ("bench resnet18 --graft rsc --out numbers.csv", "does not end in .json"),
        ("compare images --graft-file unknown.yaml", "There is no method 'rcs'"),
        ("compare images --graft rsc:layer=4] --graft selfnorm", "closes a ']' that was never opened"),
        ("compare images --graft rsc --weights nowhere.pt", "'nowhere.pt' cannot be read: No such file"),
        ("show graph resnet18 --graft selfnrom", "Close matches: 'selfnorm'"),
        ("show effect rsc nowhere.jpg", "'nowhere.jpg' cannot be read: No such file"),
        ("show effect rcs pyproject.toml", "There is no method 'rcs'"),
        ("show effect rsc pyproject.toml --weights nowhere.pt", "'nowhere.pt' cannot be read: No such file"),
        ("merge nowhere.safetensors", "'nowhere.safetensors' cannot be read: No such file"),
        ("merge pyproject.toml --graft 'rsc + rcs'", "There is no method 'rcs'"),
    ],
)
def test_mistakes_that_need_no_torch(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "unknown.yaml").write_text("- selfnorm\n- {method: rcs, layer: layer4}\n")
    arguments = [word.strip("'") for word in words.replace("rsc + rcs", "rsc|rcs").split()]
    done = command([word.replace("|", " + ") for word in arguments], tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list(tmp_path.iterdir())) == 2, "nothing was written"
