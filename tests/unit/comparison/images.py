"""Small images of two classes in three domains, as they lie on disk."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import torch
from PIL import Image

CLASSES = ("bars", "dots")
DOMAINS = ("blue", "green", "red")


def picture(label: int, domain: int, number: int, size: int = 24) -> Image.Image:
    """Bars or dots in one colour, a little different each time."""
    generator = torch.Generator().manual_seed(1000 * domain + 10 * number + label)
    pixels = 0.3 * torch.rand(size, size, 3, generator=generator)
    step = 4 + number % 2
    if label:
        pixels[::step, ::step, domain] = 1.0
    else:
        pixels[:, ::step, domain] = 1.0
    return Image.fromarray((255 * pixels).byte().numpy())


def png(*of: int) -> bytes:
    stream = io.BytesIO()
    picture(*of).save(stream, "PNG")
    return stream.getvalue()


def write_domains(root: Path, domains: tuple[str, ...] = DOMAINS, count: int = 8) -> Path:
    """Write ``domain/class/number.png``."""
    for domain, name in enumerate(domains):
        write_classes(root / name, domain, count)
    return root


def write_classes(root: Path, domain: int = 0, count: int = 8) -> Path:
    """Write ``class/number.png``."""
    for label, kind in enumerate(CLASSES):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / kind / f"{number}.png").write_bytes(png(label, domain, number))
    return root


def write_tar(path: Path, folder: Path) -> Path:
    """Pack the files of a folder into a tar."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        archive.add(folder, arcname=".")
    return path
