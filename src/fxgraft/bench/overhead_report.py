"""The result of an overhead measurement: numbers, JSON and a table."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxgraft.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers and how far they lie apart.

    Attributes:
        median: the median.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Summarise the numbers; one number is its own quartile."""
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    """One network in one kind of call.

    Attributes:
        what: "forward" or "training step".
        network: "bare", "bare again" (the control) or "patched".
        seconds: time of one call over the rounds.
        ratio: time against the bare network in the same round, over the rounds; None for the bare network.
        peak_bytes: memory of one call, as `OverheadReport.memory_kind` says; None where it is not measured.
    """

    what: str
    network: str
    seconds: Spread
    ratio: Spread | None
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class OverheadReport:
    """What patches cost on one model.

    Attributes:
        model: name of the model.
        patches: the patches as the command line takes them, in order.
        batch: images per call.
        size: side of the images; of clips and volumes (T, H, W).
        device: where it was measured.
        processor: what that device is.
        threads: CPU threads of torch.
        rounds: timings of each network.
        min_run_time: seconds for which each timing repeated its call.
        training_step: what one training step consists of.
        memory_kind: what `Row.peak_bytes` counts.
        versions: versions of Python and the libraries.
        rows: the numbers.
        compiled: whether the networks ran through torch.compile.
        allocator: environment variables that were set and decide how memory is allocated. Fresh buffers for
            large maps can take longer than the arithmetic on them.
        patch_seconds: what putting the patches on took; None without patches and in reports of earlier versions.
    """

    model: str
    patches: tuple[str, ...]
    batch: int
    size: int | tuple[int, ...]
    device: str
    processor: str
    threads: int
    rounds: int
    min_run_time: float
    training_step: str
    memory_kind: str
    versions: dict[str, str]
    rows: tuple[Row, ...]
    compiled: bool = False
    allocator: dict[str, str] = field(default_factory=dict)
    patch_seconds: float | None = None

    @property
    def sides(self) -> str:
        """The size in words, as "224×224" or "16×112×112"."""
        return shown_sides(self.size)

    def row(self, what: str, network: str) -> Row:
        """Return the row of one network in one kind of call."""
        for row in self.rows:
            if (row.what, row.network) == (what, network):
                return row
        measured = ", ".join(f"{row.what}/{row.network}" for row in self.rows)
        raise ConfigError(f"Nothing was measured for {what}/{network}. Measured: {measured}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, strings and numbers."""
        plain = asdict(self)
        return {"format": FORMAT, **plain, "patches": list(self.patches), "rows": list(plain["rows"])}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> OverheadReport:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: the text is something else.
        """
        try:
            plain = json.loads(text)
            version = plain.pop("format")
            rows = tuple(_row(row) for row in plain.pop("rows"))
            size = tuple(plain["size"]) if isinstance(plain["size"], list) else plain["size"]
            report = cls(**{**plain, "patches": tuple(plain["patches"]), "size": size}, rows=rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"This isn't an overhead report: {error}.\nPass the JSON that fxgraft bench --out wrote."
            ) from error
        if version != FORMAT:
            raise ConfigError(
                f"This overhead report has format {version}; this version reads {FORMAT}.\n"
                "Measure again, or read it with the fxgraft that wrote it."
            )
        return report

    def __rich__(self) -> Table:
        """Lay the rows out as a table."""
        table = Table(
            # Text, not a string: rich would take the brackets of a glob for its own markup.
            title=Text(f"{self.model} · {' + '.join(self.patches) or 'no patch'}"),
            caption=f"batch {self.batch} at {self.sides} on {self.device} ({self.processor}), "
            f"threads: {self.threads}, {'compiled, ' if self.compiled else ''}rounds: {self.rounds}; "
            "medians with quartiles.\n"
            + "".join(f"{name}={value}\n" for name, value in self.allocator.items())
            + ("" if self.patch_seconds is None else f"Patching took {self.patch_seconds:.2f} s.\n")
            + "Ratio: within a round, against bare; 'bare again' shows the noise.\n"
            f"Training step: {self.training_step}.\nMemory: {self.memory_kind}.",
            caption_justify="left",
        )
        table.add_column("network")
        for heading in ("ms", "quartiles", "ratio", "quartiles", "peak MB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for index, row in enumerate(self.rows):
            if index == 0 or self.rows[index - 1].what != row.what:
                table.add_section()
                table.add_row(Text(row.what, style="bold"))
            table.add_row(row.network, *_cells(row))
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def sides_of(size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return the sides (H, W) of square images, or those (T, H, W) of clips and volumes as they are given."""
    return (size, size) if isinstance(size, int) else size


def shown_sides(size: int | tuple[int, ...]) -> str:
    """Write a size as "224×224" or "16×112×112"."""
    return "×".join(map(str, sides_of(size)))


def read_size(text: str) -> int | tuple[int, ...]:
    """Read a size as the command line takes it: "224", of clips and volumes "16x112x112".

    Raises:
        ConfigError: it is neither.
    """
    parts = text.split("x")
    if len(parts) > 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(
            f"--size must be the side of the images, or frames and sides of clips, got {text!r}.\n"
            "Write 224, of images that aren't square 192x256, of clips and volumes 16x112x112."
        )
    sides = tuple(map(int, parts))
    return sides[0] if len(sides) == 1 else sides


def _cells(row: Row) -> list[str]:
    seconds, ratio = row.seconds, row.ratio
    return [
        f"{seconds.median * 1e3:.2f}",
        f"{seconds.low * 1e3:.2f}–{seconds.high * 1e3:.2f}",
        f"{ratio.median:.3f}" if ratio else "1",
        f"{ratio.low:.3f}–{ratio.high:.3f}" if ratio else "",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
    ]


def _row(plain: dict[str, Any]) -> Row:
    ratio = plain["ratio"]
    return Row(
        what=plain["what"],
        network=plain["network"],
        seconds=Spread(**plain["seconds"]),
        ratio=None if ratio is None else Spread(**ratio),
        peak_bytes=plain["peak_bytes"],
    )
