"""The rest of a network after a site, as a function of its own."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

from fxgraft._torch import NormBase, pytree
from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.structure.outputs import check_logits, logits_node, take_logits
from fxgraft.graph.structure.probabilities import squashed_end, squashing
from fxgraft.graph.structure.site import (
    Edits,
    Site,
    alike,
    edits_of,
    locate,
    module_site,
    own_nodes,
    training_name,
)
from fxgraft.graph.structure.tail import LinearTail, linear_tail, tail_layer
from fxgraft.graph.tracing.branches import held
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.editing import After, is_unit
from fxgraft.graph.tracing.graph_utils import cut, downstream_of, placeholders, scope_of, upstream_of
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.names import ancestors
from fxgraft.graph.tracing.settings import hooked_output, input_hooked, output_hooked, settings_changed
from fxgraft.graph.tracing.trace import HOOKED, Traced, readdressed
from fxgraft.graph.tracing.values import tensor_inputs


@dataclass
class Rest:
    """The rest of a network after a site, as a function that can be evaluated on its own.

    Attributes:
        site: the site it starts from.
        function: ``f(model, z, *captured, *inputs) -> logits``, evaluation behaviour.
        captured: values from before the site that it needs, recorded as the pass goes by; their names are the same on
            every model of this structure.
        inputs: which of the model's own positional inputs it needs (for their shape, mostly).
        children: qualified names of the modules it calls.
        tail: set when the rest is pooling and one linear layer.
        settings: plain attributes of the modules it was traced through, by qualified name.
        identities: the modules it was traced with, to notice a replaced one.
        hooked: whether hooks act on the modules that it was traced through, by qualified name.
        forwards: forwards of their own that these modules have, by qualified name.
        whole: whether the function returns all that the model does, since hooks on the model change it.
        output: which entry of a structured output holds the logits.
    """

    site: Site
    function: Callable[..., Tensor]
    captured: tuple[Site, ...]
    inputs: tuple[int, ...]
    children: tuple[str, ...]
    tail: LinearTail | None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    identities: dict[str, nn.Module] = field(default_factory=dict)
    hooked: dict[str, bool] = field(default_factory=dict)
    forwards: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    output: str | int | None = None

    def stale(self, model: nn.Module) -> bool:
        """Say whether the model changed since: a module replaced, or an attribute the trace may have read."""
        try:
            if any(model.get_submodule(name) is not module for name, module in self.identities.items()):
                return True
            if any(_is_hooked(model.get_submodule(name)) is not now for name, now in self.hooked.items()):
                return True
            if any(_own_forward(model, name) is not now for name, now in self.forwards.items()):
                return True
        except AttributeError:
            return True
        return any(settings_changed(model.get_submodule(n), kept) for n, kept in self.settings.items())

    def evaluate(
        self,
        model: nn.Module,
        z: Tensor,
        captured: Sequence[Any],
        inputs: Sequence[Any],
        calls: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]] = MappingProxyType({}),
    ) -> Tensor:
        """Return the logits for a value ``z`` at the site, without a BatchNorm update and without dropout.

        Args:
            model: the model.
            z: value at the site. Nothing is written to it as long as it is not used elsewhere; pass a clone.
            captured: the values of ``captured``, in its order. They are copied and cut off the graph.
            inputs: the inputs of ``inputs``, likewise.
            calls: arguments that modules with hooks were called with, by qualified name; hooks look at those.
        """
        others = [_detached(each) for each in (*captured, *inputs)]
        with self.evaluation_mode(model):
            if self.site.on_module:  # grafts act inside of its call, its hooks behind them
                args, kwargs = pytree.tree_map(_detached, calls.get(self.site.path, ((), {})))
                z = hooked_output(model.get_submodule(self.site.path), args, kwargs, z)
            out: Any = self.function(model, z, *others)
            if self.whole:
                out = hooked_output(model, *calls.get("", ((), {})), out)
            return take_logits(out, (self.output,)) if self.whole else out

    def averages(self, model: nn.Module) -> bool:
        """Say whether training passes move statistics that the rest normalises with when it is evaluated."""
        modules = (each for name in self.children for each in model.get_submodule(name).modules())
        return any(
            isinstance(each, NormBase) and each.training and each.track_running_stats for each in modules
        )

    @contextlib.contextmanager
    def evaluation_mode(self, model: nn.Module) -> Iterator[None]:
        """Put the modules of the rest into evaluation mode for the block: no BatchNorm update, no dropout."""
        switched = [
            each for name in self.children for each in model.get_submodule(name).modules() if each.training
        ]
        for each in switched:
            each.training = False
        try:
            yield
        finally:
            for each in switched:
                each.training = True


_CHEAP_FUNCTIONS = {getattr, operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv}


_CHEAP_METHODS = {"size", "dim"}


def _cheap(node: fx.Node) -> bool:
    """Say whether a value is arithmetic on the sizes of the model's inputs, or made from parameters alone."""
    if node.op in ("placeholder", "get_attr"):
        return True
    light = (node.op == "call_function" and node.target in _CHEAP_FUNCTIONS) or (
        node.op == "call_method" and node.target in _CHEAP_METHODS
    )
    return light and all(_cheap(each) for each in node.all_input_nodes)


def _followed(trace: ModelTrace) -> bool:
    """Say whether the model's own forward can be traced, with all of its children closed."""
    try:
        trace.graph("", training=False)
    except TraceError:
        return False
    return True


def span_to_output(
    trace: ModelTrace, site: Site, output: str | int | None = None, hooks: bool = False
) -> tuple[Traced, fx.Node, fx.Node, tuple[str, ...]]:
    """Find a site and the logits in one trace of the whole model.

    Args:
        trace: of the model.
        site: the site.
        output: which entry of a structured output holds the logits.
        hooks: whether the trace has the hooks of the modules that are opened in it.

    Returns:
        The trace, the nodes of the two values, and the modules that were opened for it.

    Raises:
        SiteError: the output does not depend on the site.
        StructureError: the output has no such entry.
        TraceError: a module around the site cannot be traced.
    """
    around = ancestors(site.path) if site.path else (*ancestors(site.owner), site.owner)
    squashed = squashed_end(trace, output, training=False)
    around = (*around, *(squashed.opened if squashed is not None else ()))
    opened = tuple(dict.fromkeys(name for name in around if name))
    check_logits(trace.observation.output(""), output, trace.name)
    try:
        hooked = hooks and any(_is_hooked(trace.module(name)) for name in opened)
        traced = trace.graph("", training=False, opened=opened, hooks=hooked)
    except TraceError as error:
        if opened and _followed(trace):
            raise
        raise readdressed(
            error,
            f"What comes after {site.name!r} is followed up to the output through that line, so another site does not "
            "help.\nMove the line into a module of its own, which stays closed, or into a function "
            "registered with timm.layers.register_notrace_function.",
        ) from error
    model = trace.name
    start = locate(trace, site, traced)
    logits = logits_node(traced.graph, output, model)
    if logits is not start and logits not in downstream_of(start):
        raise SiteError(
            f"The output of {model} does not depend on {site.name!r}.\n"
            "Nothing that happens there can change a prediction.\n"
            "Choose a layer on the way from the image to the logits; fxgraft.sites(model) lists them in order."
        )
    return traced, start, logits, opened


def rest_of_network(
    trace: ModelTrace,
    site: Site,
    output: str | int | None = None,
    acted: Callable[[nn.Module], bool] | None = None,
) -> Rest:
    """Split off the rest of a model after a site.

    Args:
        trace: of the model, bare or with its grafts installed; those that act in evaluation are kept.
        site: where the rest starts.
        output: which entry of a structured output holds the logits.
        acted: of a model with its grafts installed, whose records are in place: whether a unit on the site's value is
            part of it, and not of the rest.

    Raises:
        SiteError: the output does not depend on the site.
        StructureError: the output has no such entry.
        TraceError: a module around the site cannot be traced.
    """
    traced, start, logits, opened = span_to_output(trace, site, output, hooks=True)
    constants = traced.runnable(elsewhere=True).constants
    name = start.name
    while acted is not None:
        units = (user for user in start.users if is_unit(user) and user.op == "call_module")
        unit = next((each for each in units if acted(trace.module(str(each.target)))), None)
        if unit is None:
            break
        start = unit
    downstream = downstream_of(start)
    model = trace.name
    whole = output_hooked(trace.model)
    inside = ({logits} | upstream_of(logits)) & downstream
    last = squashing(logits, trace.values("", traced)) if squashed_end(trace, output, False) else None
    if last is not None and (whole or last not in downstream):
        raise StructureError(
            f"{model} returns probabilities, and {'hooks act on them' if whole else f'{site.name!r} holds them'}.\n"
            "What comes after a site is followed to the logits, which stand before the last sigmoid or softmax.\n"
            "Return the logits, and take their sigmoid or softmax behind the model."
        )
    without = {} if last is None else {last: tensor_inputs(last, trace.values("", traced))[0]}
    graph, needed, inputs = _cut(traced, start, _all_of_it(traced) if whole else logits, inside, without)
    keys = {node: f"{name}:{node.name}" for node in needed}
    captured = tuple(
        Site(key, "") if acted is not None else _captured(trace, node, key) for node, key in keys.items()
    )
    children = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"))
    inner = {name: trace.original(name) for name in children}
    tail = linear_tail(trace, site, opened, children, output) if not captured and not inputs else None
    if tail is not None:
        inner |= {name: trace.original(name) for name in tail.modules}
        tail = None if tail_layer(trace.model, tail) is None else tail
    watched = ("", *opened, *(str(node.target) for node in needed if node.op == "call_module"))
    return Rest(
        site,
        compile_graph(graph, constants, f"rest of {model} after {site.name}"),
        captured,
        inputs,
        children,
        tail,
        settings=traced.settings,
        identities=inner,
        hooked={name: _is_hooked(trace.module(name)) for name in watched},
        forwards={name: _own_forward(trace.original(""), name) for name in (*opened, site.path) if name},
        whole=whole,
        output=output,
    )


def _is_hooked(module: nn.Module) -> bool:
    return input_hooked(module) or output_hooked(module)


def _own_forward(model: nn.Module, path: str) -> Any:
    """Return the forward that was set on a module; one that is just its class's, bound to it, counts for none."""
    module = model.get_submodule(path)
    own: Any = module.__dict__.get("forward")
    bound = getattr(own, "__self__", None) is module
    return None if bound and own.__func__ is type(module).forward else own


def _all_of_it(traced: Traced) -> fx.Node:
    """Make a node of all that a traced model returns."""
    out = next(node for node in traced.graph.nodes if node.op == "output")
    if isinstance(out.args[0], fx.Node):
        return out.args[0]
    known = next((node for node in traced.graph.nodes if node.target is _whole), None)
    if known is not None:
        return known
    with traced.graph.inserting_before(out):
        node = traced.graph.call_function(_whole, (out.args[0],))
    node.meta[HOOKED] = True
    return node


def _whole(out: Any) -> Any:
    return out


def _cut(
    traced: Traced,
    start: fx.Node,
    end: fx.Node,
    inside: set[fx.Node],
    without: Mapping[fx.Node, fx.Node],
) -> tuple[fx.Graph, list[fx.Node], tuple[int, ...]]:
    """Copy the nodes from ``start`` to ``end`` into a graph of their own; return what it needs besides as well.

    Nodes of ``without`` are left out, and the inputs named there take their places.
    """
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    holds = {node for node in downstream_of(start) if node.target is held}
    behind = {node for hold in holds for node in upstream_of(hold)} & downstream_of(start)
    inside, frontier = {*inside, *holds, *behind, end}, set()
    waiting = list(inside)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is start or source in inside or source in frontier:
                continue
            # What is not there yet when the site is reached is computed from what is; so is what costs nothing.
            # Pre-hooks of what is around the site run once more: nothing but their module can record what they give.
            free = _cheap(source) or HOOKED in source.meta or order[source] > order[start]
            if source.op != "placeholder" and free:
                inside.add(source)
                waiting.append(source)
            else:
                frontier.add(source)
    inputs = placeholders(traced.graph)
    used = [node for node in inputs if node in frontier]
    boundary = sorted(frontier - set(used), key=order.__getitem__)
    graph = cut([start, *boundary, *used], end, sorted(holds), without)
    # A value that other units act on has the name of its own node, with them and without.
    return graph, [_bare(node) for node in boundary], tuple(inputs.index(node) for node in used)


def _bare(node: fx.Node) -> fx.Node:
    while is_unit(node):
        node = next(each for each in node.all_input_nodes if each.op != "get_attr")
    return node


def _captured(trace: ModelTrace, node: fx.Node, name: str) -> Site:
    """Return the site of that name where the value of a node of the whole model's trace is recorded."""
    path = str(node.target)
    once = node.op == "call_module" and len(trace.observation.calls.get(path, [])) == 1
    # A module's hooks act behind what is placed on the module itself.
    if once and not output_hooked(trace.module(path)):
        site = module_site(trace, path)
        return replace(site, name=name, edits=edits_of(trace, site))
    scope = scope_of(node)
    index = own_nodes(node.graph, scope).index(node)
    local = own_nodes(trace.graph(scope, training=False).graph, None)
    if not alike(local, index, node):
        raise SiteError(
            f"{node.name!r} in {scope or 'the model'!r} is needed after the site, and cannot be found in that module's "
            "own trace.\nIts forward takes other branches there.\nChoose a site that is the output of a whole module."
        )
    own = local[index].name
    edits = Edits(scope, After(own, last=True), After(training_name(trace, scope, own), last=True))
    return Site(name, scope, own, value=trace.values(scope).get(own), edits=edits)


def _detached(value: Any) -> Any:
    """Copy what a look ahead must neither write to nor differentiate through."""
    return value.detach().clone() if isinstance(value, Tensor) else value
