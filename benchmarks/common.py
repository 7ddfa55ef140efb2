"""What the learning benchmarks share: arguments, and result files that survive an interruption."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fxgraft.training import environment

FORMAT = 1


def argument_parser(description: str, name: str) -> argparse.ArgumentParser:
    """Arguments that every learning benchmark takes; `name` is the stem of its result file."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="small protocol, sized for two CPU cores")
    size.add_argument("--full", action="store_true", help="the protocol to quote, for a GPU")
    parser.add_argument("--data", type=Path, required=True, help="directory with the data")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the protocol")
    parser.add_argument(
        "--out", type=Path, help=f"result file; by default results/{name}_quick.json or _full.json"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="do every N-th part, from the I-th, into a file of its own; afterwards the same command "
        "without --shard collects the parts, and does what is missing",
    )
    return parser


def shard(text: str) -> tuple[int, int]:
    """Read ``2/4``: the second of four."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 2/4")
    return int(index), int(count)


def result_path(arguments: argparse.Namespace, name: str) -> Path:
    """The file that the whole benchmark writes to, whatever the shard."""
    size = "quick" if arguments.quick else "full"
    return arguments.out or Path(__file__).parent / "results" / f"{name}_{size}.json"


class Results:
    """A result file to which finished runs are added one by one.

    An existing file of the same protocol is carried on: its runs count as done. One of another protocol
    is refused, since a table over both would compare what cannot be compared.

    Args:
        path: the JSON file.
        protocol: everything that decides the outcome of a run of a given key.
        key: the fields of a run that say which run it is.
        device: recorded with the versions.
        part: shard (index, count); anything but (1, 1) goes to ``<stem>.shard<I>of<N>.json``.
    """

    def __init__(
        self,
        path: Path,
        protocol: dict[str, Any],
        key: tuple[str, ...],
        device: str,
        part: tuple[int, int] = (1, 1),
    ) -> None:
        # Through JSON and back, so that tuples compare equal to the lists of a file.
        self.protocol = json.loads(json.dumps(protocol))
        self.key = key
        self.environments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        whole = part == (1, 1)
        self.path = path if whole else path.with_suffix(f".shard{part[0]}of{part[1]}.json")
        for source in [path, *sorted(path.parent.glob(f"{path.stem}.shard*of*.json"))]:
            # A shard leaves out what others have finished, but only the whole takes it over.
            self._read(source, keep=whole or source == self.path)
        self.environments.append(environment(device))

    def _read(self, source: Path, keep: bool) -> None:
        if not source.exists():
            return
        found = json.loads(source.read_text(encoding="utf-8"))
        differing = sorted(
            name
            for name in {*found["protocol"], *self.protocol}
            if found["protocol"].get(name) != self.protocol.get(name)
        )
        if differing:
            raise SystemExit(
                f"{source} holds runs of another protocol (different: {', '.join(differing)}).\n"
                "Move it away, or write elsewhere with --out."
            )
        shift = len(self.environments)
        self.environments += found["environments"]
        for run in found["runs"]:
            if not self.done(run):
                self.runs.append({**run, "environment": run["environment"] + shift, "own": keep})

    def done(self, run: dict[str, Any]) -> bool:
        """Whether a run with the same key is there."""
        return any(all(known[name] == run[name] for name in self.key) for known in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Add a finished run and write the file, in one move so that it is never half written."""
        self.runs.append({**run, "environment": len(self.environments) - 1, "own": True})
        self.write()

    def write(self) -> None:
        """Write what belongs to this file."""
        own = [run for run in self.runs if run["own"]]
        used = sorted({run["environment"] for run in own})
        content = {
            "format": FORMAT,
            "protocol": self.protocol,
            "environments": [self.environments[index] for index in used],
            "runs": [
                {
                    **{k: v for k, v in run.items() if k != "own"},
                    "environment": used.index(run["environment"]),
                }
                for run in sorted(own, key=lambda run: [str(run[name]) for name in self.key])
            ],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)
