"""What every method costs in its default configuration, against the bare model.

    python -m benchmarks overhead                                      # six backbones, 224², batch 16
    python -m benchmarks overhead --model resnet50 --rounds 24
    python -m benchmarks overhead --device cuda --batch 64 --compile
    python -m benchmarks overhead --model resnet18 --method crossnorm --method crossnorm:p=1.0,active=None
    python -m benchmarks overhead --model test_resnet --batch 1 --size 96   # what a call costs whatever the network
    python -m benchmarks overhead --name clips --model torchvision/r3d_18 --size 16x112x112   # networks of clips
    python -m benchmarks overhead --model resnet50 --by-hand                # beside hooks (`benchmarks.by_hand`)

Writes ``overhead.json`` (every number with its spread), ``overhead.md`` and ``overhead.png``; on another device than
the CPU, for compiled networks and beside hooks by hand, the files are named so; ``--name`` names others. What is in the
file is not measured again. The methods come from the registry: a new one is measured without a change here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from rich.console import Console
from tools.readme import markdown_table, own_methods

from benchmarks.by_hand import BY_HAND
from benchmarks.coverage import STACK
from fxgraft.bench.bare_and_patched import BARE, CONTROL, FORWARD, MEASURES, PATCHED, RIVAL, TRAINING_STEP
from fxgraft.bench.overhead import measure
from fxgraft.bench.overhead_report import OverheadReport, Row
from fxgraft.errors import ConfigError, SiteError, StructureError
from fxgraft.io.atomic_write import write_text
from fxgraft.spec import describe, parse_patch_spec

MODELS = (
    *("resnet18", "resnet50", "convnext_tiny"),
    *("swin_tiny_patch4_window7_224", "vit_small_patch16_224", "efficientnet_b0"),
)
COLUMNS = (
    "model",
    "method",
    "evaluation",
    "training step",
    "by hand",
    "noise",
    "more per step, ms",
    "extra memory",
    "patching, s",
)
Patches = list[tuple[str, dict[str, Any]]]


def subjects(methods: Sequence[str]) -> list[Patches]:
    """Return what to measure: every method, with what it cannot do without, and those that go together; or a choice."""
    known = own_methods()
    if methods:
        stacks = [[parse_patch_spec(part) for part in text.split(" + ")] for text in methods]
        examples = {name: method.example for name, method in known.items()}
        return [
            [(each.method, {**examples.get(each.method, {}), **each.options}) for each in stack]
            for stack in stacks
        ]
    single: list[Patches] = [[(name, dict(method.example))] for name, method in known.items()]
    return [*single, [(name, dict(known[name].example)) for name in STACK]]


class Overhead:
    """What was measured, in a file that grows.

    Args:
        path: the JSON file; carried on where it is there.
        settings: of `fxgraft.bench.overhead.measure`.
        by_hand: measure methods alone, beside what is written by hand.

    Attributes:
        reports: what was measured.
        refused: "model", "method" and "reason" of what does not go together.

    Raises:
        ConfigError: the file is of another kind, or of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], by_hand: bool = False) -> None:
        self.path = path
        self.settings = settings
        self.by_hand = by_hand
        self.reports: list[OverheadReport] = []
        self.refused: list[dict[str, str]] = []
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.reports = _reports(content)
            self.refused = content["refused"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} isn't a file of this benchmark ({error!r}).\nMove it away.") from error
        for report in self.reports:
            other = [k for k, v in settings.items() if v is not None and v != getattr(report, k)]
            if other:
                raise ConfigError(
                    f"{path} was measured with other settings: {', '.join(other)}.\nMove it away, or use --out."
                )

    def run(self, models: Sequence[str], chosen: Sequence[Patches], console: Console) -> None:
        """Measure what is missing; write after each."""
        for model in models:
            for wanted in chosen:
                no = {each["method"] for each in self.refused if each["model"] == model}
                patches = [each for each in wanted if len(wanted) == 1 or describe(*each) not in no]
                text = " + ".join(describe(method, options) for method, options in patches)
                done = {(report.model, " + ".join(report.patches)) for report in self.reports}
                if {(model, text)} & (done | {(each["model"], each["method"]) for each in self.refused}):
                    continue
                rival = BY_HAND.get(patches[0][0]) if self.by_hand and len(patches) == 1 else None
                if self.by_hand and rival is None:
                    continue
                try:
                    report = measure(model, patches, rival=rival, **self.settings)
                except (SiteError, StructureError, LookupError) as error:
                    # Part of the result: not every backbone has what every method needs.
                    self.refused.append({"model": model, "method": text, "reason": str(error)})
                    console.print(f"{model} · {text}: {error}", markup=False)
                else:
                    self.reports.append(report)
                    console.print(report)
                self.save()

    def save(self) -> None:
        """Write the JSON, the table and the picture."""
        content = {"reports": [report.to_dict() for report in self.reports], "refused": self.refused}
        write_text(self.path, json.dumps(content, indent=2) + "\n")
        if self.reports:
            write_text(self.path.with_suffix(".md"), markdown(self.reports, self.refused))
            plot(self.path.with_suffix(".png"), self.reports)


def file_of(out: Path, device: str, compiled: bool, by_hand: bool = False, name: str | None = None) -> Path:
    """Return the file of a device, of eager or compiled networks, with or without hooks by hand; or of a name."""
    named = (f"_{name}" if name else "") + ("" if device == "cpu" else "-" + device.replace(":", ""))
    return out / f"overhead{named}{'-compiled' if compiled else ''}{'-by-hand' if by_hand else ''}.json"


def quiet_profiler() -> None:
    """Keep torch's profiler, which reads the memory, from logging its start and stop."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def markdown(reports: Sequence[OverheadReport], refused: Sequence[dict[str, str]]) -> str:
    """Return the ratios as a Markdown table, with the conditions above it."""
    first = reports[0]
    # Rows may be of several dates: what they were measured with is all told.
    versions = ", ".join(
        f"{name} {' and '.join(dict.fromkeys(report.versions[name] for report in reports))}"
        for name in first.versions
    )
    allocator = "".join(f", {name}={value}" for name, value in first.allocator.items())
    rows = [_cells(report) for report in reports]
    kept = [
        any(row[place] for row in rows) for place in range(len(COLUMNS))
    ]  # a column of nothing is left out
    columns, *rows = (tuple(compress(each, kept)) for each in (COLUMNS, *rows))
    lines = [
        f"Time against the bare model: median of the ratios within {first.rounds} interleaved rounds, "
        "quartiles in brackets. Noise: a second bare model in the patched one's place, training step.",
        "",
        f"Batch {first.batch} at {first.sides}, {first.device} ({first.processor}), threads: {first.threads}"
        f"{', torch.compile(fullgraph=True)' if first.compiled else ''}{allocator};"
        f" {versions}. Training step: {first.training_step}. Memory: {first.memory_kind}.",
        "",
        markdown_table(columns, rows),
        *(["", "Refused:", ""] if refused else []),
        *(f"- {each['model']}, {each['method']}: {each['reason'].splitlines()[0]}" for each in refused),
    ]
    return "\n".join(lines) + "\n"


def overhead_table(path: Path) -> str:
    """Write the table of costs: a row per method, a column per model, the ratio of a training step (and by hand)."""
    reports = _reports(json.loads(path.read_text(encoding="utf-8")))
    models = list(dict.fromkeys(report.model for report in reports))
    found = {(_name(report), report.model): report for report in reports}
    noise = ("*bare again*", *(_noise([each for each in reports if each.model == model]) for model in models))
    rows = [
        (
            name,
            *(_cell(found[name, model]) if (name, model) in found else "–" for model in models),
        )
        for name in dict.fromkeys(_name(report) for report in reports)
    ]
    return markdown_table(("training step", *models), [noise, *rows])


def ratios_of(path: Path, model: str, what: str) -> dict[str, float]:
    """Return what methods cost on a model, each measured alone, as multiples of the bare network's time.

    Args:
        path: the file of results.
        model: its name there.
        what: one of `MEASURES`.
    """
    reports = _reports(json.loads(path.read_text(encoding="utf-8")))
    return {
        report.patches[0].partition(":")[0]: _ratio(report.row(what, PATCHED))[0]
        for report in reports
        if report.model == model and len(report.patches) == 1
    }


def noise_of(path: Path, model: str) -> str:
    """Say how far a second bare network was from the first in training steps, from lowest to highest."""
    reports = _reports(json.loads(path.read_text(encoding="utf-8")))
    return _noise([report for report in reports if report.model == model])


def fixed_cost_table(path: Path) -> str:
    """Write what a call costs whatever the network: microseconds more than the bare network's, on a tiny one."""
    reports = _reports(json.loads(path.read_text(encoding="utf-8")))
    rows = [(_name(each), *(f"{_more(each, what, PATCHED):+.0f}" for what in MEASURES)) for each in reports]
    noise = [[_more(each, what, CONTROL) for each in reports] for what in MEASURES]
    first = ("*bare again*", *(f"{min(each):+.0f} to {max(each):+.0f}" for each in noise))
    alone = [[1e6 * each.row(what, BARE).seconds.median for each in reports] for what in MEASURES]
    bare = ("*bare*", *(f"{min(each):.0f} to {max(each):.0f}" for each in alone))
    return markdown_table(("µs per call", "evaluation", "training step"), [bare, first, *rows])


def _reports(content: Mapping[str, Any]) -> list[OverheadReport]:
    return [OverheadReport.from_json(json.dumps(each)) for each in content["reports"]]


def _more(report: OverheadReport, what: str, network: str) -> float:
    # The ratio is taken within rounds: what a difference of two medians has of the machine's drift is not in it.
    return 1e6 * report.row(what, BARE).seconds.median * (_ratio(report.row(what, network))[0] - 1)


def _cell(report: OverheadReport) -> str:
    ratios = {network: _ratio(row)[0] for network, row in _rows_of(report).items()}
    return f"{ratios[PATCHED]:.2f}" + (f" ({ratios[RIVAL]:.2f})" if RIVAL in ratios else "")


def _name(report: OverheadReport) -> str:
    methods = [patch.partition(":")[0] for patch in report.patches]
    whole = len(methods) > 2 and methods == [name for name in STACK if name in methods]
    return "all together" if whole else " + ".join(f"`{patch}`" for patch in report.patches)


def _noise(reports: Sequence[OverheadReport]) -> str:
    ratios = [_ratio(report.row(TRAINING_STEP, CONTROL))[0] for report in reports]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def plot(path: Path, reports: Sequence[OverheadReport]) -> None:
    """Draw the training-step ratios with their quartiles, and the noise beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.3 * len(reports)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{report.model} · {_name(report).strip('`')}" for report in reports]
    series = (
        (-0.2, PATCHED, "C0", "patched"),
        (0, RIVAL, "C1", "by hand"),
        (0.2, CONTROL, "0.6", "noise: bare again"),
    )
    for offset, network, colour, label in series:
        found = [(place, _rows_of(report).get(network)) for place, report in enumerate(reports)]
        there = [(place + offset, *_ratio(row)) for place, row in found if row is not None]
        if there:
            places, middle, low, high = map(list, zip(*there, strict=True))
            errors = [
                [m - n for m, n in zip(middle, low, strict=True)],
                [n - m for m, n in zip(middle, high, strict=True)],
            ]
            axes.errorbar(middle, places, xerr=errors, fmt="o", color=colour, label=label)
    axes.axvline(1.0, color="0.8", zorder=0)
    axes.set_yticks(range(len(reports)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"training step, time against bare (batch {reports[0].batch}, {reports[0].sides})")
    axes.legend()
    figure.savefig(path, dpi=120)


def _cells(report: OverheadReport) -> tuple[str, ...]:
    bare, patched = (report.row(TRAINING_STEP, network) for network in (BARE, PATCHED))
    extra = ""
    if bare.peak_bytes is not None and patched.peak_bytes is not None:
        extra = f"{(patched.peak_bytes - bare.peak_bytes) / 1e6:+.1f} MB"
    return (
        report.model,
        " + ".join(report.patches),
        _written(report.row(FORWARD, PATCHED)),
        _written(patched),
        _by_hand(report),
        _written(report.row(TRAINING_STEP, CONTROL)),
        f"{(patched.seconds.median - bare.seconds.median) * 1e3:+.2f}",
        extra,
        "" if report.patch_seconds is None else f"{report.patch_seconds:.2f}",
    )


def _by_hand(report: OverheadReport) -> str:
    row = _rows_of(report).get(RIVAL)
    return "" if row is None else _written(row)


def _rows_of(report: OverheadReport) -> dict[str, Row]:
    return {row.network: row for row in report.rows if row.what == TRAINING_STEP}


def _written(row: Row) -> str:
    middle, low, high = _ratio(row)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _ratio(row: Row) -> tuple[float, float, float]:
    if row.ratio is None:
        return 1.0, 1.0, 1.0
    return row.ratio.median, row.ratio.low, row.ratio.high
