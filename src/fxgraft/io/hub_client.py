"""Downloads files of recipes from the Hugging Face hub, and explains its client's errors."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fxgraft.errors import RecipeError
from fxgraft.io.reachable import offline_where_unreachable

FILE = "fxgraft.safetensors"
"""Name of the file in a repository."""


def fetch(address: str) -> Path:
    """Download the file of a recipe, or take it from the cache of huggingface_hub.

    Args:
        address: ``hf-hub:owner/name``, with ``@revision`` behind it for another one than main.

    Raises:
        RecipeError: there is no such repository, revision or file, it may not be read, or does not come whole.
    """
    repo, _, revision = address.removeprefix("hf-hub:").partition("@")
    try:
        with offline_where_unreachable():
            return Path(huggingface_hub.hf_hub_download(repo, FILE, revision=revision or None))
    except Exception as error:  # of the client, its HTTP library and the system
        raise RecipeError(problem_of(error, f"The recipe {address!r} cannot be fetched", repo)) from error


def problem_of(error: Exception, what: str, repo: str) -> str:
    """Say in three lines what a client of the hub found."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, HFValidationError):
        return f"{what}: {first}\nA repository is named owner/name.\nCorrect the name."
    if status in (401, 403):
        return (
            f"{what}: the hub asks who you are, or says no ({status}).\n"
            "It says so of private repositories, and of names that do not exist.\n"
            "Check the name, and log in: hf auth login, or set HF_TOKEN."
        )
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return f"{what}: there is no such repository or revision.\n{first}\nCheck the name: hf-hub:owner/name@revision."
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return (
            f"{what}: the hub is not reached, and there is no copy on this machine.\n{first}\n"
            "Check the connection; or copy the file by hand, and pass its path to fxgraft.load."
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{what}: {repo!r} has no file {FILE!r}.\nIt is a repository of something else.\n"
            "Pass one that fxgraft.push_to_hub wrote."
        )
    if isinstance(error, HfHubHTTPError):
        return f"{what}: the hub answers {status}.\n{first}\nTry again later."
    return f"{what}: {type(error).__name__}: {first}\nThe connection broke, or the disk is full.\nTry again."
