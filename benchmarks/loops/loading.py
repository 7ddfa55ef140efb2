"""Reading PACS-like images from folders and tars into memory, in a fixed order."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

import torch

from benchmarks.loops.domains import Domain
from benchmarks.loops.images import decode
from benchmarks.loops.sources import find_sources
from fxgraft.errors import ConfigError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

# The images of one domain before decoding: by class, what to call an image in an error and how to open it.
_Members = dict[str, list[tuple[str, Callable[[], IO[bytes]]]]]


def load_domains(
    path: str | os.PathLike[str], size: int, *, limit: int | None = None, seed: int = 0
) -> tuple[Domain, ...]:
    """Read PACS-like data into memory.

    `path` is one of

    - a directory of domains, each a directory of class folders: ``photo/dog/1.jpg``;
    - a directory with one tar of class folders per domain: ``pacs96_photo.tar`` holds ``dog/1.jpg``.
      What the names have in common up to a ``_``, ``-`` or ``.`` is left out: the domain is ``photo``.
      If every tar belongs to one of several such families, as when ``cifar10_train.tar`` and
      ``cifar10_test.tar`` lie beside four ``pacs96_*.tar``, the largest family is read;
    - a pattern in the last part: ``data/pacs96_*.tar``;
    - one tar of class folders: a single domain, named after the file.

    Images are cropped about their centre to a square and resized (bicubic). Nothing is extracted to
    disk. Domains, classes and images are in sorted order, so two calls give equal tensors.

    Args:
        path: see above.
        size: side of the images in pixels.
        limit: at most this many images per class and domain, chosen at random; None reads all.
        seed: chooses the images when there is a limit.

    Returns:
        One domain or more, sorted by name; images (N, 3, size, size) uint8.

    Raises:
        ConfigError: if nothing is found, an image cannot be decoded, images lie outside class folders,
            a class folder is empty, the path mixes folders and tars, or the domains differ in their classes.
    """
    if size < 1:
        raise ConfigError(f"size must be at least 1 pixel, got {size}.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 image per class, or None for all, got {limit}.")
    sources = find_sources(Path(path))
    domains = tuple(_load(name, source, size, limit, seed) for name, source in sorted(sources.items()))
    _check_same_classes(domains)
    return domains


def _check_same_classes(domains: Sequence[Domain]) -> None:
    union = set().union(*(domain.classes for domain in domains))
    lines = [
        f"  {domain.name} lacks {', '.join(sorted(union - set(domain.classes)))}"
        for domain in domains
        if union - set(domain.classes)
    ]
    if lines:
        raise ConfigError(
            "The domains must have the same classes, and they differ:\n"
            + "\n".join(lines)
            + "\nRename or add the class folders, or pick the right files with a pattern."
        )


def _load(name: str, source: Path, size: int, limit: int | None, seed: int) -> Domain:
    """Read one domain; the images chosen by `limit` are decided before any is decoded."""
    try:
        if source.is_dir():
            return _decode(name, source, _folder_members(source), size, limit, seed)
        with tarfile.open(source) as archive:
            return _decode(name, source, _tar_members(source, archive), size, limit, seed)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(f"Cannot read {source}: {error}") from error


def _folder_members(source: Path) -> _Members:
    entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    stray = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if stray:
        raise _stray_images(source, stray[0])
    return {
        folder.name: [
            (str(image), partial(image.open, "rb"))
            for image in sorted(folder.iterdir())
            if image.is_file() and _is_image(image.name)
        ]
        for folder in entries
        if folder.is_dir()
    }


def _tar_members(source: Path, archive: tarfile.TarFile) -> _Members:
    members: _Members = {}
    # Names only ever become labels: nothing is written, so an absolute path or a `..` leads nowhere.
    for info in sorted(archive.getmembers(), key=lambda info: info.name):
        place = PurePosixPath(info.name)
        # Links and devices are passed over with everything else that is not a regular image file.
        if not info.isreg() or not _is_image(place.name):
            continue
        if place.parent.name in ("", ".", ".."):
            raise _stray_images(source, info.name)
        image = (f"{source}:{info.name}", partial(_open_member, archive, info))
        members.setdefault(place.parent.name, []).append(image)
    return members


def _open_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(info)
    return BytesIO() if stream is None else stream


def _is_image(name: str) -> bool:
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _stray_images(source: Path, example: str) -> ConfigError:
    return ConfigError(
        f"{source} has images outside class folders ({example}).\n"
        "A domain holds class folders and nothing beside them: `domain/class/*.jpg`. If the folders here "
        "are classes, pass the directory above."
    )


def _decode(name: str, source: Path, members: _Members, size: int, limit: int | None, seed: int) -> Domain:
    if not members:
        raise ConfigError(f"{source} holds no class folders with images.")
    empty = [label for label, images in members.items() if not images]
    if empty:
        raise ConfigError(f"{source} has classes without images: {', '.join(empty)}.")
    generator = torch.Generator().manual_seed(seed)
    classes = tuple(sorted(members))
    images: list[torch.Tensor] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        chosen = members[class_name]
        if limit is not None:
            order = torch.randperm(len(chosen), generator=generator)[:limit]
            chosen = [chosen[index] for index in sorted(order.tolist())]
        images.extend(decode(shown, opened, size) for shown, opened in chosen)
        labels.extend([label] * len(chosen))
    return Domain(name, torch.stack(images), torch.tensor(labels), classes)
