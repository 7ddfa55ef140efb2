"""The errors of fxgraft: each says what is wrong, why, and what to do instead.

All of them derive from `FxgraftError`, and each also from the builtin it refines, so that
``except ValueError`` written for a wrong number goes on working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FxgraftError(Exception):
    """Root of every error raised on purpose by fxgraft."""


class ConfigError(FxgraftError, ValueError, TypeError):
    """An option of a patch, or an argument of a call, is outside what the method defines."""


class SiteError(FxgraftError, ValueError):
    """A site is unknown, ambiguous, or not of a kind that the method can work on."""


class StructureError(FxgraftError, ValueError):
    """The backbone lacks a structure (a pooled linear head, a residual join) that the method needs."""


class TraceError(FxgraftError, RuntimeError):
    """torch.fx cannot trace a module that has to be opened."""


class WrappedModelError(FxgraftError, TypeError):
    """The model is already wrapped, compiled or exported: patch first, wrap after."""


class UnknownGraftError(FxgraftError, KeyError):
    """There is no such graft on this model."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TargetError(FxgraftError, ValueError):
    """Labels are missing, stale, of the wrong size, or out of range."""


class BypassError(FxgraftError, RuntimeError):
    """A call would run, or has run, around a graft that should have acted."""


class RecipeError(FxgraftError, ValueError, RuntimeError):
    """A saved recipe is damaged, foreign, of an unknown version, or made for another architecture."""


class FxgraftWarning(UserWarning):
    """A setting that works but cannot do what it is for."""


class MethodError(ConfigError):
    """A method is not written as fxgraft needs it; says what to write."""


class MergeError(FxgraftError, RuntimeError):
    """A patch changes the trained function in a way that stock weights cannot express."""


@contextmanager
def because(why: str) -> Iterator[None]:
    """Add to what a search of the block raises why it was made, for finders that state neutral facts.

    Args:
        why: one sentence of the caller.

    Raises:
        SiteError, StructureError: as in the block, with ``why`` below.
    """
    try:
        yield
    except (SiteError, StructureError) as error:
        kind = StructureError if isinstance(error, StructureError) else SiteError
        raise kind(f"{error}\n{why}") from error


def no_method(name: str, known: Iterable[str]) -> UnknownGraftError:
    """Say that there is no method of a name.

    Args:
        name: what was asked for.
        known: the names of all methods.
    """
    return UnknownGraftError(
        f"There is no method {name!r}. {candidates(name, known)}\n"
        "fxgraft info and fxgraft.methods() list them; your own are added with @fxgraft.register."
    )


def candidates(word: object, known: Iterable[str], limit: int = 8) -> str:
    """Format what the user may have meant: close matches first, otherwise the first few that exist.

    Args:
        word: what was asked for; where that is no text, nothing is close to it.
        known: every name that would have worked.
        limit: how many names to show at most.
    """
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(str(word), names, n=3, cutoff=0.5)
    if close:
        return "Close matches: " + ", ".join(repr(name) for name in close) + "."
    if not names:
        return "There are none."
    shown = ", ".join(repr(name) for name in names[:limit])
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return f"There are: {shown}{more}."


def no_module(value: object) -> WrappedModelError:
    """Say that something isn't a model."""
    return WrappedModelError(
        f"A model is a torch.nn.Module, and this is of type {type(value).__name__}.\n"
        "Pass the model itself, as timm.create_model returns it."
    )
