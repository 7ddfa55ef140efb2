"""Files of images, in folders, tars and timm's data sets: what is one, which one it is, and how it is decoded."""

from __future__ import annotations

import functools
import os
import tarfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from fxgraft.errors import ConfigError

SCHEMES = ("torch/", "hfds/", "tfds/")
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
_LEFT_BY_TOOLS = ("__MACOSX", "__pycache__")


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: the file, the tar that holds it, or the name of a timm data set.
        member: name inside the tar, index in the data set; empty for a file.
        label: index of its class; -1 where labels do not count.
    """

    path: str
    member: str
    label: int

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path


def is_hidden(name: str) -> bool:
    """Say whether a name is of what the system or a tool keeps beside one's data."""
    return name.startswith(".") or name in _LEFT_BY_TOOLS


def is_image(name: str) -> bool:
    """Say whether a file is an image, by its name."""
    base = PurePosixPath(name)
    return not base.name.startswith(".") and base.suffix.lower() in EXTENSIONS


def open_image(item: Item) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        ConfigError: it cannot be read as an image; names it.
    """
    try:
        if _of_a_library(item.path):
            return timm_data(item.path)[int(item.member)][0].convert("RGB")
        source: IO[bytes] | Path = Path(item.path)
        if item.member:
            archive, members = opened(source)
            source = BytesIO(archive.extractfile(members[item.member]).read())  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, tarfile.TarError, Image.DecompressionBombError) as error:
        raise ConfigError(f"Cannot read {item} as an image: {error}\nRemove or replace it.") from error
    return read_rgb(source, str(item))


def _of_a_library(path: str) -> bool:
    return "#" in path and path.startswith(SCHEMES)


def version_of(item: Item) -> tuple[int, int]:
    """Return size and time of the file that holds an image, by which a changed one is told from what it was."""
    if _of_a_library(item.path):
        return 0, 0
    try:
        found = Path(item.path).stat()
    except OSError:  # whoever opens it says so
        return 0, 0
    return found.st_size, found.st_mtime_ns


_PART = 4096
"""So many bytes from the middle of a file tell it from another one of the same size."""


def content_of(path: str, member: str) -> tuple[int, int]:
    """Return the size of an image's file and a checksum of a part of it."""
    if _of_a_library(path):
        return 0, 0
    if member:
        return _contents(path, version_of(Item(path, "", 0)))[member]
    with Path(path).open("rb") as file:
        return _part_of(file)


def _part_of(file: IO[bytes]) -> tuple[int, int]:
    size = file.seek(0, os.SEEK_END)
    file.seek(size // 2)
    return size, zlib.crc32(file.read(_PART))


@functools.lru_cache(maxsize=16)
def _contents(path: str, version: tuple[int, int]) -> dict[str, tuple[int, int]]:
    archive, members = opened(Path(path))
    found = {}
    # In the order in which they lie: a way back in a .gz would begin at its start.
    for name, member in sorted(members.items(), key=lambda entry: entry[1].offset):
        if is_image(name) and not member.isdir():
            found[name] = _part_of(archive.extractfile(member))  # type: ignore[arg-type]
    return found


def opened(path: Path) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    """Return an open tar, and its members by name."""
    return _archive(str(path), os.getpid(), version_of(Item(str(path), "", 0)))


@functools.lru_cache(maxsize=16)
def _archive(
    path: str,
    process: int,  # an open file is not shared with a fork
    version: tuple[int, int],
) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    """Open a tar, and list its members by name: of two with one name the last counts, as for any program."""
    archive = tarfile.open(path)  # noqa: SIM115  (it stays open for the images)
    return archive, {member.name: member for member in archive.getmembers()}


def file_of(item: Item) -> Any:
    """Tell a file from all others, by whichever link it is reached."""
    if _of_a_library(item.path):
        return item.path, item.member
    found = Path(item.path).stat()
    return found.st_dev, found.st_ino, item.member


def holds_image(path: Path, member: tarfile.TarInfo) -> bool:
    """Say whether a member of a tar is an image, or a link to one.

    Raises:
        ConfigError: it is a link to what isn't in the tar.
    """
    if not is_image(member.name) or member.isdir():
        return False
    if member.isreg():
        return True
    try:
        return opened(path)[0].extractfile(member) is not None
    except KeyError:
        raise ConfigError(
            f"{path}:{member.name} is a link to what isn't in the archive.\nRemove it, or pack what it links to."
        ) from None


@functools.lru_cache(maxsize=16)  # opening one lists all of its images, and every image asks for it
def timm_data(place: str) -> Any:
    """Return a data set of timm's, by its name and split: ``torch/cifar10#train``."""
    from timm.data.dataset_factory import create_dataset

    name, _, split_name = place.partition("#")
    name, _, root = name.partition(":")
    return create_dataset(name, root=root or None, split=split_name, download=False)


def read_rgb(source: Path | IO[bytes], name: str) -> Image.Image:
    """Decode an image to RGB.

    Args:
        source: a file, or its open bytes.
        name: what an error calls the image.

    Raises:
        ConfigError: it cannot be read as an image; names it.
    """
    try:
        with Image.open(source) as image:
            return _with_8_bits(image).convert("RGB")
    # Pillow raises a SyntaxError for a PNG that is broken inside.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"Cannot read {name} as an image: {error}\nRemove or replace it.") from error


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8, which Pillow would cut off at 255."""
    if image.mode in ("I", "F"):
        raise ValueError("its 32 bits a pixel have no range that is known; save it with 8 or 16")
    if not image.mode.startswith("I;16"):
        return image
    import numpy as np

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
