"""Shapes without computing: one pass of fake tensors that records every module's calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fxgraft._torch import FakeTensor, FakeTensorMode, TorchDispatchMode, pytree
from fxgraft.errors import ConfigError
from fxgraft.graph.atomic import restoring, synchronized, within
from fxgraft.graph.dataflow.axes import CHANNEL, POSITION
from fxgraft.graph.dataflow.flow import Flow
from fxgraft.graph.tracing.preserve import (
    preserved_attributes,
    preserved_data,
    preserved_globals,
    preserved_modes,
    preserved_random_state,
    replaced_checkpoint,
)
from fxgraft.graph.tracing.regions import CALLERS, called_by


class DataSetError(Exception):
    """A forward set the ``data`` of parameters; the message names them."""


@dataclass
class Call:
    """One call of a module, as its caller made it.

    Attributes:
        args, kwargs: the arguments; tensors are fake (shape, dtype and device only).
        output: what the call returned, tensors fake.
        checkpointed: whether it ran under activation checkpointing.
        order: position among all calls of the pass, by the time they returned.
        made: for each tensor in the output, the number in the pass's `Flow` of the operation that made it;
            None where it is not made from the images.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    checkpointed: bool = False
    order: int = 0
    made: tuple[int | None, ...] = ()


@dataclass
class Observation:
    """All module calls of one evaluation pass of a model, by qualified name ('' is the model).

    Attributes:
        calls: the calls of every module, in the order they were made.
        mode: the mode that the tensors are of.
        flow: what the values of the pass are made of, and what their dimensions mean.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    flow: Flow = field(default_factory=Flow)

    def output(self, path: str) -> Any:
        """Return the output of a module's first call."""
        return self.calls[path][0].output

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function on fake tensors of this pass, without gradients."""
        out = self.follow(self.flow, function, *args, **kwargs)
        for tensor in tensors(out):
            self.flow.settled(tensor)
        return out

    def follow(self, flow: Flow, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function as `run` does, and let another flow record the operations.

        The caller's autocast is left out: it would keep the fakes of weights in its cache, for real passes to come.
        """
        return within(
            called_by(CALLERS[0]),
            within,
            torch.no_grad(),
            within,
            self.mode,
            within,
            _Converting(self.mode, flow),
            function,
            *args,
            **kwargs,
        )


class _Converting(TorchDispatchMode):
    """Replaces real tensors of the model by fakes in every operation, and records the operations.

    The fake mode converts real tensors too, but keeps no table of them: a pass is two to five times slower.
    """

    def __init__(self, mode: FakeTensorMode, flow: Flow) -> None:
        super().__init__()
        self.mode = mode
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # the most frequent call, and never of interest
            return func(*args, **kwargs)
        # Writing to a real tensor, as to a parameter, would change the model.
        if func._schema.is_mutable or any(issubclass(kind, FakeTensor) for kind in types):
            args, kwargs = pytree.tree_map_only(Tensor, self._fake, (args, kwargs))
        out = func(*args, **kwargs)
        self.flow.note(func, args, kwargs, out)
        return out

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)


CLIPS = ((16, 224, 224), (32, 224, 224), (8, 224, 224), (16, 112, 112), (64, 64, 64), (96, 96, 96))
"""Sizes that are tried in turn for a network of clips or volumes, until it runs: frames or depth, height, width."""


def first_convolution(model: nn.Module) -> nn.Module | None:
    """Return the first 2-D or 3-D convolution that a model has, by the order of its modules."""
    return next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))), None)


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """Find the (C, H, W) a backbone expects: its fixed image size, timm's configuration, or 3×224×224.

    One whose first convolution is a `torch.nn.Conv3d` takes clips or volumes (C, T, H, W): of its fixed size, or of
    the first of `CLIPS` that it runs on, tried at last as (T, C, H, W).

    The channels come from the first convolution or patch projection when there is one; timm's configuration
    lists none where the images are first transformed by hand. Where the two disagree, the network was built for
    images of other channels, or its first convolution sees something else than the image (space turned into
    depth): then a pass decides, or two, and grey images are tried last.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    channels, height, width = size or (3, 224, 224)
    configured = channels
    first = first_convolution(model)
    if isinstance(first, nn.Conv3d):
        fixed = getattr(model, "img_size", None)
        own = tuple(fixed) if isinstance(fixed, (tuple, list)) and len(fixed) == 3 else CLIPS[0]
        clips = dict.fromkeys((own, *CLIPS))
        channels = first.in_channels
        sizes = [(channels, *clip) for clip in clips]
        sizes += [(frames, channels, *sides) for frames, *sides in clips]
        return next((candidate for candidate in sizes if _runs(model, candidate)), sizes[0])
    for holder in (getattr(model, "patch_embed", None), model):
        fixed = getattr(holder, "img_size", None) or getattr(holder, "image_size", None)
        if isinstance(fixed, int):
            fixed = (fixed, fixed)
        if isinstance(fixed, (tuple, list)) and len(fixed) == 2 and all(isinstance(n, int) for n in fixed):
            height, width = fixed
            break
    stem = config.get("first_conv") if isinstance(config, dict) else getattr(config, "first_conv", None)
    if size and stem in ([], ()):
        return channels, height, width
    named = [model.get_submodule(stem)] if isinstance(stem, str) and _has(model, stem) else []
    for module in (*named, *model.modules()):
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels
            break
    if channels != configured:
        tried = (channels, configured, 1)
        channels = next((count for count in tried if _runs(model, (count, height, width))), channels)
    return channels, height, width


def _runs(model: nn.Module, input_size: tuple[int, ...]) -> bool:
    try:
        observe(model, input_size)
    except Exception:  # whatever a model raises on images that are not its own
        return False
    return True


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def fake_inputs(
    model: nn.Module, mode: FakeTensorMode, input_size: tuple[int, ...] | None, batch: int
) -> tuple[Tensor]:
    """Make the fake image batch for ``model`` on its own device and dtype."""
    if input_size is not None and (not input_size or any(n < 1 for n in input_size)):
        raise ConfigError(
            f"input_size must be positive, as (C, H, W), of clips and volumes (C, T, H, W); got {tuple(input_size)}.\n"
            "Pass for example input_size=(3, 224, 224), or leave it out for the model's own."
        )
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    size = input_size or default_input_size(model)
    return (within(mode, torch.empty, (batch, *size), dtype=reference.dtype, device=reference.device),)


@synchronized
def observe(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    batch: int = 2,
    training: bool = False,
) -> Observation:
    """Run ``model`` once on fake tensors and record every module's calls.

    No hook fires and no flag, buffer or random state changes; nothing is computed. Calls of modules are recorded
    where they go through ``torch.nn.Module.__call__``, which is replaced meanwhile, as torch.fx does while it
    traces. Other threads pass through the replacement: what they call runs as ever, with its hooks. The model
    that is looked at must not run in them, since its modes change.

    The channels of an input of four or more dimensions are the second, unless a first convolution takes other ones, as
    in networks of clips (B, T, C, H, W): then it runs again for each dimension, until the convolution agrees.

    Args:
        model: any module that takes one tensor.
        input_size: (C, H, W) of the input, of clips and volumes (C, T, H, W); by default what `default_input_size`
            finds.
        batch: batch size of the fake input.
        training: the mode that every module is in for this pass.

    Returns:
        The calls by qualified module name, in the order they were made.

    Raises:
        Exception: whatever the model raises on such an input.
    """
    seen, dimensions = _observed(model, input_size, batch, training, 1)
    if dimensions > 3 and seen.flow.first_taken == POSITION:
        for channels in range(2, dimensions):
            other, _ = _observed(model, input_size, batch, training, channels)
            if other.flow.first_taken == CHANNEL:
                return other
    return seen


def _observed(
    model: nn.Module, input_size: tuple[int, ...] | None, batch: int, training: bool, channels: int
) -> tuple[Observation, int]:
    """Observe one pass with its channels in a dimension of the input; also return how many dimensions that has."""
    seen = Observation()
    mode = seen.mode
    names = {module: name for name, module in model.named_modules()}
    depth = 0
    order = 0
    here = threading.get_ident()
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return original(module, *args, **kwargs)
        nonlocal order
        # Containers are copied: dense networks append to a list after they passed it on.
        record = Call(*pytree.tree_map(lambda leaf: leaf, (args, kwargs)), checkpointed=depth > 0)
        name = names.get(module)
        if name is not None:
            seen.calls.setdefault(name, []).append(record)
        # A patched model is looked at as part of a trace: this isn't a pass, and serves no labels.
        # By its class: a wrapper may hand unknown attributes on to the model.
        traced = getattr(type(module), "_fxgraft_forward", None)
        run = module.forward if traced is None else partial(traced, module)
        record.output = _one_step(seen.flow, module, run, args, kwargs)
        record.order = order
        marks = map(seen.flow.settled, tensors(record.output))
        record.made = tuple(None if mark is None else mark.number for mark in marks)
        order += 1
        return record.output

    def checkpoint(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal depth
        depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1

    def restore() -> None:
        nn.Module.__call__ = original

    inputs = fake_inputs(model, mode, input_size, batch)
    seen.flow.start(inputs[0], channels)
    with (
        preserved_modes(model),
        preserved_data(model) as faked,
        preserved_attributes(model.modules()),
        preserved_globals(model.modules()),
        preserved_random_state(),
        replaced_checkpoint(checkpoint),
    ):
        for module in model.modules():
            module.training = training
            # What counts does so on real buffers, also in a fake pass.
            own = module._buffers
            own.update({name: None if b is None else b.clone() for name, b in own.items()})
        with restoring(restore):
            nn.Module.__call__ = call  # type: ignore[method-assign]
            try:
                seen.run(call, model, *inputs)
                seen.flow.end_pass()
            except Exception as error:
                if faked():
                    raise DataSetError(", ".join(map(repr, faked()))) from error
                raise
    return seen, inputs[0].ndim


@contextlib.contextmanager
def bare_calls() -> Iterator[None]:
    """Call modules of this thread by their forwards in the block: no hook fires."""
    here = threading.get_ident()
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (
            original(module, *args, **kwargs)
            if threading.get_ident() != here
            else module.forward(*args, **kwargs)
        )

    def restore() -> None:
        nn.Module.__call__ = original

    with restoring(restore):
        nn.Module.__call__ = call  # type: ignore[method-assign]
        yield


def _one_step(
    flow: Flow, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a forward. A recurrent layer runs on one position, whose output stands for all of them.

    On the meta device a recurrent layer runs operation by operation for every position: half a minute in a deep
    network. All positions have the shape of one.
    """
    if not (isinstance(module, nn.RNNBase) and args and isinstance(args[0], Tensor)):
        return run(*args, **kwargs)
    dim = int(module.batch_first and args[0].ndim == 3)
    out, state = run(args[0].narrow(dim, 0, 1), *args[1:], **kwargs)
    out = out.repeat_interleave(args[0].shape[dim], dim)
    flow.like(out, args[0], out.shape[-1])
    return out, state


def tensors(tree: Any) -> list[Tensor]:
    """List the tensors in a nest of containers and dataclasses."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += tensors([getattr(leaf, each.name, None) for each in fields(leaf)])
    return found
