"""Which files hold which domain: from the path a user gives to one folder or tar per domain."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fxgraft.errors import ConfigError, candidates

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def find_sources(path: Path) -> dict[str, Path]:
    """Find the tar or the folder of each domain, by the domain's name.

    Raises:
        ConfigError: there is nothing, or it is not clear which files belong together.
    """
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
