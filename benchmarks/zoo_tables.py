"""What is known of the zoo in tables and as a picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import yaml
from tools.readme import markdown_table

from benchmarks.coverage import Record, category, tried_methods
from benchmarks.zoo import PROTOCOL, Zoo


def outcomes(records: dict[str, Record]) -> Iterator[tuple[str, str, str, Record]]:
    """Yield (architecture, family, method, what came of it), but for networks that do not run by themselves."""
    for name, record in records.items():
        if record["bare"] is None:
            for method, tried in {**record["methods"], "all together": record["stack"]}.items():
                yield name, record["family"], method, tried


def works(tried: Record) -> bool:
    """Say whether a method went on, trained and evaluated."""
    return tried.get("steps", "") is None


def shares(records: dict[str, Record]) -> dict[str, tuple[int, int]]:
    """Count (those that work, all) by method."""
    counts: dict[str, Counter[bool]] = defaultdict(Counter)
    for _, _, method, tried in outcomes(records):
        counts[method][works(tried)] += 1
    return {method: (count[True], count.total()) for method, count in counts.items()}


def inexact(records: dict[str, Record], method: str) -> str:
    """Count the networks on which a method works and differs from the bare network where it does nothing.

    Records of earlier versions do not say it; then the count has with it of how many it is.
    """
    said = [
        tried.get("inexact") for _, _, name, tried in outcomes(records) if name == method and works(tried)
    ]
    known = [each for each in said if each is not None]
    count = str(sum(map(bool, known)))
    return "" if not known else count if len(known) == len(said) else f"{count} of {len(known)} looked at"


def coverage(zoo: Zoo) -> str:
    """Write what is covered: how much of the zoo is known, and on what share of it each method works."""
    known = zoo.known()
    counted = len({name for name, *_ in outcomes(known)})
    unbuilt = sum("unbuilt" in each for each in zoo.structures.values())
    rows = [
        (
            f"`{method}`" if method in tried_methods() else method,
            str(good),
            str(total),
            f"{good / total:.1%}",
            inexact(known, method),
        )
        for method, (good, total) in shares(known).items()
    ]
    left_out = (
        (unbuilt, "could not be built here"),
        (len(known) - counted, "have no classes to train on by themselves (encoders)"),
        (len(zoo.structures) - unbuilt - len(known), "are of a structure that was not tried yet"),
    )
    others = "".join(f"; {count} {what}" for count, what in left_out if count)
    return "\n".join(
        [
            f"{counted} of {len(zoo.structures)} architectures, by {len(zoo.records)} of them that were tried{others}. "
            "That they run says nothing about the place. From their sources this was decided for "
            f"{len(decided())} architectures (`tests/system/zoo/places`); without a table, it was checked on "
            f"{_checked(zoo)}.",
            "",
            markdown_table(("method", "works", "of", "share", "of these not exact"), rows),
            "",
            "Not exact: a training pass differs from the bare network's even where the method does nothing, as with an "
            "activation between pooling and classifier; the summary names it.",
        ]
    )


def claim(zoo: Zoo) -> str:
    """Write for the README on how many architectures methods train, and on how many the place was checked."""
    trained = shares(zoo.known())["all together"][0]
    right = [name for name in zoo.places if place(name, zoo)]
    files = {each["family"] for each in zoo.structures.values()}
    seen = {zoo.structures[name]["family"] for name in right}
    return (
        f"Of {len(zoo.structures)} architectures of timm and torchvision, {trained} train with every method they "
        f"allow: one of each structure was tried. Where methods belong was read from the source for {len(decided())}, "
        f"and checked by invariants on {len(right)}, from {len(seen)} of {len(files)} model files."
    )


def decided() -> list[str]:
    """List the architectures for which the place of everything was decided from their sources."""
    tables = sorted(Path(__file__).parents[1].glob("tests/system/zoo/places/*.yaml"))
    return [name for table in tables for name in yaml.safe_load(table.read_text(encoding="utf-8"))]


def place(name: str, zoo: Zoo) -> bool | None:
    """Say whether methods are in their places on an architecture; None where it was not checked itself."""
    wrong = zoo.places.get(name, {}).get("wrong")
    return None if wrong is None else not wrong


def _checked(zoo: Zoo) -> str:
    found = [right for name in zoo.places if (right := place(name, zoo)) is not None]
    wrong = len(found) - sum(found)
    return f"{len(found)}" + (f" ({wrong} of them wrong in something)" if wrong else "")


def summary(zoo: Zoo) -> str:
    """Write what is known in Markdown: shares, the slowest plans, refusals by category, families."""
    known = zoo.known()
    lines = [
        f"Architectures of timm and torchvision: {PROTOCOL}.",
        "",
        coverage(zoo),
        "",
        "Plans, of the networks that were tried, in seconds of one core:",
        "",
        markdown_table(
            ("method", "median, s", "slowest, s"),
            [(method, *_times(zoo.records, method)) for method in shares(zoo.records)],
        ),
        "",
        markdown_table(("slowest", "method", "s"), _slowest(zoo.records)),
        "",
        "What does not work, by category, with one text as the user sees it:",
        "",
        markdown_table(("method", "networks", "category", "for example", "the text"), _refusals(known)),
        "",
        "By model file:",
        "",
        markdown_table(
            ("model file", *shares(known), "place checked"),
            [(*row, _placed(row[0], known, zoo)) for row in _families(known)],
        ),
        "",
        "Place checked: of the architectures whose places were looked at, on how many units see images and as many "
        "channels at every size, the logits read every gate, RSC's default changes every image's logits, class maps "
        "average to the logits or say that they do not, and "
        f"(on {sum(each.get('checks', 4) > 4 for each in zoo.places.values())}) the logits read what DSU restyles. "
        "What is wrong:",
        "",
        markdown_table(
            ("architecture", "what"),
            [
                (name, "; ".join(each["wrong"][:3]))
                for name, each in sorted(zoo.places.items())
                if each.get("wrong")
            ],
        ),
        "",
        "Not counted: what could not be built, and what takes no training step by itself (encoders without "
        "classes).",
        "",
        markdown_table(("architecture", "because"), _not_counted(zoo)),
    ]
    return "\n".join(lines) + "\n"


def _times(records: dict[str, Record], method: str) -> tuple[str, str]:
    plans = sorted(each["plan"] for _, _, name, each in outcomes(records) if name == method)
    return f"{plans[len(plans) // 2]:.2f}", f"{plans[-1]:.1f}"


def _slowest(records: dict[str, Record]) -> list[tuple[str, ...]]:
    single = [
        (each["plan"], name, method)
        for name, _, method, each in outcomes(records)
        if method != "all together"
    ]
    return [(name, method, f"{plan:.1f}") for plan, name, method in sorted(single, reverse=True)[:10]]


def _refusals(records: dict[str, Record]) -> list[tuple[str, ...]]:
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name, _, method, tried in outcomes(records):
        text = tried.get("refused") or tried.get("failed") or tried.get("steps")
        if text:
            kind = "" if "refused" in tried else "CRASH "
            found[method, kind + category(text)].append((name, text))
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1])))
    return [
        (method, str(len(cases)), kind, cases[0][0], "<br>".join(cases[0][1].splitlines()))
        for (method, kind), cases in ordered
    ]


def _not_counted(zoo: Zoo) -> list[tuple[str, str]]:
    unbuilt = {
        name: f"not built: {each['unbuilt']}" for name, each in zoo.structures.items() if "unbuilt" in each
    }
    alone = {name: f"alone, {each['bare']}" for name, each in zoo.known().items() if each["bare"] is not None}
    return [(name, " ".join(text.split())) for name, text in sorted({**unbuilt, **alone}.items())]


def _placed(family: str, records: dict[str, Record], zoo: Zoo) -> str:
    found = [place(name, zoo) for name, record in records.items() if record["family"] == family]
    checked = [right for right in found if right is not None]
    return f"{sum(checked)}/{len(checked)}" if checked else ""


def _families(records: dict[str, Record]) -> list[tuple[str, ...]]:
    cells: dict[str, dict[str, Counter[bool]]] = defaultdict(lambda: defaultdict(Counter))
    for _, group, method, tried in outcomes(records):
        cells[group][method][works(tried)] += 1
    return [
        (group, *(f"{row[method][True]}/{row[method].total()}" for method in shares(records)))
        for group, row in sorted(cells.items())
    ]


def plot(zoo: Zoo, path: Path) -> None:
    """Draw the matrix of model files and methods: the share of architectures that work."""
    from matplotlib.figure import Figure

    known = zoo.known()
    methods = list(shares(known))
    rows = _families(known)
    share = [[_share(cell) for cell in row[1:]] for row in rows]
    figure = Figure(figsize=(1.2 * len(methods) + 2, 0.22 * len(rows) + 2), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=7)
    figure.colorbar(image, label="share of the architectures tried that plan, train and evaluate")
    figure.savefig(path, dpi=100)


def _share(cell: str) -> float:
    good, total = map(int, cell.split("/"))
    return good / total if total else float("nan")
