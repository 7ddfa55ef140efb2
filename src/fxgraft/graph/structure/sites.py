"""Sites: from a user's words (names, globs, stage numbers) to places in a model, and the listing of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxgraft.errors import SiteError, StructureError, TraceError, candidates
from fxgraft.graph.structure.layout import Layout, layout_of
from fxgraft.graph.structure.outputs import take_logits
from fxgraft.graph.structure.site import Site as Site
from fxgraft.graph.structure.site import Sites as Sites
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.names import inside, join
from fxgraft.graph.tracing.trace import is_primitive
from fxgraft.graph.tracing.values import shape_of

Words = str | int | Sequence[str | int]
"""How users name sites: a qualified name, a glob, a node name, a stage number, or several of these."""


def call_name(node: fx.Node) -> str:
    """Name a node as users write it: a child's own name (``name_1`` for its second call), else its fx name."""
    if node.op != "call_module":
        return node.name
    earlier = [
        n for n in node.graph.nodes if n.op == "call_module" and n.target == node.target and n is not node
    ]
    rank = sum(1 for n in earlier if n < node)
    return f"{node.target}_{rank}" if rank else str(node.target)


def _describe(anatomy: Anatomy, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {}
    layout = layout_of(anatomy, value, path, strict=False)
    return {
        "shape": shape_of(value),
        "dtype": str(value.dtype).removeprefix("torch."),
        "layout": str(layout) if isinstance(layout, Layout) else "",
    }


def module_site(anatomy: Anatomy, path: str, call: int = 0) -> Site:
    """Describe the output of a module's call as a site."""
    calls = anatomy.observation.calls[path]
    record = calls[call]
    owner = anatomy.caller(path)
    return Site(
        name=path if call == 0 else f"{path}_{call}",
        owner=owner,
        node="",
        path=path,
        calls=len(calls),
        checkpointed=record.checkpointed,
        op=type(anatomy.module(path)).__name__,
        **_describe(anatomy, record.output, path),
    )


def node_sites(anatomy: Anatomy, owner: str) -> list[Site]:
    """List the values in one module's forward, in running order: children's calls and what is between them.

    Args:
        anatomy: of the bare model.
        owner: the module whose forward is looked at.
    """
    values = anatomy.values(owner)
    found = []
    for node in anatomy.graph(owner, training=False).graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        name = call_name(node)
        value = values.get(node.name)
        if node.op == "call_module":
            path = join(owner, str(node.target))
            if name == str(node.target) and path in anatomy.observation.calls:
                found.append(dataclasses.replace(module_site(anatomy, path), owner=owner, node=node.name))
                continue
            op = type(anatomy.module(path)).__name__
        elif isinstance(value, Tensor):
            op = getattr(node.target, "__name__", str(node.target))
        else:
            continue
        found.append(Site(join(owner, name), owner, node.name, op=op, **_describe(anatomy, value, "")))
    return found


def _called_children(anatomy: Anatomy, owner: str) -> list[Site]:
    """List the children that a module calls, without looking into its forward."""
    calls = anatomy.observation.calls
    inside = {path for path in calls if path and anatomy.caller(path) == owner}
    return [module_site(anatomy, path) for path in [path for path in anatomy.in_order() if path in inside]]


def _walk(anatomy: Anatomy, owner: str, pattern: str | None) -> Iterator[Site]:
    look_inside = pattern is None or _may_match(pattern, owner)
    try:
        own = node_sites(anatomy, owner) if look_inside else _called_children(anatomy, owner)
    except TraceError:
        own = _called_children(anatomy, owner)
    for site in own:
        if site.path and not is_primitive(anatomy.module(site.path)):
            yield from _walk(anatomy, site.path, pattern)
        yield site


def list_sites(anatomy: Anatomy, pattern: str | None = None) -> list[Site]:
    """List every site of a model, or those whose names match a glob, in the order they run.

    Modules that cannot be traced are listed with their children's outputs only.

    Raises:
        SiteError: nothing matches; lists close matches.
    """
    listed = list({site.name: site for site in _walk(anatomy, "", pattern)}.values())
    if pattern is None:
        return listed
    matching = [site for site in listed if matches(pattern, site.name)]
    if not matching:
        raise SiteError(
            f"No site matches {pattern!r} in {anatomy.name}.\n"
            f"{candidates(pattern, [site.name for site in listed])}\n"
            "'*' stands for one part of a name, '**' for any number of parts."
        )
    return matching


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]*\])", pattern)
    special = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(special.get(p, p if p.startswith("[") else re.escape(p)) for p in parts))


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
    """Say whether a word is a pattern rather than a name."""
    return any(sign in word for sign in "*?[")


def resolve(anatomy: Anatomy, words: Words) -> list[Site]:
    """Turn a user's words into sites, in the order of the words.

    Args:
        anatomy: of the bare model.
        words: qualified module names (``name_1`` for a second call), node names, globs, or stage numbers
            (indices into ``feature_info``; -1 is the last stage), alone or in a sequence.

    Raises:
        SiteError: nothing or more than one thing has that name; lists candidates.
    """
    each = list(words) if isinstance(words, Iterable) and not isinstance(words, str) else [words]
    found: list[Site] = []
    for word in each:
        if isinstance(word, bool) or not isinstance(word, (str, int)):
            raise SiteError(
                f"A site is a name or a stage number, not {word!r} ({type(word).__name__}).\n"
                'Pass for example layer="layer4", layer=-1 or layer=["layer3", "layer4"].'
            )
        found += [_stage(anatomy, word)] if isinstance(word, int) else _named(anatomy, word)
    unique = {site.name: site for site in found}
    if not unique:
        raise SiteError("No site was named.\nPass at least one layer, for example layer=-1.")
    return list(unique.values())


def _named(anatomy: Anatomy, word: str) -> list[Site]:
    calls = anatomy.observation.calls
    if is_glob(word):
        matching = [path for path in anatomy.in_order() if path and matches(word, path)]
        if matching:
            return [module_site(anatomy, path) for path in matching]
        return list_sites(anatomy, word)
    if word and word in calls:
        return [module_site(anatomy, word)]
    inner, _, number = word.rpartition("_")
    if inner in calls and number.isdigit() and 0 < int(number) < len(calls[inner]):
        return _repeated(anatomy, inner, int(number))
    sequential = _last_called(anatomy, word)
    if sequential:
        return [module_site(anatomy, sequential)]
    owner, _, node = word.rpartition(".")
    while owner and owner not in calls:
        owner, _, rest = owner.rpartition(".")
        node = f"{rest}.{node}"
    for site in node_sites(anatomy, owner) if word else []:
        if site.name == word:
            return [site]
    raise _unknown(anatomy, word)


def _repeated(anatomy: Anatomy, path: str, call: int) -> list[Site]:
    wanted = f"{path}_{call}"
    owner = anatomy.caller(path)
    for site in node_sites(anatomy, owner):
        if site.name == wanted:
            return [site]
    raise SiteError(
        f"{wanted!r} is call number {call} of {path!r}, but {owner or 'the model'!r} does not make all its "
        f"calls itself.\nName a site inside the module that makes the call."
    )


def _last_called(anatomy: Anatomy, path: str) -> str | None:
    """Follow a Sequential whose children are called one by one to the child that gives its output."""
    try:
        module = anatomy.module(path) if path else None
    except AttributeError:
        return None
    while isinstance(module, nn.Sequential) and len(module):
        name = list(module._modules)[-1]
        path = f"{path}.{name}"
        if path in anatomy.observation.calls:
            return path
        module = module._modules[name]
    return None


def _unknown(anatomy: Anatomy, word: str) -> SiteError:
    calls = anatomy.observation.calls
    paths = [path for path in calls if path]
    tails = [path for path in paths if path.endswith("." + word)]
    if len(tails) > 1:
        return SiteError(
            f"{word!r} is ambiguous in {anatomy.name}: {len(tails)} modules end in that name.\n"
            f"{candidates(word, tails)}\n"
            f"Pass one full name, or the pattern '**.{word}' for all of them."
        )
    named = {name for name, _ in anatomy.model.named_modules()}
    if word and word in named:
        return SiteError(
            f"{word!r} is a module of {anatomy.name}, but its forward is never called in a pass.\n"
            f"{candidates(word, paths)}\nName one of its parts, or the module that uses it."
        )
    return SiteError(
        f"There is no site {word!r} in {anatomy.name}.\n{candidates(word, tails or paths)}\n"
        "fxgraft.sites(model) lists all of them."
    )


def stages(anatomy: Anatomy) -> list[str]:
    """Name the stages of a backbone: timm's ``feature_info``, else the last module at each resolution.

    ``feature_info`` counts only where it names modules that return one tensor.

    Raises:
        StructureError: the model has neither.
    """
    info = getattr(anatomy.model, "feature_info", None)
    entries = getattr(info, "info", info)
    if isinstance(entries, (list, tuple)) and entries:
        names = [entry.get("module", "") if isinstance(entry, dict) else "" for entry in entries]
        if all(name and _gives_tensor(anatomy, name) for name in names):
            return names
    last: dict[int, str] = {}
    for name, layout, value in _feature_maps(anatomy):
        positions = layout.canonical(value)[0, 0].numel()
        if positions > 1:
            last.pop(positions, None)
            last[positions] = name
    if not last:
        raise StructureError(
            f"{anatomy.name} has no feature_info and no feature maps to number stages by.\n"
            "Name the layer instead; fxgraft.sites(model) lists all of them."
        )
    return list(last.values())


def _feature_maps(anatomy: Anatomy) -> Iterator[tuple[str, Layout, Tensor]]:
    """Walk through the outermost values of telling shape, in running order, up to the last layer."""
    if isinstance(anatomy.model, fx.GraphModule):
        found = [(site, anatomy.values("").get(site.node)) for site in node_sites(anatomy, "")]
        for site, value in found[:-1]:
            layout = layout_of(anatomy, value, "", strict=False) if isinstance(value, Tensor) else None
            if layout is not None:
                yield site.name, layout, value  # type: ignore[misc]
        return
    calls = anatomy.observation.calls
    ordered = [path for path in anatomy.in_order() if path]
    for path in _before_the_heads(anatomy, ordered):
        around = [path[:i] for i, sign in enumerate(path) if sign == "."]
        if len(calls[path]) == 1 and not any(name in calls and _layout(anatomy, name) for name in around):
            layout = _layout(anatomy, path)
            if layout is not None:
                yield path, layout, calls[path][0].output


def _before_the_heads(anatomy: Anatomy, ordered: list[str]) -> list[str]:
    """Leave out the last layer, and of a dense predictor all modules at its end that give maps of classes.

    There may be several, an auxiliary one or one at each scale. A dense predictor is told by logits as large as the
    image; their channels are the classes.
    """
    try:
        logits = take_logits(anatomy.observation.output(""))
    except StructureError:
        return ordered[:-1]
    if not isinstance(logits, Tensor) or logits.shape[2:] != anatomy.image_size[1:] or logits.ndim != 4:
        return ordered[:-1]
    heads: list[str] = []
    for path in (each for each in reversed(ordered) if anatomy.caller(each) == ""):
        value = anatomy.observation.output(path)
        if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] != logits.shape[1]:
            break
        heads.append(path)
    kept = [path for path in ordered[:-1] if not any(inside(path, head) for head in heads)]
    return kept or ordered[:-1]


def _layout(anatomy: Anatomy, path: str) -> Layout | None:
    """Return the layout of a module's output where it is one tensor with a telling shape."""
    value = anatomy.observation.output(path)
    return layout_of(anatomy, value, path, strict=False) if isinstance(value, Tensor) else None


def _gives_tensor(anatomy: Anatomy, path: str) -> bool:
    called = path if path in anatomy.observation.calls else _last_called(anatomy, path)
    return called is not None and isinstance(anatomy.observation.output(called), Tensor)


def _stage(anatomy: Anatomy, index: int) -> Site:
    names = stages(anatomy)
    if not -len(names) <= index < len(names):
        raise SiteError(
            f"There is no stage {index} in {anatomy.name}, which has {len(names)}.\n"
            f"They are numbered 0 to {len(names) - 1} (or from -1 backwards): "
            f"{', '.join(map(repr, names))}."
        )
    return dataclasses.replace(_named(anatomy, names[index])[0], numbered=True)


def named_sites(anatomy: Anatomy, words: Words) -> dict[str, Site]:
    """Resolve a user's words to sites by the names their values get, in the order of the words.

    A word that is the name of one site is the name of its value; globs and stage numbers give the names of
    the sites they resolve to.

    Args:
        anatomy: of the bare model.
        words: as `resolve` takes them.

    Raises:
        SiteError: nothing or more than one thing has that name; lists candidates.
    """
    each = list(words) if isinstance(words, Iterable) and not isinstance(words, str) else [words]
    found: dict[str, Site] = {}
    for word in each:
        for site in resolve(anatomy, word):
            named = isinstance(word, str) and not is_glob(word)
            found[word if named else site.name] = site  # type: ignore[index]
    if not found:
        raise SiteError('No site was named.\nPass at least one layer, for example layers=["layer3", -1].')
    return found
