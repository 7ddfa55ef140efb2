"""Result files: one per study and protocol, to which finished runs are added one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import Run, Study
from fxgraft.environment import environment
from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_text

FORMAT = 2
FOLDER = Path(__file__).parent / "results"


class Results:
    """The runs of a study that are done.

    An existing file of the same protocol is carried on. One of another protocol is refused, since a table over
    both would compare what cannot be compared.

    Args:
        study: whose runs.
        size: "quick" or "full".
        folder: of the file ``<study>_<size>.json``.

    Raises:
        ConfigError: if the file is of another protocol, or no result file.
    """

    def __init__(self, study: Study, size: str, folder: Path = FOLDER) -> None:
        # Through JSON and back, so that tuples compare equal to the lists of a file.
        self.protocol: dict[str, Any] = json.loads(json.dumps(study.protocols[size]))
        self.study, self.size = study, size
        self.path = folder / f"{study.name}_{size}.json"
        self.environments: list[dict[str, Any]] = []
        self.runs: list[Run] = []
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            known = found["protocol"]
            self.environments, self.runs = list(found["environments"]), list(found["runs"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is no result file ({error!r}).\nMove it away.") from error
        names = {*known, *self.protocol}
        differing = sorted(name for name in names if known.get(name) != self.protocol.get(name))
        if differing:
            raise ConfigError(
                f"{self.path} holds runs of another protocol (different: {', '.join(differing)}).\n"
                "Move it away, or write to another folder with --out."
            )

    def done(self, run: Run) -> bool:
        """Say whether a run of the same key is there."""
        return any(all(known[name] == run[name] for name in self.study.key) for known in self.runs)

    def missing(self, seeds: Sequence[int] | None = None) -> list[Run]:
        """Return the runs of the protocol that are not there yet, pairs beside each other."""
        chosen = self.study.seeds[self.size] if seeds is None else seeds
        return [run for run in self.study.runs(self.protocol, chosen) if not self.done(run)]

    def add(self, run: Run, device: str) -> None:
        """Add a finished run and write the file, in one move."""
        here = environment(device)
        if here not in self.environments:
            self.environments.append(here)
        self.runs.append({**run, "environment": self.environments.index(here)})
        self.runs.sort(key=lambda each: [str(each[name]) for name in self.study.key])
        content = {
            "format": FORMAT,
            "study": self.study.name,
            "protocol": self.protocol,
            "environments": self.environments,
            "runs": self.runs,
        }
        write_text(self.path, json.dumps(content, indent=1) + "\n")
