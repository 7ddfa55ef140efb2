"""Installs the methods of `third_party` as a package of their own, without a build and without a network."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent / "third_party"
PACKAGE = "fxgraft_third_party"
_PROJECT = (HERE / "pyproject.toml").read_text()
POINTS = dict(re.findall(rf'^(\w+) = "({PACKAGE}\.\w+:\w+)"$', _PROJECT, re.MULTILINE))
"""The entry points that the package's own pyproject.toml declares."""
METHODS = tuple(POINTS)


def install(folder: Path) -> Path:
    """Write the package and its metadata, entry points included, as an installer would."""
    package, metadata = folder / PACKAGE, folder / f"{PACKAGE}-0.1.0.dist-info"
    for each in (package, metadata):
        each.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in METHODS:
        shutil.copy(HERE / f"{name}.py", package)
    points = "\n".join(f"{name} = {point}" for name, point in POINTS.items())
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fxgraft-third-party\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[fxgraft.patches]\n{points}\n")
    return folder
