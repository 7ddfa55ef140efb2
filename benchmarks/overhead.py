"""What every registered method costs in its default configuration, against the bare model.

    python benchmarks/overhead.py                                  # four backbones, 224², batch 16
    python benchmarks/overhead.py --models resnet50 --rounds 24
    python benchmarks/overhead.py --device cuda --batch 64
    python benchmarks/overhead.py --models resnet18 --methods crossnorm crossnorm:p=1.0,active=None --compile

Writes ``results/overhead.json`` (every number with its spread), ``overhead.md`` and ``overhead.png`` beside
it; on another device than the CPU, and for compiled networks, the files are named so. The methods come from
the registry: a new one is measured without a change here.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import fxgraft
from fxgraft.bench.contestants import BARE, CONTROL, FORWARD, PATCHED, TRAINING_STEP
from fxgraft.bench.overhead import measure
from fxgraft.bench.report import OverheadReport, Row
from fxgraft.errors import SiteError, StructureError
from fxgraft.experiments.spec import parse_patch_spec
from fxgraft.files import write_text

MODELS = ("resnet18", "resnet50", "convnext_tiny", "vit_small_patch16_224")
RESULTS = Path(__file__).parent / "results"
COLUMNS = ("model", "method", "evaluation", "training step", "noise", "extra memory in training")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    # torch's profiler, which reads the memory, logs its start and stop to stderr unless told otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    known = fxgraft.methods()
    specs = [parse_patch_spec(text) for text in options.methods or known]
    suffix = "" if options.device == "cpu" else "-" + options.device.replace(":", "")
    suffix += "-compiled" if options.compile else ""
    stem = options.out / f"overhead{suffix}"
    stem.parent.mkdir(parents=True, exist_ok=True)

    reports: list[OverheadReport] = []
    refused: list[dict[str, str]] = []
    for model in options.models:
        for spec in specs:
            # What a method cannot do without, where nothing else is asked for.
            example = known[spec.method].example if spec.method in known else {}
            try:
                report = measure(
                    model,
                    [(spec.method, {**example, **spec.options})],
                    batch=options.batch,
                    size=options.size,
                    device=options.device,
                    rounds=options.rounds,
                    min_run_time=options.min_run_time,
                    threads=options.threads,
                    compiled=options.compile,
                )
            except (SiteError, StructureError) as error:
                # Part of the result: not every backbone has what every method needs.
                refused.append({"model": model, "method": spec.text, "reason": str(error)})
                print(f"{model} · {spec.text}: {error}", flush=True)
            else:
                reports.append(report)
                print(report, flush=True)
            if reports:
                # After each one, so that a run that is stopped keeps what it has.
                save(stem, reports, refused)


def save(stem: Path, reports: Sequence[OverheadReport], refused: Sequence[dict[str, str]]) -> None:
    """Write the JSON, the table and the picture."""
    content = {"reports": [report.to_dict() for report in reports], "refused": list(refused)}
    write_text(stem.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
    write_text(stem.with_suffix(".md"), markdown(reports, refused))
    plot(stem.with_suffix(".png"), reports)


def markdown(reports: Sequence[OverheadReport], refused: Sequence[dict[str, str]]) -> str:
    """Return the ratios as a Markdown table, with the conditions above it."""
    first = reports[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    allocator = "".join(f", {name}={value}" for name, value in first.allocator.items())
    lines = [
        f"Time against the bare model: median of the ratios within {first.rounds} interleaved rounds, "
        "quartiles in brackets. Noise: a second bare model in the patched one's place, training step.",
        "",
        f"Batch {first.batch} at {first.size}², {first.device} ({first.processor}), threads: {first.threads}"
        f"{', torch.compile(fullgraph=True)' if first.compiled else ''}{allocator};"
        f" {versions}. Training step: {first.training_step}. Memory: {first.memory_kind}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(_cells(report)) + " |" for report in reports]
    lines += [f"| {entry['model']} | {entry['method']} | {entry['reason']} | | | |" for entry in refused]
    return "\n".join(lines) + "\n"


def plot(path: Path, reports: Sequence[OverheadReport]) -> None:
    """Draw the training-step ratios with their quartiles, and the noise beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.5 * len(reports)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{report.model} · {'+'.join(report.patches)}" for report in reports]
    for offset, network, colour in ((-0.15, PATCHED, "C0"), (0.15, CONTROL, "0.6")):
        ratios = [_ratio(report.row(TRAINING_STEP, network)) for report in reports]
        middle = [ratio[0] for ratio in ratios]
        errors = [[m - low for m, low, _ in ratios], [high - m for m, _, high in ratios]]
        axes.errorbar(
            middle,
            [index + offset for index in range(len(reports))],
            xerr=errors,
            fmt="o",
            color=colour,
            label="patched" if network == PATCHED else "noise: bare against bare",
        )
    axes.axvline(1.0, color="0.8", zorder=0)
    axes.set_yticks(range(len(reports)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"training step, time against bare (batch {reports[0].batch}, {reports[0].size}²)")
    axes.legend()
    figure.savefig(path, dpi=150)


def _cells(report: OverheadReport) -> list[str]:
    extra = ""
    bare, patched = (report.row(TRAINING_STEP, network).peak_bytes for network in (BARE, PATCHED))
    if bare is not None and patched is not None:
        extra = f"{(patched - bare) / 1e6:+.1f} MB"
    return [
        report.model,
        " + ".join(report.patches),
        _written(report.row(FORWARD, PATCHED)),
        _written(report.row(TRAINING_STEP, PATCHED)),
        _written(report.row(TRAINING_STEP, CONTROL)),
        extra,
    ]


def _written(row: Row) -> str:
    middle, low, high = _ratio(row)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _ratio(row: Row) -> tuple[float, float, float]:
    if row.ratio is None:
        return 1.0, 1.0, 1.0
    return row.ratio.median, row.ratio.low, row.ratio.high


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="model names, as in `fxgraft sites`"
    )
    parser.add_argument(
        "--methods", nargs="+", help="as METHOD:key=value,...; default: every registered method"
    )
    parser.add_argument("--rounds", type=int, default=12, help="timings of each network")
    parser.add_argument("--min-run-time", type=float, default=0.2, help="seconds per timing")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--compile", action="store_true", help="run every network through torch.compile")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser


if __name__ == "__main__":
    main()
