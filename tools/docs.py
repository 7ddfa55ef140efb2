"""The generated pages of the documentation, written when it is built: nothing of them is committed.

`write_pages` is called by ``docs/conf.py``. The pages come from the registry (cards of methods), the public names
(API), the command line, docstrings (grammar, file format, glossary), the error classes with their messages, and the
committed results of the benchmarks.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from benchmarks.__main__ import FOLDER as RESULTS
from benchmarks.__main__ import result_tables

import fxgraft
from fxgraft import errors, extend, gam, mixmo, spec
from fxgraft.cli.commands import app
from fxgraft.cli.method_facts import card_sections, option_rows, preset_rows
from fxgraft.io import recipe
from fxgraft.io.atomic_write import write_text
from fxgraft.viz.method_pictures import methods_with_pictures
from tools.pictures import ALT, MADE_WITH, SCHEME_MADE_OF, SCHEMES, draw
from tools.readme import method_table, own_methods
from tools.where import drawings, planned

FOLDERS = ("methods", "reference", "generated")
"""The folders of docs/ in which everything is generated."""

EXAMPLE_NETWORKS = ("resnet50", "vit_small_patch16_224")
"""timm's networks on which a card shows where its method goes."""

MOST_LINES = 4
"""How many places of a plan a card shows."""

SOURCE = Path(fxgraft.__file__).parent

TUTORIALS = ("first_graft", "held_out_domain", "adapt", "does_it_help", "own_method")
"""The scripts of ``docs/tutorials``, in the order in which they are read."""


def write_pages(docs: Path) -> None:
    """Write every generated page, and the pictures that are missing; a page that is up to date is left alone."""
    pages = {**method_pages(), **reference_pages(), **other_pages()}
    for name, text in pages.items():
        path = docs / name
        text = text.rstrip() + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
    wanted = {name: docs / f"methods/{name}.png" for name in shown_methods()}
    if lacking := {name: path for name, path in wanted.items() if not path.is_file()}:
        draw(lacking)


def tutorial_order(script: str | Path) -> int:
    """Return where a script of ``docs/tutorials`` stands in their list; the gallery sorts them by it."""
    return TUTORIALS.index(Path(script).stem)


def shown_methods() -> list[str]:
    """Name the methods of this package that have a picture; that of SelfNorm is of gates, which have to be trained."""
    return [name for name in methods_with_pictures() if name in own_methods() and name != "selfnorm"]


def method_pages(networks: Sequence[str] = EXAMPLE_NETWORKS) -> dict[str, str]:
    """Write the cards of the methods, with the places of each on timm's ``networks``, and their index."""
    methods = own_methods()
    pages = {f"methods/{name}.md": card_page(name, method, networks) for name, method in methods.items()}
    cards = [
        f":::{{grid-item-card}} {method.title}\n:link: {name}\n:link-type: doc\n"
        f":img-top: ../_static/small/{name}.png\n:img-alt: {ALT[name]}\n\n{method.idea}\n:::\n"
        for name, method in methods.items()
    ]
    pages["methods/index.md"] = page(
        "Methods",
        "Each card says what a method does, where it goes, what it costs, when it hurts, and which options it has. "
        "`fxgraft info METHOD` prints the same. The pictures show scikit-learn's photographs; that of SelfNorm is "
        "a drawing. " + MADE_WITH,
        "::::{grid} 1 2 2 3\n:gutter: 3\n:class-container: gallery\n\n" + "\n".join(cards) + "::::",
        method_table(methods, "{name}.md"),
        toctree(methods),
    )
    return pages


def card_page(name: str, method: Any, networks: Sequence[str]) -> str:
    """Write the card of one method."""
    facts = card_sections(method)
    idea = facts.pop("idea", "")
    reference = facts.pop("reference", "").splitlines()
    facts.pop("picture", None)
    equation = facts.pop("equation", "")
    parts = [idea]
    if name in shown_methods():
        parts.append(
            f"```{{figure}} {name}.png\n:alt: What {method.title} does with two photographs\n\n{MADE_WITH}\n```"
        )
    if name in SCHEMES:
        picture = f"../_static/small/{name}.png\n:alt: {ALT[name]}"
        parts.append(f"```{{figure}} {picture}\n\n{SCHEME_MADE_OF}\n```")
    if equation:
        parts += ["## Equation", fence(equation.replace("; ", "\n"), "text")]
    headings = {"where": "Where it goes", "acts": "When it acts", "cost": "Cost", "hurts": "When it hurts"}
    for label, fact in facts.items():
        heading = headings.get(label, label.capitalize())
        lines = fact.splitlines()
        if label == "diagnostics":
            lines = [f"`{key}`: {meaning}" for key, meaning in method.measures.items()]
        parts += [
            f"## {heading}",
            "\n".join(f"- {line}" for line in lines)
            if len(lines) > 1 or label == "diagnostics"
            else sentence(fact),
        ]
        if label == "where":
            drawn = drawings(name, networks)
            parts += [
                fence(drawn, "{raw} html"),
                "::::{dropdown} The units, one by one",
                *plans(name, networks),
                "::::",
            ]
    options = "".join(f", {option}={value!r}" for option, value in method.example.items())
    parts += [
        "## Use",
        fence(f'fxgraft.patch(model, "{name}"{options})', "py"),
    ]
    parts += [
        "## Options",
        definitions(
            (f"`{option}`: `{kind}` = `{default}`", text)
            for option, kind, default, text in option_rows(method)
        ),
    ]
    parts += found_by_measuring(name)
    if method.presets:
        rows = [
            (
                f"`{preset}`",
                "\n\n".join(
                    filter(
                        None,
                        (
                            f"Source: {source}.",
                            f"Options: `{options}`." if options else "",
                            f"Training: {training}" if training != "None" else "",
                        ),
                    )
                ),
            )
            for preset, source, options, training in preset_rows(method)
        ]
        parts += [
            "## Presets",
            f'`fxgraft.patch(model, "{name}", preset=...)` takes one of these. Options that you give win.',
            definitions(rows),
        ]
    if reference:
        paper, *links = reference
        parts += ["## Reference", f"{paper}. " + " ".join(f"<{link}>" for link in links)]
    return page(f"{name}: {method.title}", *parts)


def plans(name: str, networks: Sequence[str]) -> list[str]:
    """Write the plans of a method on the networks where it goes on them."""
    parts = []
    for model in networks:
        try:
            plan = planned(model, name)
        except fxgraft.FxgraftError:
            continue  # the drawings say why
        first, *lines = str(plan).splitlines()
        shown = [*lines[:MOST_LINES], *([f"  … {len(lines)} in all"] if len(lines) > MOST_LINES else [])]
        parts += [f"On {model}:", fence("\n".join([first, *shown]), "text")]
    return parts


@functools.cache
def results() -> dict[str, str]:
    """Read the tables of results once."""
    return result_tables()


def found_by_measuring(name: str) -> list[str]:
    """Write what the tables of results say of a method: its costs by network, and a paragraph for each verdict."""
    heading, *rows = map(cells, results()["overhead"].splitlines())
    columns = [heading, *(row for row in rows if "bare again" in row[0]), *rows_of(name, rows)]
    costs = "Not measured yet."
    if len(columns) > 2:
        first, *networks = zip(*columns, strict=True)
        costs = "\n".join(f"| {' | '.join(row)} |" for row in (first, ("---",) * len(first), *networks))
    evidence = []
    for graft, paper, data, scores, gain, pairs, seen, verdict in rows_of(
        name, map(cells, results()["evidence"].splitlines())
    ):
        beside = (
            "Beside " if scores.startswith("`") else ""
        )  # what it was compared with, where that isn't bare
        said = (
            f"{beside}{scores}. {pairs} pairs of runs, which would show a gain of {seen} points. On {data}."
        )
        evidence.append(
            (f"{graft}: **{verdict}**, {gain} points", f"{said}\n\nThe paper says: {paper}."),
        )
    return [
        "## Cost, measured",
        costs,
        "Time of a training step as a multiple of the bare network's. [All costs](../reference/costs.md).",
        "## Our evidence",
        definitions(evidence) or "Nothing is shown yet by enough pairs of runs.",
        "[How to read this](../explanation/measuring.md).",
    ]


def cells(row: str) -> list[str]:
    """Split a row of a table in Markdown."""
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def rows_of(name: str, rows: Iterable[list[str]]) -> list[list[str]]:
    """Choose the rows of a method: the first cell names it, alone or with options."""
    return [row for row in rows if re.search(rf"\b{name}\b", row[0])]


def reference_pages() -> dict[str, str]:
    """Write the reference: API, command line, grammar, file format, and what was measured."""
    tables = results()
    pages = {
        "reference/api.md": page(
            "API: fxgraft",
            "Every name here is `fxgraft.NAME`. A call that fails raises one of the errors at the end of this page.",
            *api_parts(fxgraft),
        ),
        "reference/api-mixmo.md": page(
            "API: fxgraft.mixmo", inspect.cleandoc(mixmo.__doc__ or ""), *api_parts(mixmo)
        ),
        "reference/api-gam.md": page(
            "API: fxgraft.gam", inspect.cleandoc(gam.__doc__ or ""), *api_parts(gam)
        ),
        "reference/api-extend.md": page(
            "API: fxgraft.extend", markdown(extend.__doc__ or ""), *api_parts(extend)
        ),
        "reference/command-line.md": command_line_page(),
        "reference/grammar.md": page("Grafts as text", markdown(spec.__doc__ or "")),
        "reference/file-format.md": page("The file format", markdown(recipe.__doc__ or "")),
        "reference/works-with.md": page(
            "Works with",
            "Each cell is a test. The tables are what the tests wrote down. Patch first, wrap after.",
            "## Tools",
            tables["works-with"],
            "## Loops",
            "What a loop of yours may do with labels, losses and steps. Each test trains a small network in such a "
            "loop and in a plain one, and compares the weights.",
            tables["loops"],
        ),
        "reference/coverage.md": page("Coverage", raised((RESULTS / "zoo.md").read_text(encoding="utf-8"))),
        "reference/costs.md": page(
            "Costs",
            "The time of a training step as a multiple of the bare network's. Both were measured in turns in one "
            "process: batches of four images of 128 pixels on one CPU core. The first row is the noise: a second bare "
            "network in place of the patched one. `gam` is its taps alone; its own step makes two more passes.",
            tables["overhead"],
            "## Compiled",
            "Under `torch.compile(fullgraph=True)`, against the compiled bare network.",
            tables["compiled"],
            "## On a GPU",
            "An H200, batches of 64 images of 224 pixels in float32.",
            tables["cuda"],
            "## Beside code by hand",
            "In parentheses stands the same method written by hand with forward hooks (`benchmarks/by_hand.py`). "
            "There, looking ahead is another pass of the whole network.",
            tables["by-hand"],
            "## Fixed cost",
            "What a call costs whatever the network, in microseconds, on one image of 96 pixels and a tiny network.",
            tables["fixed-cost"],
            "## Details",
            raised((RESULTS / "overhead.md").read_text(encoding="utf-8"), 2),
        ),
        "reference/results.md": page(
            "Results",
            "What each paper claims, and what we found in pairs of runs that differ in the method alone. "
            "The [explanation](../explanation/measuring.md) says how to read the columns.",
            tables["evidence"],
            "## Files and protocols",
            raised((RESULTS / "README.md").read_text(encoding="utf-8").partition("\n")[2], 2),
        ),
    }
    names = [name.removeprefix("reference/").removesuffix(".md") for name in pages]
    pages["reference/index.md"] = page(
        "Reference",
        "Everything here is generated from the code and from the committed results. "
        "{ref}`All names <genindex>` are in an index.",
        toctree(names, hidden=False),
    )
    return pages


def other_pages() -> dict[str, str]:
    """Write the glossary, the papers and the page of errors."""
    words = re.findall(r"^- A \*\*(\w+)\*\* (.+)$", extend.__doc__ or "", re.MULTILINE)
    return {
        "generated/glossary.md": page(
            "Glossary",
            "Each of these words is used for one thing.",
            "```{glossary}\n"
            + "\n".join(f"{word}\n: A {word} {roles(text)}" for word, text in words)
            + "\n```",
        ),
        "generated/papers.md": page(
            "Papers", "If you use a method, cite its paper.", citations(own_methods())
        ),
        "generated/troubleshooting.md": troubleshooting_page(),
    }


def citations(methods: Mapping[str, type[fxgraft.Patch]]) -> str:
    """Return the list of papers; one that several methods come from is listed once."""
    papers: dict[str, list[type[fxgraft.Patch]]] = {}
    for method in methods.values():
        papers.setdefault(method.url, []).append(method)
    return "\n".join(
        f"- {', '.join(f'`{method.method}`' for method in sharing)}: [{sharing[0].paper}]({url})"
        for url, sharing in papers.items()
    )


def api_parts(module: Any) -> list[str]:
    """Write the public names of a module, by kind."""
    kinds: dict[str, list[str]] = {
        "Functions": [],
        "Methods": [],
        "Classes": [],
        "Modules": [],
        "Other names": [],
        "Errors and warnings": [],
    }
    for name in sorted(module.__all__):
        thing = getattr(module, name)
        if name == "__version__":
            continue
        directive = "autofunction"
        if inspect.ismodule(thing):
            kind, directive = "Modules", "automodule"
        elif inspect.isclass(thing) and issubclass(thing, BaseException):
            kind, directive = "Errors and warnings", "autoexception"
        elif inspect.isclass(thing):
            kind = "Methods" if issubclass(thing, fxgraft.Patch) and thing is not fxgraft.Patch else "Classes"
            directive = "autoclass"
        elif callable(thing):
            kind = "Functions"
        else:
            kinds["Other names"].append(f"- `{name}`")
            continue
        if module is not fxgraft and kind == "Errors and warnings":
            continue  # on the page of fxgraft
        lines = [f".. {directive}:: {name}"]
        if directive == "automodule":
            lines = [f".. automodule:: {thing.__name__}", "   :members:", "   :no-index:"]
        elif directive == "autoclass" and kind != "Methods":
            lines.append("   :members:")
        if module is not fxgraft and hasattr(fxgraft, name) and name in fxgraft.__all__:
            lines.append("   :no-index:")
        kinds[kind].append("\n".join(lines))
    parts = []
    for kind, found in kinds.items():
        if kind == "Other names" and found:
            parts += [f"## {kind}", "\n".join(found)]
        elif found:
            module_line = f".. currentmodule:: {module.__name__}\n\n"
            parts += [f"## {kind}", fence(module_line + "\n\n".join(found), "{eval-rst}")]
    return parts


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """List the commands of a group that are not hidden, and of the groups in it."""
    for name, each in group.commands.items():
        if hasattr(each, "commands"):
            yield from _commands(each, f"{before}{name} ")
        elif not each.hidden:
            yield f"{before}{name}", each


def command_line_page() -> str:
    """Write the commands with their arguments and options."""
    command: Any = typer.main.get_command(app)
    parts = [
        "`fxgraft --install-completion` makes names complete. "
        "What goes wrong for a known reason is one message and exit code 2."
    ]
    for name, each in _commands(command):
        arguments = [param for param in each.params if param.param_type_name == "argument"]
        options = [
            param
            for param in each.params
            if param.param_type_name == "option" and param.name != "help" and not param.hidden
        ]
        words = [param.name.upper() if param.required else f"[{param.name.upper()}]" for param in arguments]
        called = " ".join([f"fxgraft {name}", *words])
        help_text, *examples = [line.strip() for line in inspect.cleandoc(each.help or "").split("\n\n")]
        parts += [f"## {name}", help_text, fence("\n".join([called, *examples]), "text")]
        rows = [(f"`{param.name.upper()}`", sentence(param.help or "")) for param in arguments]
        rows += [
            (", ".join(f"`{word}`" for word in param.opts), sentence(param.help or "")) for param in options
        ]
        parts.append(definitions(rows))
    return page("Command line", *parts)


def troubleshooting_page() -> str:
    """Write a heading for each error class, with the messages that it comes with."""
    said = messages()
    parts = [
        "Every error of fxgraft says what is wrong, why, and what to do. Below are their first sentences. `…` stands "
        "for a name or a number of your call."
    ]
    for name, thing in vars(errors).items():
        if inspect.isclass(thing) and issubclass(thing, (errors.FxgraftError, errors.FxgraftWarning)):
            built_in = [
                base.__name__
                for base in thing.__mro__
                if base.__module__ == "builtins" and base not in (object, BaseException, Exception)
            ]
            parts += [f"## {name}", roles(inspect.cleandoc(thing.__doc__ or ""))]
            if built_in:
                parts.append(f"`except {built_in[0]}` catches it as well.")
            parts.append("\n".join(f"- `` {text} ``" for text in said.get(name, [])))
    return page("Troubleshooting", *parts)


def messages() -> dict[str, list[str]]:
    """Read the first lines of the messages out of the source, by the class that is raised with them."""
    found: dict[str, set[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                text = _text(node.args[0]).partition("\n")[0].replace("`", "'").strip()
                if node.func.id in vars(errors) and len(text.split()) > 3:
                    found.setdefault(node.func.id, set()).add(text)
    return {name: sorted(texts) for name, texts in found.items()}


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


def page(title: str, *parts: str) -> str:
    """Put a page together."""
    return "\n\n".join([f"# {title}", *filter(None, parts)])


def fence(text: str, kind: str) -> str:
    """Write a fence."""
    return f"```{kind}\n{text}\n```"


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Write a definition list."""
    return "\n\n".join(f"{term}\n: " + (roles(text) or "-").replace("\n\n", "\n\n  ") for term, text in rows)


def sentence(text: str) -> str:
    """Begin with a capital, unless code stands first, and end with a stop."""
    text = roles(text.strip())
    first = text[:1] if re.match(r"\w+=", text) else text[:1].upper()
    return first + text[1:] + ("" if text.endswith((".", "?", "…")) or not text else ".")


def roles(text: str) -> str:
    """Turn double backticks into single ones, as Markdown has them."""
    return text.replace("``", "`")


def markdown(doc: str) -> str:
    """Turn a docstring into Markdown: an indented block becomes a fence, and indented lines below a colon a list."""
    text = roles(inspect.cleandoc(doc))
    blocks = []
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines) and blocks:
            body = "\n".join(line[4:] for line in lines)
            if blocks[-1].startswith("```"):
                blocks[-1] = blocks[-1].removesuffix("\n```") + f"\n\n{body}\n```"
            else:
                blocks[-1] = re.sub(r"::$", ":", blocks[-1])
                kind = "py" if body.startswith("from ") else "text"
                blocks.append(f"```{kind}\n{body}\n```")
        else:
            blocks.append(
                re.sub(r"^    (?=\w)", "- ", block, flags=re.MULTILINE).replace(":\n- ", ":\n\n- ", 1)
            )
    return "\n\n".join(blocks)


def raised(text: str, depth: int = 1) -> str:
    """Shift the headings of a document below the one of its page."""
    return re.sub(r"^(#+ )", "#" * depth + r"\1", text.strip(), flags=re.MULTILINE)


def toctree(names: Iterable[str] | Mapping[str, Any], hidden: bool = True) -> str:
    """Write the tree of pages below an index."""
    option = ":hidden:\n" if hidden else ":maxdepth: 1\n"
    return "```{toctree}\n" + option + "\n" + "\n".join(names) + "\n```"
