"""Models on the Hugging Face hub: ``fxgraft.push_to_hub(model, repo)``, with a card that says what is on them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from jinja2 import Environment, TemplateError, meta
from torch import nn

from fxgraft.errors import ConfigError, RecipeError
from fxgraft.graph.grafting.lookup import grafts_on
from fxgraft.io.hub_client import problem_of
from fxgraft.io.recipe import FILE
from fxgraft.io.save_load import save

_CARD = """\
# {{ title }}

A model with grafts of [fxgraft](https://pypi.org/project/fxgraft/).

```python
import fxgraft

model = fxgraft.load("hf-hub:{{ repo }}")
```

## Grafts

{{ grafts }}

## Evidence

{{ evidence }}

## Citations

{{ citations }}
"""
_NO_EVIDENCE = (
    "None was given. Whether the grafts help on your images has to be measured: "
    "`fxgraft compare` does, in pairs."
)


def push_to_hub(
    model: nn.Module,
    repo: str,
    *,
    evidence: str | None = None,
    template: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a model with fxgraft",
    build: Mapping[str, Any] | None = None,
) -> str:
    """Save a patched model to a repository of the Hugging Face hub, with a card that says what is on it.

    Args:
        model: a patched model.
        repo: ``owner/name``; it is made if need be.
        evidence: what was measured, in Markdown, as ``result.to_markdown()`` of `fxgraft.compare`. The card says so
            where it is left out.
        template: the card in Jinja, with ``{{ grafts }}``, ``{{ evidence }}`` and ``{{ citations }}``, and perhaps
            ``{{ title }}`` and ``{{ repo }}``.
        private: whether a new repository is private.
        token: an access token of the hub; by default that of ``hf auth login``.
        message: the commit's message.
        build: how to make the model, as for `save`.

    Returns:
        The address of the commit.

    Raises:
        RecipeError: the model cannot be saved, or the hub does not take it.
        ConfigError: the template leaves something out. Nothing is sent then.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = save(model, Path(folder) / FILE, build=build)
        (file.parent / "README.md").write_text(card(model, repo, evidence, template), encoding="utf-8")
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
        except Exception as error:  # of the client, its HTTP library and the system
            raise RecipeError(problem_of(error, f"The model cannot be pushed to {repo!r}", repo)) from error


def card(model: nn.Module, repo: str, evidence: str | None = None, template: str | None = None) -> str:
    """Write the card of a patched model: its grafts with their options, evidence, citations.

    Raises:
        ConfigError: the template leaves something out, or is none.
    """
    text = _CARD if template is None else template
    try:
        environment = Environment(autoescape=False)  # noqa: S701 - Markdown
        missing = {"grafts", "evidence", "citations"} - meta.find_undeclared_variables(
            environment.parse(text)
        )
    except TemplateError as error:
        raise ConfigError(
            f"The template of the card cannot be read: {error}.\nIt is text with {{{{ grafts }}}} and the like in it."
        ) from error
    if missing:
        raise ConfigError(
            f"The template of the card leaves out {', '.join(sorted(missing))}.\n"
            "Whoever finds the model has to learn what is on it, what was measured, and whose work it is.\n"
            f"Add {' and '.join(f'{{{{ {name} }}}}' for name in sorted(missing))}."
        )
    patches = [(graft.name, graft.patch) for graft in grafts_on(model)]
    rows = []
    for name, patch in patches:
        options = ", ".join(f"`{k}={v!r}`" for k, v in patch.to_dict().items() if k != "method")
        rows.append(f"- **{name}**: {patch.title or patch.method}. Options: {options or 'the defaults'}.")
    cited = dict.fromkeys(f"- {' '.join(filter(None, (patch.paper, patch.url)))}" for _, patch in patches)
    body = environment.from_string(text).render(
        title=repo.rpartition("/")[2],
        repo=repo,
        grafts="\n".join(rows),
        evidence=evidence or _NO_EVIDENCE,
        citations="\n".join(line for line in cited if line != "- ") or "The methods name none.",
    )
    data = huggingface_hub.ModelCardData(
        library_name="fxgraft", tags=["fxgraft", *sorted({patch.method for _, patch in patches})]
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"
