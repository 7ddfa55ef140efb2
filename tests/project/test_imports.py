"""What importing costs: the command line and the bare package load no more than they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fxgraft

HEAVY = ("torch", "timm", "torchvision", "numpy", "sklearn", "matplotlib", "lightning", "fxgraft.api")
SOURCE = str(Path(fxgraft.__file__).parents[1])


def loaded_after(code: str) -> set[str]:
    """Run code in a new process; return which heavy modules it has loaded."""
    script = (
        f"import sys; sys.path.insert(0, {SOURCE!r})\n{code}\n"
        f"print('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


COMMANDS = """
import sys
from fxgraft.cli.commands import app
for arguments, code in {calls!r}:
    try:
        app(arguments)
    except SystemExit as left:
        assert left.code == code, (arguments, left.code)
    assert not [name for name in {heavy!r} if name in sys.modules], arguments
"""


def test_help_and_mistakes_load_nothing() -> None:
    """All in one process, since starting it is most of the time."""
    helps = ("demo", "compare", "sites", "suggest", "info", "bench", "merge", "show")
    calls = [
        (["--help"], 0),
        (["--version"], 0),
        *(([command, "--help"], 0) for command in helps),
        (["show", "effect", "--help"], 0),
        (["sites", "--no-such-option"], 2),
        (["no-such-command"], 2),
    ]
    assert loaded_after(COMMANDS.format(calls=calls, heavy=HEAVY)) == set()


def test_the_package_is_empty_until_it_is_asked() -> None:
    light = "import fxgraft; assert fxgraft.__version__; hasattr(fxgraft, '__wrapped__')"
    assert (
        loaded_after(f"{light}; import fxgraft.errors; from fxgraft import errors; errors.ConfigError")
        == set()
    )
    loaded = loaded_after("import fxgraft; fxgraft.patch")
    assert loaded >= {"torch", "timm", "fxgraft.api"}
    assert not {"lightning", "sklearn", "matplotlib"} & loaded


@pytest.mark.parametrize(
    "code",
    [
        "from fxgraft import *; patch, RSC, SiteError",
        "import fxgraft; fxgraft.extend.Unit; fxgraft.patches.registry.build",
        pytest.param("from fxgraft import patch, extend; extend.Unit", marks=pytest.mark.sweep),
        pytest.param(
            "from fxgraft.api import patch; import timm; patch(timm.create_model('resnet10t'), 'rsc', layer=-1)",
            marks=pytest.mark.sweep,
        ),
    ],
)
def test_names_are_found_in_every_way(code: str) -> None:
    assert "torch" in loaded_after(code)


def test_all_names_are_listed() -> None:
    assert dir(fxgraft) == sorted(fxgraft.__all__)
    assert {"patch", "unpatch", "loss", "extra_loss", "load_backbone", "RSC", "SiteError"} <= set(
        dir(fxgraft)
    )
    assert all(getattr(fxgraft, name) is not None for name in fxgraft.__all__)


@pytest.mark.parametrize("name", ["pathc", "_hidden", "annotations"])
def test_what_is_not_there_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"module 'fxgraft' has no attribute '{name}'"):
        getattr(fxgraft, name)
