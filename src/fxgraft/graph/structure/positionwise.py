"""A head applied at every position of its map instead of to the average: a score per class and position.

Pooling and a linear classifier may change places: the average of the scores at all positions is the classifier's
answer for the average. Layers between the two are run on the positions as if each were a pooled vector.
What must not differ from position to position does not: dropout draws one mask per image, and BatchNorm
keeps the statistics of the pooled vectors, so both commute with the average exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgraft.errors import BypassError, SiteError
from fxgraft.graph.structure.head import Head
from fxgraft.graph.structure.linear import made_by_hooks
from fxgraft.graph.structure.pooling import HeadTrace, is_classifier, opened_head
from fxgraft.graph.structure.tokens import token_grid
from fxgraft.graph.tracing.anatomy import Anatomy
from fxgraft.graph.tracing.compile import compile_graph
from fxgraft.graph.tracing.names import join
from fxgraft.graph.tracing.preserve import preserved_modes
from fxgraft.graph.tracing.settings import acted_on, plain_settings, settings_changed
from fxgraft.graph.tracing.trace import Traced
from fxgraft.graph.tracing.walks import cut, modules_in, placeholders

Positions = Callable[..., Tensor]
"""``f(module, rows, positions) -> rows``: layers on (B·N, ...) rows, the N positions of an image together."""


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d)


class PositionwiseHead:
    """Computes class scores at every position of the value that a head pools, with the layers a model has then.

    Args:
        path: the module in whose trace the head was found.
        head: the head there.
        traced: the trace.
        grid: (H, W) of a map of tokens.
        model: the model, to notice later that layers of the head were replaced.
    """

    def __init__(
        self, path: str, head: HeadTrace, traced: Traced, grid: tuple[int, int] | None, model: nn.Module
    ) -> None:
        self.path = path
        self.head = head
        self.grid = grid
        self.classifiers = tuple(str(node.target) for node in head.classifiers)
        owner = model.get_submodule(path)
        self.between = None if _only_shapes(head, owner) else _per_position(head, traced, owner)
        passed = {*modules_in([head.pool, *head.between, *head.classifiers, head.end])}
        self.bypassed = tuple(sorted(passed))
        names = sorted({*modules_in([head.pool, *head.between])} - {*self.classifiers})
        self.identities = {name: owner.get_submodule(name) for name in names}
        self.settings = {name: plain_settings(owner.get_submodule(name)) for name in names}

    def stale(self, model: nn.Module) -> bool:
        """Say whether layers of the head, other than its classifier, were replaced or set otherwise."""
        try:
            owner = model.get_submodule(self.path)
            layers = [owner.get_submodule(name) for name in self.classifiers]
            if not all(is_classifier(each) and not made_by_hooks(each) for each in layers):
                return True
            if any(owner.get_submodule(name) is not module for name, module in self.identities.items()):
                return True
        except AttributeError:
            return True
        return any(settings_changed(self.identities[name], kept) for name, kept in self.settings.items())

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return class scores (B, K, H, W) for the value ``x`` that the head pools.

        Args:
            model: the model, whose layers are looked up by name.
            x: in the layout of the head, (B, C, H, W), (B, H, W, C) or tokens (B, N, C).
        """
        space, positions = self._space(x)
        owner = model.get_submodule(self.path)
        self._check_bypassed(model, owner)
        pooling = self.head.pooling
        if not self.classifiers:
            return x if pooling.channel == 1 else x.movedim(pooling.channel, 1)
        if self.between is None and pooling.channel == 1 and x.ndim == 4:
            weight, bias = self._matrix(owner)
            # Faster than a matrix product, which would have to bring channels to the end first.
            return F.conv2d(x, weight[:, :, None, None] if weight.ndim == 2 else weight, bias)
        rows = x.movedim(pooling.channel, -1).flatten(0, -2)
        if self.between is not None:
            if pooling.keeps:
                rows = rows.view(
                    -1, *(rows.shape[1] if d == pooling.channel else 1 for d in range(1, x.ndim))
                )
            rows = self.between(owner, rows, positions).flatten(1)
        if len(self.classifiers) == 1:
            weight, bias = self._matrix(owner)
            rows = F.linear(rows, weight.flatten(1), bias)
        return rows.view(x.shape[0], *space, -1).movedim(-1, 1)

    def _check_bypassed(self, model: nn.Module, owner: nn.Module) -> None:
        """Raise where something acts on the calls of the layers, which run here without being called."""
        acting = [name for name in self.bypassed if acted_on(owner.get_submodule(name))]
        if acting:
            names = ", ".join(repr(join(self.path, name)) for name in acting)
            raise BypassError(
                f"{names} of this {model._get_name()} has hooks or a forward of its own, and the head runs its layers "
                "at every position instead of calling them.\n"
                "What these change would be missing here and act everywhere else.\n"
                "Remove the hooks for the training (handle.remove()), or write what they do as a layer of the model."
            )

    def _matrix(self, owner: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the one classifier, as it is now."""
        layer: Any = owner.get_submodule(self.classifiers[0])
        return gathered(layer.weight), None if layer.bias is None else gathered(layer.bias)

    def _space(self, x: Tensor) -> tuple[tuple[int, int], int]:
        sizes = [size for d, size in enumerate(x.shape) if d not in (0, self.head.pooling.channel)]
        if len(sizes) == 2:
            return (sizes[0], sizes[1]), sizes[0] * sizes[1]
        known = self.grid
        if known is not None and known[0] * known[1] == sizes[0]:
            return known, sizes[0]
        side = round(sizes[0] ** 0.5)
        if side * side != sizes[0]:
            raise SiteError(
                f"{sizes[0]} tokens reach the head, and they are no grid"
                f"{'' if known is None else f' (the model was looked at with {known[0]}×{known[1]})'}.\n"
                "A score per position needs the place of every token; patch dropout loses it.\n"
                "Switch patch dropout off, or pass input_size= of the images you train on."
            )
        return (side, side), sizes[0]


def gathered(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, whole where its layer is a shard of its own (FSDP2).

    A layer that is not called is not gathered by FSDP2. The gradients of its shards are averaged, as FSDP2 does.
    """
    gather = getattr(parameter, "full_tensor", None)
    if gather is None:
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor) or not parameter.requires_grad:
        return gather()
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def _only_shapes(head: HeadTrace, owner: nn.Module) -> bool:
    """Say whether nothing between pooling and classifier computes anything."""
    if not head.neutral:
        return False
    calls = [owner.get_submodule(str(node.target)) for node in head.between if node.op == "call_module"]
    dropouts = any(getattr(node.target, "__name__", "").startswith("dropout") for node in head.between)
    return not dropouts and all(isinstance(module, (nn.Identity, nn.Flatten)) for module in calls)


def _per_position(head: HeadTrace, traced: Traced, owner: nn.Module) -> Positions:
    """Compile what follows the pooling into a function of rows: up to the classifier, or to the logits of several."""
    end = head.end if head.classifier is None else next(iter(head.classifier.all_input_nodes))
    graph = cut([head.pool], end)
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        positions = graph.placeholder("positions")
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_module":
            module = owner.get_submodule(str(node.target))
            shared = _shared(module)
            if shared is None:
                continue
            with graph.inserting_before(node):
                layer = graph.get_attr(str(node.target))
                call = graph.call_function(shared, (layer, node.args[0], positions))
        elif node.target in _DROPOUTS:
            arguments = {key: value for key, value in node.kwargs.items() if key != "input"}
            rows = node.args[0] if node.args else node.kwargs["input"]
            with graph.inserting_before(node):
                call = graph.call_function(
                    _shared_function, (name, rows, positions, *node.args[1:]), arguments
                )
        else:
            continue
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    label = f"layers behind the pooling of {type(owner).__name__}"
    return compile_graph(graph, traced.runnable().constants, label)


def _shared(module: nn.Module) -> Callable[..., Tensor] | None:
    """Choose how a layer is run on rows where running it row by row would not commute with the average."""
    if type(module) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d):
        return _shared_dropout
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return _pooled_norm
    return None


def _grouped(rows: Tensor, positions: int) -> Tensor:
    """View rows (B·N, ...) as (B, N, ...)."""
    return rows.unflatten(0, (-1, positions))


def _shared_dropout(layer: nn.Module, rows: Tensor, positions: int) -> Tensor:
    """Drop the same features at all positions of an image: the mask that the pooled vector would get."""
    if not layer.training or not layer.p:
        return rows
    grouped = _grouped(rows, positions)
    mask = layer(torch.ones_like(grouped[:, 0], requires_grad=False))
    return (grouped * mask.unsqueeze(1)).flatten(0, 1)


def _shared_function(name: str, rows: Tensor, positions: int, *args: Any, **kwargs: Any) -> Tensor:
    """Do the same for dropout written as a function."""
    training = kwargs.get("training", args[1] if len(args) > 1 else True)
    share = kwargs.get("p", args[0] if args else 0.5)
    if not training or not share:
        return rows
    grouped = _grouped(rows, positions)
    mask = getattr(F, name)(torch.ones_like(grouped[:, 0], requires_grad=False), *args, **kwargs)
    return (grouped * mask.unsqueeze(1)).flatten(0, 1)


def _pooled_norm(layer: nn.Module, rows: Tensor, positions: int) -> Tensor:
    """Normalise positions with the statistics of the pooled vectors, which the layer sees and remembers."""
    grouped = _grouped(rows, positions)
    pooled = grouped.mean(1)
    middle = layer(pooled)
    if layer.training or layer.running_var is None:
        dims = [d for d in range(pooled.ndim) if d != 1]
        variance = pooled.float().var(dims, unbiased=False)
    else:
        variance: Tensor = layer.running_var  # type: ignore[no-redef]
    scale = torch.rsqrt(variance + layer.eps)  # type: ignore[operator]
    if layer.weight is not None:
        scale = scale * layer.weight  # type: ignore[operator]
    scale = scale.to(middle.dtype).view(-1, *[1] * (pooled.ndim - 2))
    return (middle.unsqueeze(1) + (grouped - pooled.unsqueeze(1)) * scale).flatten(0, 1)


def position_scores(
    model: nn.Module, x: Tensor, head: str | None = None, output: str | int | None = None
) -> Tensor:
    """Compute a model's class scores by position, as it is in evaluation; their average is the logits.

    With a layer that does not commute with the average between pooling and classifier (an activation, a
    norm over channels) the average is close to the logits only.

    Args:
        model: bare or patched; grafts that act in evaluation act here.
        x: images (B, C, H, W). Gradients pass.
        head: qualified name of the classifier, where the model has several.
        output: which entry of a structured output holds the logits.

    Returns:
        (B, K, H, W), at the resolution of the last feature map.

    Raises:
        StructureError: the model has no average-pooled linear head.
        BypassError: hooks or a forward of its own act on a layer of the head, which is not called here.
    """
    anatomy = Anatomy(model, tuple(x.shape[1:]))
    traced, found, _ = opened_head(anatomy, head, output)
    grid = token_grid(anatomy, traced, found.maps, found.pooling.channel)
    maps = PositionwiseHead("", found, traced, grid, model)
    graph = cut(placeholders(traced.graph), found.maps)
    features = compile_graph(
        graph, traced.runnable(elsewhere=True).constants, f"feature map of {anatomy.name}"
    )
    with preserved_modes(model):
        for each in model.modules():
            each.training = False
        return maps(model, features(model, x))


def positionwise(head: Head, model: nn.Module) -> PositionwiseHead:
    """Make the positionwise form of a head as the model trains."""
    return PositionwiseHead(head.owner, head.training, head.traced, head.grid, model)
