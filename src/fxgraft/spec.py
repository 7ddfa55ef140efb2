"""Grafts as text, on command lines, in files and in `fxgraft.patch`: ``rsc:layer=layer4,spatial_drop=0.5 + selfnorm``.

The grammar:

    grafts  = graft { " + " graft }                a plus sign between blanks
    graft   = method [ ":" option { "," option } ]
    option  = key "=" value
    value   = a Python literal: 0.5, -1, True, None, 'text', (1, 2), [1, 2], {'a': 1}
            | true, false, none                    in any case
            | [word, word, ...] or (word, ...)     a list, of literals and words
            | anything else                        a string: layer4, layer[34].*, stages.3

Commas and plus signs inside of brackets and quotes belong to the value, blanks around words do not. Brackets and
quotes are balanced. A key comes once, and ``preset``, ``name`` and ``input_size`` are keys as well. Nothing is
evaluated. What a method makes of its options is not a matter of the grammar.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxgraft.errors import ConfigError

_FORM = "Write it as METHOD:key=value,key=value, for example rsc:layer=layer4,spatial_drop=0.5"
_TAKEN = ("model", "method", "dry_run")
_CONSTANTS = {"true": True, "false": False, "none": None}
_BRACKETS = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class PatchSpec:
    """One graft as text.

    Attributes:
        text: what was written, blanks at the ends removed.
        method: name of the method, as `fxgraft.patch` takes it.
        options: keyword arguments for `fxgraft.patch`.
    """

    text: str
    method: str
    options: dict[str, Any]


def parse_patch_spec(text: str) -> PatchSpec:
    """Read ``METHOD[:key=value[,key=value...]]``.

    A value that is a Python literal (number, ``True``, ``None``, quoted string, tuple, list) is taken as
    one, ``true``, ``false`` and ``none`` too; anything else is a string: ``layer=layer4`` and ``layer="layer4"``
    are the same. Commas inside brackets and quotes belong to the value: ``layers=[layer3,layer4]``. Whether the
    method exists, and what its options allow, is left to `fxgraft.patch`, which also takes ``preset=``, ``name=`` and
    ``input_size=``.

    Args:
        text: the specification; the part from the colon on may be missing.

    Raises:
        ConfigError: the method is missing, an option is not ``key=value`` or comes twice, or a bracket or quote
            stays open; shows the grammar and an example.
    """
    written = text.strip()
    method, colon, rest = written.partition(":")
    method = method.strip()
    if not method.replace("-", "_").isidentifier():
        raise ConfigError(f"The graft {text!r} does not start with the name of a method.\n{_FORM}.")
    if colon and not rest.strip():
        raise ConfigError(f"The graft {text!r} has a colon and no options.\n{_FORM}.")
    options: dict[str, Any] = {}
    for part in _split(rest, text) if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or not key.isidentifier():
            raise ConfigError(
                f"{part.strip()!r} in the graft {text!r} is not key=value.\n{_FORM}; several values go in brackets, "
                "as layers=[layer3,layer4]."
            )
        if key in options:
            raise ConfigError(f"The graft {text!r} gives {key!r} twice.\n{_FORM}.")
        if key in _TAKEN:
            raise ConfigError(f"{key!r} in the graft {text!r} isn't an option of a method.\n{_FORM}.")
        options[key] = _value(value)
    return PatchSpec(written, method, options)


def split_grafts(text: str) -> list[str]:
    """Split ``GRAFT + GRAFT + ...`` at the plus signs between blanks that lie outside brackets and quotes."""
    return [part.strip() for part in _split(text, text, "+")]


def parse_grafts(text: str) -> list[PatchSpec]:
    """Read ``GRAFT + GRAFT + ...``; raises as `parse_patch_spec`."""
    return [parse_patch_spec(part) for part in split_grafts(text)]


def describe(method: str, options: Mapping[str, Any]) -> str:
    """Write a method and its options so that `parse_patch_spec` reads them again, words without quotes if it can."""
    settings = ",".join(f"{key}={_word(value)}" for key, value in options.items())
    return f"{method}:{settings}" if settings else method


def _word(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value)
    try:
        plain = (
            parse_patch_spec(f"x:value={value}").options == {"value": value} and len(split_grafts(value)) == 1
        )
    except ConfigError:
        plain = False
    return value if plain else repr(value)


def _value(word: str) -> Any:
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes
            return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        inner = word[1:-1]
        if word[0] + word[-1] not in ("[]", "()") or set(inner) & {*_BRACKETS, *_BRACKETS.values()}:
            return word
        return [_value(item.strip()) for item in inner.split(",") if item.strip()]


def _split(text: str, whole: str, separator: str = ",") -> list[str]:
    """Split at the commas outside brackets and quotes, or at another sign where it stands between blanks."""
    parts, start, quote, escaped = [], 0, "", False
    open_brackets: list[str] = []
    for index, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and not escaped else quote
            escaped = sign == "\\" and not escaped  # as in a Python literal
        elif sign in "'\"":
            quote = sign
        elif sign in _BRACKETS.values():
            open_brackets.append(sign)
        elif sign in _BRACKETS:
            # Glob sites such as `layer[34]` bring balanced brackets; a lone one is a slip of the pen.
            if not open_brackets or open_brackets.pop() != _BRACKETS[sign]:
                raise ConfigError(f"The graft {whole!r} closes a {sign!r} that was never opened.\n{_FORM}.")
        elif sign == separator and not open_brackets:
            if separator != "," and not (
                text[index - 1 : index].isspace() and text[index + 1 : index + 2].isspace()
            ):
                continue
            parts.append(text[start:index])
            start = index + 1
    if quote or open_brackets:
        raise ConfigError(f"The graft {whole!r} leaves a {quote or open_brackets[-1]!r} open.\n{_FORM}.")
    return [*parts, text[start:]]
