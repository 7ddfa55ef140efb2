"""Sites: from a user's words (names, globs, stage numbers) to places in a model, and the listing of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgraft.errors import SiteError, StructureError, TraceError, candidates
from fxgraft.graph.dataflow.flow import passed_by_all
from fxgraft.graph.structure.layout import Layout, layout_of, layout_of_value
from fxgraft.graph.structure.outputs import take_logits
from fxgraft.graph.structure.pooling import is_classifier
from fxgraft.graph.structure.site import Site as Site
from fxgraft.graph.structure.site import Sites as Sites
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.names import ancestors, inside, join
from fxgraft.graph.tracing.observe import Call, tensors
from fxgraft.graph.tracing.trace import is_primitive
from fxgraft.graph.tracing.values import shape_of
from fxgraft.graph.tracing.walks import downstream_of

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


def _last_called(anatomy: Anatomy, path: str, containers: tuple[type, ...] = (nn.Sequential,)) -> str | None:
    """Follow a Sequential whose children are called one by one to the child that gives its output."""
    try:
        module = anatomy.module(path) if path else None
    except AttributeError:
        return None
    while isinstance(module, containers) and len(module):
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


def stages(anatomy: Anatomy) -> list[Site]:
    """List the stages of a backbone, in running order.

    Those of timm's ``feature_info`` that give a map or tokens of the channels it says, the first one of several values.
    Without any, the last module at each number of places that nothing goes around on the way to the output, or every
    block where that number never changes. Modules that run several stages are looked into; a norm behind a stage
    belongs to it.

    Raises:
        StructureError: there is none.
    """
    info = getattr(anatomy.model, "feature_info", None)
    entries = getattr(info, "info", info)
    declared = [entry for entry in entries or () if isinstance(entry, dict) and entry.get("module")]
    names = {entry["module"] for entry in declared}
    found = []
    if len(names) == len(declared):  # else it does not say where its stages are
        found = [
            site
            for entry in declared
            if (site := _declared(anatomy, entry["module"], entry.get("num_chs"))) is not None
        ]
    found = found or _by_places(anatomy)
    if not found:
        raise StructureError(
            f"{anatomy.name} has no feature_info and no feature maps to number stages by.\n"
            "Name the layer instead; fxgraft.sites(model) lists all of them."
        )
    return found


def places_in(value: Any) -> int:
    """Count the places that a map or tokens have of each image; 0 for anything else, as for attention weights."""
    layout = layout_of_value(value) if isinstance(value, Tensor) else None
    return 0 if layout is None or layout.name == "NC" else layout.canonical(value)[0, 0].numel()


def _declared(anatomy: Anatomy, name: str, channels: int | None = None) -> Site | None:
    """Find the map of a stage that ``feature_info`` names; None where that module gives none, of as many channels."""

    def wanted(value: Any) -> bool:
        layout = layout_of_value(value) if isinstance(value, Tensor) else None
        if layout is None or places_in(value) < 2:
            return False
        return channels is None or layout.canonical(value).shape[1] == channels

    lists = (nn.Sequential, nn.ModuleList)
    path = name if name in anatomy.observation.calls else _last_called(anatomy, name, lists)
    if path is None:
        return None
    output = anatomy.observation.output(path)
    if isinstance(output, Tensor):
        return module_site(anatomy, path) if wanted(output) else None
    return entry_site(anatomy, path, wanted)


def entry_site(anatomy: Anatomy, path: str, wanted: Callable[[Any], bool]) -> Site | None:
    """Find the first of several values that a module returns that is as wanted; None where it cannot be told apart."""
    output = anatomy.observation.output(path)
    if not any(wanted(value) for value in pytree.tree_leaves(output)):
        return None
    try:
        graph = anatomy.graph(path, training=False).graph
    except TraceError:
        return None
    returned = pytree.tree_leaves(next(node.args[0] for node in graph.nodes if node.op == "output"))
    values = pytree.tree_leaves(output)
    if len(returned) != len(values):
        return None
    name = next(node.name for node, value in zip(returned, values, strict=True) if wanted(value))
    return next((site for site in node_sites(anatomy, path) if site.node == name), None)


def _by_places(anatomy: Anatomy) -> list[Site]:
    """Find the last value of the main path at each number of places, or the blocks where that number is one."""
    if isinstance(anatomy.model, fx.GraphModule):
        return _last_of_each(_graph_path(anatomy))
    main = _main_path(anatomy)
    opened = {""}
    for path in sorted(main, key=lambda path: path.count(".")):
        if anatomy.caller(path) in opened and (main[path] is None or _holds_stages(anatomy, path, main)):
            opened.add(path)
    outer: dict[int, str] = {}
    for path, value in main.items():
        if value is not None and anatomy.caller(path) in opened:
            known = outer.setdefault(value.made, path)
            # Of several modules that hand one value on the outermost, if it returns nothing else.
            if value.alone and path.count(".") < known.count("."):
                outer[value.made] = path
    found = _last_of_each(
        ((path, main[path].places) for _, path in sorted(outer.items())),
        lambda path, before: not _is_composite(anatomy, path) and _is_composite(anatomy, before),
    )
    if len(found) == 1:
        blocks = [
            path for path in main if main[path] and _is_composite(anatomy, path) and is_block(anatomy, path)
        ]
        found = [
            path for path in blocks if not any(inside(path, each) for each in blocks if each != path)
        ] or found
    return [site for path in found if (site := _declared(anatomy, path)) is not None]


def _last_of_each(
    counted: Iterable[tuple[Any, int]], belongs: Callable[[Any, Any], bool] = lambda each, before: False
) -> list[Any]:
    """Keep the last of those with about as many places; a border that a convolution cuts off is no other stage.

    Args:
        counted: things with their places.
        belongs: whether one that comes right behind another at its number of places does not take its place, as the
            norm behind a stage.
    """
    last: list[tuple[Any, int]] = []
    for each, places in counted:
        near = [0.7 < count / places < 1 / 0.7 for _, count in last]
        if near and near[-1] and belongs(each, last[-1][0]):
            continue
        last = [pair for pair, close in zip(last, near, strict=True) if not close]
        last.append((each, places))
    return [each for each, _ in last]


@dataclasses.dataclass(frozen=True)
class _Map:
    """A map that a module returns: its places, what made it, whether it is all that is returned, and its shape."""

    places: int
    made: int
    alone: bool
    shape: tuple[int, ...]


def _main_path(anatomy: Anatomy) -> dict[str, _Map | None]:
    """Find the map that each module returns, in running order, where all of the image goes through it.

    Where nothing is like that, as in networks of several branches, the maps of all modules. None for a module that
    returns no map but holds some that do. The classifier is left out.
    """
    observation = anatomy.observation
    calls = {path: calls[0] for path, calls in observation.calls.items() if path and len(calls) == 1}
    ordered = [path for path in _before_the_heads(anatomy, anatomy.in_order()[:-1]) if path in calls]
    maps = {path: found for path in ordered if (found := _first_map(calls[path])) is not None}
    made = [number for number in observation.calls[""][0].made if number is not None]
    main = passed_by_all(observation.flow.sources, made[0]) if made else set[int]()
    kept = {path: found for path, found in maps.items() if found.made in main} or maps
    around = {each for path in kept for each in ancestors(path)}
    return {
        path: kept.get(path)
        for path in anatomy.in_order()
        if path in kept or (path in around and path in calls)
    }


def _first_map(call: Call) -> _Map | None:
    for value, made in zip(tensors(call.output), call.made, strict=True):
        count = places_in(value)
        if count > 1 and made is not None:
            return _Map(count, made, isinstance(call.output, Tensor), tuple(value.shape))
    return None


def _holds_stages(anatomy: Anatomy, path: str, main: dict[str, _Map | None]) -> bool:
    """Say whether a module runs more than one stage.

    There is a number of places within it that it neither gets nor gives, or there are blocks in it before it gives
    fewer places: of a plain sequence any, of another module those that leave the number of channels alone.
    """
    own = {name: value for name, value in main.items() if value and inside(name, path) and name != path}
    out = main[path]
    given = next(
        (value for value in tensors(anatomy.observation.calls[path][0].args) if places_in(value) > 1), None
    )
    if out is None or given is None:
        return bool(own)
    before = places_in(given)
    if len(
        _last_of_each([("", before), ("", out.places), *(("", value.places) for value in own.values())])
    ) > (1 + (len(_last_of_each([("", before), ("", out.places)])) > 1)):
        return True
    if before == out.places:
        return False
    blocks = [own[name] for name in own if own[name].places == before and _is_composite(anatomy, name)]
    if type(anatomy.module(path)) is nn.Sequential:
        return bool(blocks)
    return any(value.shape == given.shape for value in blocks)


def _is_composite(anatomy: Anatomy, path: str) -> bool:
    return next(anatomy.module(path).children(), None) is not None


def is_block(anatomy: Anatomy, path: str) -> bool:
    """Say whether a module is one of several of its class in one `torch.nn.Sequential` or ``ModuleList``."""
    parent = anatomy.module(path.rpartition(".")[0])
    module = anatomy.module(path)
    alike = sum(type(each) is type(module) for each in parent.children())
    return bool(path) and isinstance(parent, (nn.Sequential, nn.ModuleList)) and alike > 1


def _graph_path(anatomy: Anatomy) -> list[tuple[Site, int]]:
    """Do the same for a model that is a graph: its nodes are the values."""
    nodes = list(anatomy.graph("", training=False).graph.nodes)
    carrying = {
        node for start in nodes if start.op == "placeholder" for node in (start, *downstream_of(start))
    }
    number = {node: index for index, node in enumerate(nodes)}
    sources = [tuple(number[each] for each in node.all_input_nodes if each in carrying) for node in nodes]
    main = passed_by_all(sources, len(nodes) - 1)
    values = anatomy.values("")
    names = {node.name for node in nodes if number[node] in main}
    sites = [site for site in node_sites(anatomy, "")[:-1] if site.node in names]
    return [(site, count) for site in sites if (count := places_in(values.get(site.node))) > 1]


def _before_the_heads(anatomy: Anatomy, ordered: list[str]) -> list[str]:
    """Leave out the classifier and what follows it, and of a dense predictor all that gives maps of classes.

    There may be several, an auxiliary one or one at each scale. A dense predictor is told by logits as large as the
    image; their channels are the classes.
    """
    try:
        logits = take_logits(anatomy.observation.output(""))
    except StructureError:
        return ordered[:-1]
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        return ordered[:-1]
    classes = logits.shape[1]
    if logits.ndim == 4 and logits.shape[2:] == anatomy.image_size[1:]:
        heads: list[str] = []
        for path in (each for each in reversed(ordered) if anatomy.caller(each) == ""):
            value = anatomy.observation.output(path)
            if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] != classes:
                break
            heads.append(path)
        kept = [path for path in ordered[:-1] if not any(inside(path, head) for head in heads)]
        return kept or ordered[:-1]
    weighted = [path for path in ordered if next(anatomy.module(path).parameters(False), None) is not None]
    last = weighted[-1] if weighted else ""
    value = anatomy.observation.output(last)
    if (
        last
        and is_classifier(anatomy.module(last))
        and isinstance(value, Tensor)
        and classes in value.shape[1:]
    ):
        return ordered[: ordered.index(last)]
    return ordered[:-1]


def _stage(anatomy: Anatomy, index: int) -> Site:
    found = stages(anatomy)
    if not -len(found) <= index < len(found):
        raise SiteError(
            f"There is no stage {index} in {anatomy.name}, which has {len(found)}.\n"
            f"They are numbered 0 to {len(found) - 1} (or from -1 backwards): "
            f"{', '.join(repr(site.name) for site in found)}."
        )
    return dataclasses.replace(found[index], numbered=True)


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
