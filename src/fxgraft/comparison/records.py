"""The folder of a comparison: its protocol, and its runs line by line, so that a cut-off one goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_file, write_text

FORMAT = 1
Record = dict[str, Any]


class Folder:
    """Where a comparison is kept.

    Args:
        path: the path of the folder; made if missing.
        protocol: what must be equal for runs to be comparable: data, model, training. Grafts and seeds are not in it,
            so that more of both can be added.

    Raises:
        ConfigError: the folder holds runs of another protocol; names what differs.
    """

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        self.path, self.protocol = path, json.loads(json.dumps({"format": FORMAT, **protocol}))
        self._runs = path / "runs.jsonl"
        self._protocol = path / "protocol.json"

    @contextmanager
    def opened(self) -> Iterator[list[Record]]:
        """Hold the folder for one comparison, and give the records that are in it.

        Raises:
            ConfigError: another process writes to it, it cannot be written, or its protocol differs.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"Another comparison is writing to {str(self.path)!r}.\n"
                "Two of them would each do the other's runs. Wait for it, or pass another out=."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"Cannot write to {str(self.path)!r}: {error.strerror}.\nPass another out=."
            ) from error
        try:
            try:
                self._check()
                records = self._read()
            except OSError as error:  # a full disk, or a folder of that name
                raise ConfigError(
                    f"Cannot read or write {error.filename or self.path}: {error.strerror or error}.\n"
                    "Pass another out=."
                ) from error
            yield records
        finally:
            lock.release()

    def _check(self) -> None:
        if not self._runs.exists() or not self._runs.stat().st_size:  # nothing that has to be comparable
            write_text(self._protocol, json.dumps(self.protocol, indent=2) + "\n")
            return
        if not self._protocol.exists():
            raise ConfigError(f"{self.path} holds runs without their protocol.\nPass another out=.")
        try:
            known = json.loads(self._protocol.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self._protocol} is damaged: {error}\nPass another out=.") from error
        lines = [
            f"  {name}: {before} there, {now} now" for name, before, now in _differences(known, self.protocol)
        ]
        if lines:
            raise ConfigError(
                f"{str(self.path)!r} holds runs of another protocol:\n"
                + "\n".join(lines)
                + "\nRuns of two protocols cannot be compared. Pass another out=, or the same settings."
            )

    def _read(self) -> list[Record]:
        """Read the records; a last line that was cut off in the middle is removed, and its run is done again."""
        if not self._runs.exists():
            return []
        text = self._runs.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            write_file(self._runs, lambda draft: draft.write_bytes(whole))
        return [self._record(line, number) for number, line in enumerate(whole.splitlines(), 1)]

    def _record(self, line: bytes, number: int) -> Record:
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            problem = str(error)
        else:
            if _is_record(record):
                return record
            problem = "it is no record of a run"
        raise ConfigError(
            f"{self._runs} is damaged in line {number}: {problem}.\nRemove that line, or pass another out=."
        )

    def add(self, record: Record) -> Record:
        """Write a record, and return it as it is read again: numbers that are not finite are None.

        Raises:
            ConfigError: it cannot be written: a full disk. What was written before stays readable.
        """
        plain = finite(record)
        line = json.dumps(plain, allow_nan=False) + "\n"
        try:
            with self._runs.open("ab") as file:
                size = file.tell()
                try:
                    file.write(line.encode("utf-8"))
                    file.flush()
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise ConfigError(
                f"Cannot write to {self._runs}: {error.strerror}.\n"
                "The runs before this one are kept. Make room; the same command goes on."
            ) from error
        return plain


def _is_record(value: Any) -> bool:
    """Say whether a line holds what every record has."""
    return (
        isinstance(value, dict)
        and {"variant", "task", "diverged"} <= value.keys()
        and ("tuning" in value or "seed" in value)
        and isinstance(value.get("scores"), dict)
    )


def finite(value: Any) -> Any:
    """Turn numbers that JSON does not have into None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _differences(known: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(known, dict) and isinstance(now, dict):
        for key in sorted({*known, *now}):
            yield from _differences(known.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif known != now:
        yield name, known, now
