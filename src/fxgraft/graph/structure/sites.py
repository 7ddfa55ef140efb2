"""From a user's words (names, globs, stage numbers) to sites, and the listing of all sites of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from fxgraft.errors import SiteError, TraceError, candidates
from fxgraft.graph.structure.site import Site, last_called, module_site, node_sites
from fxgraft.graph.structure.stages import stage_at
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.tracer import is_primitive

SiteSpec = str | int | Sequence[str | int]
"""How users name sites: a qualified name, a glob, a node name, a stage number, or several of these."""


def _called_children(trace: ModelTrace, owner: str) -> list[Site]:
    """List the children that a module calls, without looking into its forward."""
    calls = trace.observation.calls
    inside = {path for path in calls if path and trace.caller(path) == owner}
    return [module_site(trace, path) for path in [path for path in trace.in_order() if path in inside]]


def _walk(trace: ModelTrace, owner: str, pattern: str | None) -> Iterator[Site]:
    look_inside = pattern is None or _may_match(pattern, owner)
    try:
        own = node_sites(trace, owner) if look_inside else _called_children(trace, owner)
    except TraceError:
        own = _called_children(trace, owner)
    for site in own:
        if site.path and not is_primitive(trace.module(site.path)):
            yield from _walk(trace, site.path, pattern)
        yield site


def list_sites(trace: ModelTrace, pattern: str | None = None) -> list[Site]:
    """List every site of a model, or those whose names match a glob, in the order they run.

    Modules that cannot be traced are listed with their children's outputs only.

    Raises:
        SiteError: nothing matches; lists close matches.
    """
    listed = list({site.name: site for site in _walk(trace, "", pattern)}.values())
    if pattern is None:
        return listed
    matching = [site for site in listed if matches(pattern, site.name)]
    if not matching:
        raise SiteError(
            f"No site matches {pattern!r} in {trace.name}.\n"
            f"{candidates(pattern, [site.name for site in listed])}\n"
            "'*' stands for one part of a name, '**' for any number of parts."
        )
    return matching


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]*\])", pattern)
    special = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(special.get(part) or _literal_or_set(part) for part in parts))


def _literal_or_set(part: str) -> str:
    try:
        return part if part.startswith("[") and re.compile(part) else re.escape(part)
    except re.error:  # a bracket that opens no set stands for itself
        return re.escape(part)


def matches(pattern: str, name: str) -> bool:
    """Say whether a name matches a glob."""
    return name == pattern or _regex(pattern).fullmatch(name) is not None


def _may_match(pattern: str, owner: str) -> bool:
    """Say whether a value directly inside ``owner`` could match; saves tracing every module."""
    if "**" in pattern:
        return True
    head = pattern.rpartition(".")[0]
    return matches(head, owner) if head else owner == ""


def is_glob(word: str) -> bool:
    """Say whether a word is a pattern rather than a name; a bracket that is not closed opens no set."""
    return re.search(r"[*?]|\[[^\]]*\]", word) is not None


def resolve(trace: ModelTrace, words: SiteSpec) -> list[Site]:
    """Turn a user's words into sites, in the order of the words.

    Args:
        trace: the trace of the bare model.
        words: qualified module names (``name_1`` for a second call), node names, globs, or stage numbers
            (indices into ``feature_info``; -1 is the last stage), alone or in a sequence.

    Raises:
        SiteError: nothing or more than one thing has that name; lists candidates.
    """
    wanted = list(words) if isinstance(words, Iterable) and not isinstance(words, str) else [words]
    sites: list[Site] = []
    for word in wanted:
        if isinstance(word, bool) or not isinstance(word, (str, int)):
            raise SiteError(
                f"A site is a name or a stage number, not {word!r} ({type(word).__name__}).\n"
                'Pass for example layer="layer4", layer=-1 or layer=["layer3", "layer4"].'
            )
        sites += [stage_at(trace, word)] if isinstance(word, int) else _named(trace, word)
    unique = {site.name: site for site in sites}
    if not unique:
        raise SiteError("No site was named.\nPass at least one layer, for example layer=-1.")
    return list(unique.values())


def _named(trace: ModelTrace, word: str) -> list[Site]:
    calls = trace.observation.calls
    if is_glob(word):
        modules = {
            path: module_site(trace, path) for path in trace.in_order() if path and matches(word, path)
        }
        try:
            listed = {site.name: site for site in list_sites(trace, word)}
        except SiteError:
            if not modules:
                raise
            listed = {}
        return list({**listed, **modules}.values())
    if word and word in calls:
        return [module_site(trace, word)]
    inner, _, number = word.rpartition("_")
    if inner in calls and number.isdigit() and 0 < int(number) < len(calls[inner]):
        return _repeated(trace, inner, int(number))
    sequential = last_called(trace, word)
    if sequential:
        return [module_site(trace, sequential)]
    owner, _, node = word.rpartition(".")
    while owner and owner not in calls:
        owner, _, rest = owner.rpartition(".")
        node = f"{rest}.{node}"
    for site in node_sites(trace, owner) if word else []:
        if site.name == word:
            return [site]
    raise _unknown(trace, word)


def _repeated(trace: ModelTrace, path: str, call: int) -> list[Site]:
    wanted = f"{path}_{call}"
    owner = trace.caller(path)
    for site in node_sites(trace, owner):
        if site.name == wanted:
            return [site]
    raise SiteError(
        f"{wanted!r} is call number {call} of {path!r}, but {owner or 'the model'!r} does not make all its "
        f"calls itself.\nName a site inside the module that makes the call."
    )


def _unknown(trace: ModelTrace, word: str) -> SiteError:
    calls = trace.observation.calls
    paths = [path for path in calls if path]
    tails = [path for path in paths if path.endswith("." + word)]
    if len(tails) > 1:
        return SiteError(
            f"{word!r} is ambiguous in {trace.name}: {len(tails)} modules end in that name.\n"
            f"{candidates(word, tails)}\n"
            f"Pass one full name, or the pattern '**.{word}' for all of them."
        )
    named = {name for name, _ in trace.model.named_modules()}
    if word and word in named:
        return SiteError(
            f"{word!r} is a module of {trace.name}, but its forward is never called in a pass.\n"
            f"{candidates(word, paths)}\nName one of its parts, or the module that uses it."
        )
    known = tails or [site.name for site in list_sites(trace)]
    return SiteError(
        f"There is no site {word!r} in {trace.name}.\n{candidates(word, known)}\n"
        "fxgraft.sites(model) lists all of them."
    )


def named_sites(trace: ModelTrace, words: SiteSpec) -> dict[str, Site]:
    """Resolve a user's words to sites by the names their values get, in the order of the words.

    A word that is the name of one site is the name of its value; globs and stage numbers give the names of
    the sites they resolve to.

    Args:
        trace: the trace of the bare model.
        words: site names, as `resolve` takes them.

    Raises:
        SiteError: nothing or more than one thing has that name; lists candidates.
    """
    wanted = list(words) if isinstance(words, Iterable) and not isinstance(words, str) else [words]
    sites: dict[str, Site] = {}
    for word in wanted:
        for site in resolve(trace, word):
            named = isinstance(word, str) and not is_glob(word)
            sites[word if named else site.name] = site  # type: ignore[index]
    if not sites:
        raise SiteError('No site was named.\nPass at least one layer, for example layers=["layer3", -1].')
    return sites
