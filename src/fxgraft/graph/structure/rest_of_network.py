"""The rest of a network after a site, as a separate function."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgraft._torch import FakeTensor, NormBase, pytree
from fxgraft.errors import SiteError, StructureError, TraceError
from fxgraft.graph.dataflow.graph_utils import (
    cut,
    downstream_of,
    modules_in,
    placeholders,
    scope_of,
    upstream_of,
)
from fxgraft.graph.dataflow.reach import Reach
from fxgraft.graph.names import ancestors, inside
from fxgraft.graph.structure.heads.outputs import check_logits, logits_node, take_logits
from fxgraft.graph.structure.heads.pooling import head_in, is_classifier, logits_before
from fxgraft.graph.structure.heads.probabilities import squashed_end, squashing
from fxgraft.graph.structure.site import (
    Edits,
    Site,
    counterpart,
    edits_of,
    locate,
    module_site,
    own_nodes,
    training_name,
)
from fxgraft.graph.tracing.branches import held
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.editing import After, is_unit
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import bare_calls, tensors
from fxgraft.graph.tracing.preserve import preserved_attributes, preserved_modes, preserved_random_state
from fxgraft.graph.tracing.regions import region_of
from fxgraft.graph.tracing.settings import (
    acted_on,
    hooked_output,
    input_hooked,
    output_hooked,
    settings_changed,
)
from fxgraft.graph.tracing.trace import Traced, readdressed
from fxgraft.graph.tracing.tracer import HOOKED, is_primitive
from fxgraft.graph.tracing.values import tensor_inputs


@dataclass(frozen=True)
class LinearTail:
    """The rest of a network that is global average pooling, then one linear layer.

    Attributes:
        linear: qualified name of the `torch.nn.Linear`.
        modules: qualified names of all modules behind the site that take part in it.
        around: those of the modules that contain the site, or give its value: their hooks act after it.
        window: the sizes of the only map that the pooling averages whole; None where it does maps of any size.
    """

    linear: str
    modules: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    window: tuple[int, ...] | None = None


def linear_tail(
    trace: ModelTrace,
    site: Site,
    opened: tuple[str, ...],
    children: tuple[str, ...],
    output: str | int | None,
) -> LinearTail | None:
    """Recognise global average pooling, flattening, dropout and one linear layer, and nothing else."""
    closed = tuple(name for name in children if not is_primitive(trace.module(name)))
    if len(children) > 8 or site.layout not in ("NCHW", "NHWC", "NCDHW", "NDHWC"):
        return None
    try:
        traced = trace.graph("", training=False, opened=opened, deep=closed)
        start = locate(trace, site, traced)
        logits = logits_before(logits_node(trace.values("", traced), output, ""), trace.values("", traced))
        head = head_in(trace, "", traced, logits)
    except (TraceError, StructureError, SiteError):
        return None
    if any(region_of(node) for node in traced.graph.nodes if node >= start):
        return None  # the closed form doesn't cover a change of precision or the end of gradients
    between = head.maps
    passed = [head.pool, *head.between]
    while between is not start and len(between.users) == 1 and passes(trace.model, between):
        passed.append(between)
        between = between.all_input_nodes[0]
    layer = head.classifier
    plain = layer is not None and type(trace.module(str(layer.target))) is nn.Linear
    while logits is not layer and passes(trace.model, logits):
        passed.append(logits)
        logits = logits.all_input_nodes[0]
    if between is not start or len(start.users) != 1 or not (plain and head.neutral) or layer is not logits:
        return None
    around = ("", *ancestors(site.path or site.owner), site.path or site.owner)
    passed.append(logits)
    inner = tuple(dict.fromkeys(path for path in modules_in(passed) if path not in around))
    return LinearTail(str(logits.target), inner, tuple(dict.fromkeys(around)), head.pooling.window)


def passes(model: nn.Module, node: fx.Node) -> bool:
    """Say whether a node returns its input unchanged in evaluation."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), (nn.Identity, nn.Dropout, nn.Dropout2d))
    return getattr(node.target, "__name__", "") == "dropout"


def tail_layer(model: nn.Module, tail: LinearTail, sizes: Sequence[int] | None = None) -> nn.Linear | None:
    """Return the linear layer of a tail as the model has it now.

    None where anything but pooling and a plain layer may act: another class of layer, or hooks or an own forward on one
    of the modules. Most hooks only read, but that cannot be known.

    Args:
        model: the model.
        tail: its tail.
        sizes: those of the map that is pooled in this pass. Where the window doesn't average such a map whole, there is
            no such layer either.
    """
    if sizes is not None and tail.window is not None and tuple(sizes) != tail.window:
        return None
    layer = model.get_submodule(tail.linear)
    if type(layer) is not nn.Linear or not is_classifier(layer):
        return None
    if any(acted_on(model.get_submodule(name)) for name in tail.modules):
        return None
    return None if any(output_hooked(model.get_submodule(name)) for name in tail.around) else layer


@dataclass
class Rest:
    """The rest of a network after a site, as a function that can be evaluated on its own.

    Attributes:
        site: the site it starts from.
        function: ``f(model, z, *captured, *inputs) -> logits``, evaluation behaviour.
        captured: values from before the site that it needs, recorded as the pass goes by; their names are the same on
            every model of this structure.
        inputs: which of the model's own positional inputs it needs (for their shape, mostly).
        opened: qualified names of the modules whose forwards it goes through, the model's own ('') among them.
        children: qualified names of the modules it calls.
        tail: the pooling and the linear layer, when the rest is just these; else None.
        settings: plain attributes of the modules it was traced through, by qualified name.
        identities: the modules that it was traced with, by which a replaced one is noticed.
        hooked: whether hooks act on the modules that it was traced through, by qualified name.
        forwards: forwards that were set on these modules' instances, by qualified name.
        whole: whether the function returns all that the model does, since hooks on the model change it.
        output: which entry of a structured output holds the logits.
    """

    site: Site
    function: Callable[..., Tensor]
    captured: tuple[Site, ...]
    inputs: tuple[int, ...]
    opened: tuple[str, ...]
    children: tuple[str, ...]
    tail: LinearTail | None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    identities: dict[str, nn.Module] = field(default_factory=dict)
    hooked: dict[str, bool] = field(default_factory=dict)
    forwards: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    output: str | int | None = None

    def runs(self, path: str) -> bool:
        """Say whether it runs the forward of a module, by going through it or within a module that it calls."""
        return path in self.opened or any(inside(path, each) for each in self.children)

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
        return settings_changed(model, self.settings, {})

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
            inputs: the inputs of ``inputs``, in the same order.
            calls: arguments that modules with hooks were called with, by qualified name; hooks look at those.
        """
        others = [_detached(tensor) for tensor in (*captured, *inputs)]
        with self.evaluation_mode(model):
            if self.site.on_module:  # the module's hooks act after the grafts in its call
                args, kwargs = pytree.tree_map(_detached, calls.get(self.site.path, ((), {})))
                z = hooked_output(model.get_submodule(self.site.path), args, kwargs, z)
            out: Any = self.function(model, z, *others)
            if self.whole:
                out = hooked_output(model, *calls.get("", ((), {})), out)
            return take_logits(out, (self.output,)) if self.whole else out

    def averages(self, model: nn.Module) -> bool:
        """Say whether the rest has norms whose statistics training passes move, and that it uses when evaluated."""
        modules = (module for name in self.children for module in model.get_submodule(name).modules())
        return any(
            isinstance(module, NormBase) and module.training and module.track_running_stats
            for module in modules
        )

    @contextlib.contextmanager
    def evaluation_mode(self, model: nn.Module) -> Iterator[None]:
        """Put the modules of the rest into evaluation mode for the block: no BatchNorm update, no dropout."""
        switched = [
            module
            for name in self.children
            for module in model.get_submodule(name).modules()
            if module.training
        ]
        for module in switched:  # flag by flag: train() on the way out would thaw what the user froze
            module.training = False
        try:
            yield
        finally:
            for module in switched:
                module.training = True


_CHEAP_FUNCTIONS = {getattr, operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv}


_CHEAP_METHODS = {"size", "dim"}


def _cheap(node: fx.Node) -> bool:
    """Say whether a value is arithmetic on the sizes of the model's inputs, or made from parameters alone."""
    if node.op in ("placeholder", "get_attr"):
        return True
    light = (node.op == "call_function" and node.target in _CHEAP_FUNCTIONS) or (
        node.op == "call_method" and node.target in _CHEAP_METHODS
    )
    return light and all(_cheap(source) for source in node.all_input_nodes)


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
        trace: the trace of the model.
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
    logits = logits_node(trace.values("", traced), output, model)
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
        trace: the trace of the model, bare or with its grafts installed; those that act in evaluation are kept.
        site: where the rest starts.
        output: which entry of a structured output holds the logits.
        acted: for a model with its grafts installed, whose records are in place, whether a unit on the
            site's value is part of it, and not of the rest.

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
        unit = next((candidate for candidate in units if acted(trace.module(str(candidate.target)))), None)
        if unit is None:
            break
        start = unit
    downstream = downstream_of(start)
    model = trace.name
    whole = output_hooked(trace.model)
    way = ({logits} | upstream_of(logits)) & downstream
    last = squashing(logits, trace.values("", traced)) if squashed_end(trace, output, False) else None
    if last is not None and (whole or last not in downstream):
        raise StructureError(
            f"{model} returns probabilities, and {'hooks act on them' if whole else f'{site.name!r} holds them'}.\n"
            "What comes after a site is followed to the logits, which stand before the last sigmoid or softmax.\n"
            "Return the logits, and take their sigmoid or softmax behind the model."
        )
    without = {} if last is None else {last: tensor_inputs(last, trace.values("", traced))[0]}
    graph, needed, inputs = _cut(traced, start, _all_of_it(traced) if whole else logits, way, without)
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
        ("", *opened),
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
    """Return the forward that was set on a module's instance; its class's forward bound to it doesn't count."""
    module = model.get_submodule(path)
    own: Any = module.__dict__.get("forward")
    bound = getattr(own, "__self__", None) is module
    return None if bound and own.__func__ is type(module).forward else own


def _all_of_it(traced: Traced) -> fx.Node:
    """Return a single node that stands for everything the traced model returns."""
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
    within: set[fx.Node],
    without: Mapping[fx.Node, fx.Node],
) -> tuple[fx.Graph, list[fx.Node], tuple[int, ...]]:
    """Copy the nodes from ``start`` to ``end`` into a graph of their own; return what else it needs as well.

    Nodes of ``without`` are left out, and the inputs named there take their places.
    """
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    holds = {node for node in downstream_of(start) if node.target is held}
    behind = {node for hold in holds for node in upstream_of(hold)} & downstream_of(start)
    within, frontier = {*within, *holds, *behind, end}, set()
    waiting = list(within)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is start or source in within or source in frontier:
                continue
            # A value that isn't computed yet at the site is computed from earlier ones, and so is one that costs
            # nothing. Pre-hooks of modules around the site run once more, since only the module itself could record
            # their result.
            free = _cheap(source) or HOOKED in source.meta or order[source] > order[start]
            if source.op != "placeholder" and free:
                within.add(source)
                waiting.append(source)
            else:
                frontier.add(source)
    inputs = placeholders(traced.graph)
    used = [node for node in inputs if node in frontier]
    boundary = sorted(frontier - set(used), key=order.__getitem__)
    graph = cut([start, *boundary, *used], end, sorted(holds), without)
    # A value that units act on keeps the name of its own node.
    return graph, [_bare(node) for node in boundary], tuple(inputs.index(node) for node in used)


def _bare(node: fx.Node) -> fx.Node:
    while is_unit(node):
        node = next(source for source in node.all_input_nodes if source.op != "get_attr")
    return node


def _captured(trace: ModelTrace, node: fx.Node, name: str) -> Site:
    """Return the site, under a name, where the value of a node of the whole model's trace is to be recorded."""
    path = str(node.target)
    once = node.op == "call_module" and len(trace.observation.calls.get(path, [])) == 1
    # A module's hooks act behind what is placed on the module itself.
    if once and not output_hooked(trace.module(path)):
        site = module_site(trace, path)
        return replace(site, name=name, edits=edits_of(trace, site))
    scope = scope_of(node)
    local = own_nodes(trace.graph(scope, training=False).graph, None)
    inner = counterpart(node, own_nodes(node.graph, scope), local)
    if inner is None:
        raise SiteError(
            f"{node.name!r} in {scope or 'the model'!r} is needed after the site, and cannot be found in that module's "
            "own trace.\nIts forward takes other branches there.\nChoose a site that is the output of a whole module."
        )
    own = inner.name
    edits = Edits(scope, After(own, last=True), After(training_name(trace, scope, own), last=True))
    return Site(name, scope, own, value=trace.values(scope).get(own), edits=edits)


def _detached(value: Any) -> Any:
    """Copy tensors, which a look ahead must neither write to nor differentiate through."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def reads_places(trace: ModelTrace, rest: Rest, prefix: int, compute: bool = False) -> bool:
    """Say whether the logits read anything of a site's value but its class and register tokens.

    Every operation on the way is looked at, on fake tensors: one that may mix tokens is taken to read all of them.

    Args:
        trace: the trace of the bare model.
        rest: the rest of the network after the site.
        prefix: how many class and register tokens come first.
        compute: whether to look for a gradient as well, where the weights are there.
    """
    value = rest.site.value
    others = [capture.value for capture in rest.captured]
    others += [trace.observation.calls[""][0].args[index] for index in rest.inputs]
    if prefix:
        reach = Reach(prefix)
        observation = trace.observation
        z = observation.run(torch.empty_like, value)
        reach.start_at(z)
        with _left_alone(trace), rest.evaluation_mode(trace.model):
            out = observation.follow(reach, rest.function, trace.model, z, *others)
        if not any(reach.reads(tensor) for tensor in tensors(out)):
            return False
    gradient = _gradient(trace, rest, value, others) if compute and rest.tail is None else None
    # A gradient of zero everywhere is no proof: a classifier with weights of zero passes none.
    return gradient is None or not gradient.any() or bool(gradient[:, prefix:].any())


@contextlib.contextmanager
def _left_alone(trace: ModelTrace) -> Iterator[None]:
    """Run layers without their hooks, and put back what a forward writes on its modules."""
    modules = list(trace.model.modules())
    with (
        preserved_modes(trace.model),
        preserved_attributes(modules),
        preserved_random_state(),
        bare_calls(),
    ):
        yield


def _gradient(trace: ModelTrace, rest: Rest, value: Tensor, others: list[Any]) -> Tensor | None:
    """Differentiate random logits' sum by random values at the site; None where that cannot be computed."""
    model = trace.model
    modules = {module for name in rest.children for module in model.get_submodule(name).modules()}
    held = [tensor for module in modules for tensor in (*module.parameters(False), *module.buffers(False))]
    if value.device.type == "meta" or any(each.is_meta or isinstance(each, FakeTensor) for each in held):
        return None
    generator = torch.Generator().manual_seed(0)

    def drawn(fake: Any) -> Any:
        if not isinstance(fake, Tensor):
            return fake
        real = (
            torch.randn(fake.shape, generator=generator)
            if fake.is_floating_point()
            else torch.zeros(fake.shape)
        )
        return real.to(fake.device, fake.dtype)

    kept = [(tensor, tensor._version, tensor.clone()) for tensor in held if not tensor.requires_grad]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _left_alone(trace),
            rest.evaluation_mode(model),
        ):
            z = drawn(value).requires_grad_()
            out = rest.function(model, z.clone(), *pytree.tree_map(drawn, others))
            logits = [tensor for tensor in tensors(out) if tensor.requires_grad]
            if not logits:
                return torch.zeros_like(z)
            score = torch.stack([(scores * drawn(scores)).sum() for scores in logits]).sum()
            return torch.autograd.grad(score, z)[0]
    except Exception:  # a forward that rejects random values: the answer of its operations stands
        return None
    finally:
        for tensor, version, content in kept:
            if tensor._version != version:
                tensor.detach().copy_(content)
