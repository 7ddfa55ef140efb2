"""How much of the zoo a method fits: every timm architecture at its own size, built without memory, patched.

Nothing is computed: models live on the meta device, where building and patching take a second or so each.
Writes one JSON with the seconds of every architecture that could be patched and the message of every one
that could not.

    python benchmarks/zoo_coverage.py --method rsc --out benchmarks/results/zoo_rsc.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import timm
import torch
from rich.progress import track

import fxgraft
from fxgraft.experiments.environment import environment
from fxgraft.files import write_text


def try_one(name: str, method: str) -> tuple[float | None, str]:
    """Build and patch one architecture; return the seconds that patching took, or None and why not."""
    with torch.device("meta"):
        model = timm.create_model(name)
    start = time.perf_counter()
    try:
        fxgraft.patch(model, method, **fxgraft.methods()[method].example)
    except fxgraft.FxgraftError as error:
        return None, f"{type(error).__name__}: {error}"
    return time.perf_counter() - start, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", default="rsc", choices=fxgraft.methods())
    parser.add_argument("--filter", default="*", help="glob of architectures, as timm.list_models takes it")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path(__file__).parent / "results" / f"zoo_{arguments.method}.json"
    warnings.simplefilter("ignore")
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in track(timm.list_models(arguments.filter), "architectures"):
        taken, why = try_one(name, arguments.method)
        if taken is None:
            failed[name] = why
        else:
            seconds[name] = round(taken, 3)
    slowest = max(seconds, key=seconds.__getitem__, default=None)
    summary = {
        "protocol": "the method's example options, meta device, the architecture's own input size",
        "method": arguments.method,
        "patched": len(seconds),
        "failed": len(failed),
        "median_seconds": statistics.median(seconds.values()) if seconds else None,
        "slowest": [slowest, seconds.get(slowest or "")],
        "environment": environment("cpu"),
        "failures": failed,
        "seconds": seconds,
    }
    write_text(out, json.dumps(summary, indent=1) + "\n")
    print(f"{len(seconds)} patched, {len(failed)} not; written to {out}")


if __name__ == "__main__":
    main()
