"""Installs the methods of `third_party` as a package of their own, without a build and without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

HERE = Path(__file__).parent / "third_party"
PACKAGE = "fxgraft_third_party"
METHODS = {"mixstyle": "MixStyle", "manifold_mixup": "ManifoldMixup"}


def install(folder: Path) -> Path:
    """Write the package and its metadata, with an entry point per method, as an installer would."""
    package, metadata = folder / PACKAGE, folder / f"{PACKAGE}-0.1.0.dist-info"
    for each in (package, metadata):
        each.mkdir(parents=True)
    (package / "__init__.py").touch()
    points = []
    for name, cls in METHODS.items():
        shutil.copy(HERE / f"{name}.py", package)
        points.append(f"{name} = {PACKAGE}.{name}:{cls}")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fxgraft-third-party\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[fxgraft.patches]\n" + "\n".join(points) + "\n")
    return folder
