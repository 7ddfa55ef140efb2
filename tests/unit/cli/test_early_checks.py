"""What the command line refuses before it imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxgraft
from fxgraft.cli.early_checks import own_method_names

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["timm"] = None  # an import fails
sys.argv = ["fxgraft", *sys.argv[1:]]
from fxgraft.cli.commands import app
app()
"""


def test_the_names_are_those_of_the_registry() -> None:
    own = {name for name, cls in fxgraft.methods().items() if cls.__module__.startswith("fxgraft.")}
    assert own_method_names() == own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("info rcs", "There is no method 'rcs'. Close matches: 'rsc'"),
        ("bench resnet18 --graft rcs", "There is no method 'rcs'"),
        ("bench resnet18 --graft rsc:layer", "is not key=value"),
        ("bench resnet18 --graft-file nowhere.yaml", "No such file"),
        ("show resnet18 --graft selfnrom", "Close matches: 'selfnorm'"),
        ("show rsc nowhere.jpg", "'nowhere.jpg' cannot be read: No such file"),
        ("show rcs pyproject.toml", "There is no method 'rcs'"),
        ("show rsc pyproject.toml --weights nowhere.pt", "'nowhere.pt' cannot be read: No such file"),
        ("merge nowhere.safetensors", "'nowhere.safetensors' cannot be read: No such file"),
        ("merge pyproject.toml --graft 'rsc + rcs'", "There is no method 'rcs'"),
    ],
)
def test_mistakes_that_need_no_torch(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    arguments = [word.strip("'") for word in words.replace("rsc + rcs", "rsc|rcs").split()]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *(word.replace("|", " + ") for word in arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(fxgraft.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
