"""Files with a list of grafts: ``--graft-file grafts.yaml``."""

from __future__ import annotations

from pathlib import Path

import yaml

from fxgraft.errors import ConfigError
from fxgraft.spec import PatchSpec, describe, parse_grafts


def read_graft_file(path: Path) -> list[PatchSpec]:
    """Read a YAML (or JSON) list of grafts: each a text as on the command line, or ``{method: rsc, layer: layer4}``.

    Raises:
        ConfigError: the file cannot be read, or an entry isn't a graft.
    """
    return [spec for entry in read_entries(path) for spec in entry]


def read_entries(path: Path) -> list[list[PatchSpec]]:
    """Read such a list entry by entry: an entry may hold several grafts, "rsc + selfnorm"."""
    form = "Write one graft a line, as - rsc:layer=layer4, or as - {method: rsc, layer: layer4}."
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"The graft file {str(path)!r} cannot be read: {reason}\n{form}") from error
    if not isinstance(content, list) or not content:
        raise ConfigError(f"The graft file {str(path)!r} isn't a list of grafts.\n{form}")
    entries: list[list[PatchSpec]] = []
    for entry in content:
        if isinstance(entry, str):
            entries.append(parse_grafts(entry))
            continue
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("method"), str)
            or not all(isinstance(key, str) and key not in ("model", "dry_run") for key in entry)
        ):
            raise ConfigError(f"{entry!r} in the graft file {str(path)!r} isn't a graft.\n{form}")
        options = {key: value for key, value in entry.items() if key != "method"}
        entries.append([PatchSpec(describe(entry["method"], options), entry["method"], options)])
    return entries
