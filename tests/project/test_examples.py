"""The examples run as their first lines say, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxgraft
from sweeping import some

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"), key=lambda file: (file.stem != "segmentation", file.stem))


@pytest.mark.parametrize("file", some(SCRIPTS, 1), ids=lambda file: file.stem)
def test_an_example_runs(file: Path, tmp_path: Path) -> None:
    source = str(Path(fxgraft.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(file), "--quick"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("file", [*SCRIPTS, EXAMPLES / "timm_train.sh"], ids=lambda file: file.stem)
def test_an_example_is_short_and_says_how_it_is_called(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) < 80
    assert f"examples/{file.name}" in text
