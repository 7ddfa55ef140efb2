"""Images of several domains: an embedded set made from digits, and readers for PACS-like data.

In domain generalisation the same classes come in several styles, and a model is tested on a style it
never saw. Everything here ends up as `Domain` values: uint8 tensors in memory, in a fixed order.
"""

from __future__ import annotations

import math
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

import torch
import torch.nn.functional as F

from fxgraft.errors import ConfigError, candidates
from fxgraft.experiments.images import decode

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
DIGIT_DOMAINS = ("plain", "inverted", "thick", "sketch")

# The images of one domain before decoding: by class, what to call an image in an error and how to open it.
_Members = dict[str, list[tuple[str, Callable[[], IO[bytes]]]]]


@dataclass(frozen=True)
class Domain:
    """The images of one domain, all in memory.

    Attributes:
        name: what the domain is called, e.g. ``"sketch"``.
        images: uint8 of shape (N, 3, S, S), RGB.
        labels: int64 of shape (N,), indices into `classes`.
        classes: names of the classes, the same for every domain of a set.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, share: float, *, seed: int = 0) -> tuple[Domain, Domain]:
        """Split into a part for training and a part for validation, class by class.

        Args:
            share: what goes to the second part, in [0, 1): ``round(share · count)`` images of each class.
            seed: chooses the images; the same seed gives the same split.

        Returns:
            The two parts, each in the order of this domain.

        Raises:
            ConfigError: if `share` is outside [0, 1).
        """
        if not 0 <= share < 1:
            raise ConfigError(f"The validation share must be in [0, 1), got {share}.")
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.classes)):
            members = (self.labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=generator)
            held[members[order[: round(share * len(members))]]] = True
        parts = [Domain(self.name, self.images[k], self.labels[k], self.classes) for k in (~held, held)]
        return parts[0], parts[1]


# ------------------------------------------------------------------------------------------ digits


def digits_domains(size: int = 32, *, seed: int = 0) -> tuple[Domain, ...]:
    """Turn scikit-learn's bundled digits (1797 images of 8×8) into four domains that share no image.

    The digits of each class are shuffled and dealt out in turn, so that each image lands in exactly
    one domain and every domain has about 45 images of each class. Its style is then drawn on it:

    - ``plain``: the digit as it is, bright on black, in one faint tint per image;
    - ``inverted``: dark ink on a light coloured ground with a colour gradient and noise;
    - ``thick``: strokes widened, rotated by up to 25° and sheared, one saturated colour on another dark one;
    - ``sketch``: the outline alone, a thin dark line on white paper, with a slight tilt.

    Args:
        size: side of the images in pixels, 16 or more.
        seed: decides who goes where, and every random part of the styles.

    Returns:
        The domains in the order of `DIGIT_DOMAINS`; images (N, 3, size, size) uint8, classes "0" to "9".

    Raises:
        ConfigError: if `size` is below 16, or scikit-learn is not installed.
    """
    if size < 16:
        raise ConfigError(f"The styles need room to draw in: size must be at least 16, got {size}.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "The embedded digits come with scikit-learn, which is not installed.\n"
            'Install it with: pip install "fxgraft[demo]", or pass your own images with --data.'
        ) from error
    flat, digits = load_digits(return_X_y=True)
    # The digits touch the frame: a margin keeps tilted and widened ones inside.
    ink = F.pad(torch.as_tensor(flat).float().view(-1, 1, 8, 8) / 16, (1, 1, 1, 1))
    labels = torch.as_tensor(digits).long()
    generator = torch.Generator().manual_seed(seed)
    home = torch.empty_like(labels)
    for digit in range(10):
        members = (labels == digit).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        # The start moves on with the class: otherwise the first domains would get every odd one out.
        home[members[order]] = (torch.arange(len(members)) + digit) % len(DIGIT_DOMAINS)
    ink = F.interpolate(ink, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    classes = tuple(str(digit) for digit in range(10))
    domains = []
    for index, name in enumerate(DIGIT_DOMAINS):
        images = _STYLES[name](ink[home == index], generator).clamp(0, 1)
        domains.append(Domain(name, (images * 255).round().byte(), labels[home == index], classes))
    return tuple(domains)


def _plain(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    tint = 0.85 + 0.15 * torch.rand(len(ink), 3, 1, 1, generator=generator)
    return ink * tint


def _inverted(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count, size = len(ink), ink.shape[-1]
    corners = 0.5 + 0.5 * torch.rand(count, 3, 2, 2, generator=generator)
    ground = F.interpolate(corners, size=(size, size), mode="bilinear", align_corners=True)
    noise = 0.08 * torch.randn(count, 3, size, size, generator=generator)
    pen = 0.3 * torch.rand(count, 3, 1, 1, generator=generator)
    return ground * (1 - ink) + pen * ink + noise


def _thick(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    pen = 0.1 + 0.9 * torch.rand(len(ink), 3, 1, 1, generator=generator)
    # The strongest channel is raised to 1 so that every pen stands out against the dark ground.
    pen = pen / pen.amax(1, keepdim=True)
    ground = 0.45 * torch.rand(len(ink), 3, 1, 1, generator=generator)
    strokes = _dilate(_tilt(ink, 25, 0.4, generator), max(1, round(ink.shape[-1] / 32)))
    strokes = ((strokes - 0.4) * 4).clamp(0, 1)
    return ground * (1 - strokes) + pen * strokes


def _sketch(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    solid = ((_tilt(ink, 8, 0.1, generator) - 0.3) * 4).clamp(0, 1)
    line = _dilate(solid, 1) - solid
    paper = 1 - 0.05 * torch.rand(len(ink), 1, 1, 1, generator=generator)
    return (paper - 0.9 * line).expand(-1, 3, -1, -1)


_STYLES = {"plain": _plain, "inverted": _inverted, "thick": _thick, "sketch": _sketch}


def _dilate(ink: torch.Tensor, radius: int) -> torch.Tensor:
    return F.max_pool2d(ink, 2 * radius + 1, stride=1, padding=radius)


def _tilt(ink: torch.Tensor, degrees: float, shear: float, generator: torch.Generator) -> torch.Tensor:
    """Rotate by up to ± `degrees` and shear by up to ± `shear`, a draw per image."""
    angle, slant = (2 * torch.rand(2, len(ink), generator=generator) - 1).unbind()
    angle, slant = angle * math.radians(degrees), slant * shear
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [torch.stack([cos, slant - sin, zero], -1), torch.stack([sin, cos, zero], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


# ---------------------------------------------------------------------------------- files on disk


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
    sources = _sources(Path(path))
    domains = tuple(_load(name, source, size, limit, seed) for name, source in sorted(sources.items()))
    _check_same_classes(domains)
    return domains


def _sources(path: Path) -> dict[str, Path]:
    """From the user's path to the tar or the folder of each domain, by domain name."""
    if path.exists():
        if path.is_file():
            if not _is_tar(path):
                raise ConfigError(f"{path} is neither a directory nor a tar of class folders.")
            return {_stem(path): path}
        found = sorted(path.iterdir())
    elif any(sign in path.name for sign in "*?["):
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise ConfigError(f"Nothing matches {path}.")
    else:
        known = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ConfigError(f"There is no {path}. In {path.parent}: {candidates(path.name, known)}")
    found = [entry for entry in found if not entry.name.startswith((".", "_"))]
    folders = [entry for entry in found if entry.is_dir()]
    tars = [entry for entry in found if entry.is_file() and _is_tar(entry)]
    if folders and tars:
        raise ConfigError(
            f"{path} mixes domain folders ({folders[0].name}, …) and tars ({tars[0].name}, …).\n"
            f'Pass one kind with a pattern, for example "{path}/*.tar".'
        )
    if folders:
        return {folder.name: folder for folder in folders}
    if not tars:
        raise ConfigError(
            f"{path} holds no domains.\n"
            "It should hold folders `domain/class/*.jpg`, or one tar of class folders per domain."
        )
    return _short_names(_one_family(tars, path))


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def _stem(path: Path) -> str:
    suffix = next(
        end for end in sorted(TAR_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(end)
    )
    return path.name[: -len(suffix)]


def _one_family(tars: list[Path], path: Path) -> list[Path]:
    families: dict[str, list[Path]] = {}
    for tar in tars:
        families.setdefault(re.split(r"[_.-]", _stem(tar))[0], []).append(tar)
    # A tar that shares its first word with no other speaks for one set with plain names, not several.
    if len(families) == 1 or min(len(members) for members in families.values()) < 2:
        return tars
    ranked = sorted(families.values(), key=len, reverse=True)
    if len(ranked[0]) == len(ranked[1]):
        raise ConfigError(
            f"{path} holds several sets of the same size: {', '.join(sorted(families))}.\n"
            f'Pick one with a pattern, for example "{path}/{min(families)}*".'
        )
    return ranked[0]


def _short_names(tars: list[Path]) -> dict[str, Path]:
    stems = [_stem(tar) for tar in tars]
    # These are names, not paths: character by character is what is meant.
    shared = os.path.commonprefix(stems) if len(stems) > 1 else ""  # noqa: RUF071
    cut = max(shared.rfind(sign) for sign in "_-.") + 1
    names = [stem[cut:] for stem in stems]
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError(f"The names of the tars do not tell the domains apart: {', '.join(stems)}.")
    return dict(zip(names, tars, strict=True))


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
