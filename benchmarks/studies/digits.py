"""MNIST and USPS as domains: tars of class folders, out of one file of arrays."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 28


def write_digits(data: Path, cache: Path) -> Path:
    """Write ``digits.npz`` as one tar for each domain, unless they are there.

    The training and the test images of a domain go together: what is tested is the whole of the other domain. USPS
    comes in 16 pixels and is brought to 28.

    Args:
        data: folder with ``digits.npz``.
        cache: folder for the tars.

    Returns:
        The folder of the tars.
    """
    folder = cache / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(data / "digits.npz", allow_pickle=False) as arrays:
        for domain in ("mnist", "usps"):
            file, draft = folder / f"{domain}.tar", folder / f".{domain}.part"
            if file.exists():
                continue
            with tarfile.open(draft, "w") as archive:
                for part in ("train", "test"):
                    pairs = zip(arrays[f"{domain}_{part}_x"], arrays[f"{domain}_{part}_y"], strict=True)
                    for index, (pixels, label) in enumerate(pairs):
                        _add(archive, f"{label}/{part}{index:05d}.png", pixels)
            draft.rename(file)
    return folder


def _add(archive: tarfile.TarFile, name: str, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    entry = tarfile.TarInfo(name)
    entry.size = stream.tell()
    stream.seek(0)
    archive.addfile(entry, stream)
