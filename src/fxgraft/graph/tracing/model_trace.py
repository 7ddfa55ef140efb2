"""A model's trace: its calls, its graphs and its shapes, found on a shadow of it, on demand, and remembered."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxgraft._torch import DataDependentOutputException, DynamicOutputShapeException
from fxgraft.errors import ConfigError, SiteError, StructureError
from fxgraft.graph.names import class_name, join
from fxgraft.graph.tracing.observe import (
    Call,
    DataSetError,
    Observation,
    default_input_size,
    first_convolution,
    observe,
    tensors,
)
from fxgraft.graph.tracing.reads import Code, kept_reads
from fxgraft.graph.tracing.shadow import Shadow
from fxgraft.graph.tracing.signatures import forward_signature
from fxgraft.graph.tracing.trace import Traced, copied, trace
from fxgraft.graph.tracing.values import Values

Known = TypeVar("Known")

_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


class ModelTrace:
    """Answers questions about a model. It never changes the model, since it looks at a shadow of it.

    Args:
        model: the model, whose grafts are then part of it; or a shadow of it without them.
        input_size: (C, H, W), of clips and volumes (C, T, H, W), to propagate shapes with; the model's own by default.

    Attributes:
        shadow: what is looked at.
        model: the look-alike of the model, to look at and not to keep.
    """

    def __init__(self, model: nn.Module | Shadow, input_size: tuple[int, ...] | None = None) -> None:
        self._given = model  # a shadow knows its model weakly
        self.shadow = model if isinstance(model, Shadow) else Shadow(model)
        self.model = self.shadow.model
        self.input_size = input_size
        self._observation: Observation | None = None
        self._graphs: dict[tuple[Any, ...], Traced] = {}
        self._values: dict[str, Values] = {}
        self._enlarged: ModelTrace | None = None
        self._once: dict[Hashable, Any] = {}

    def once(self, name: Hashable, find: Callable[[ModelTrace], Known]) -> Known:
        """Return what ``find`` gives. It runs the first time that this name is asked for, and its answer is kept.

        ``find`` gets a weak reference: an answer that held this trace would close a circle and keep the model alive.
        """
        if name not in self._once:
            self._once[name] = find(weakref.proxy(self))
        return self._once[name]

    @property
    def name(self) -> str:
        """The class of the model, for messages."""
        return class_name(self.model)

    @functools.cached_property
    def image_size(self) -> tuple[int, ...]:
        """(C, H, W), or (C, T, H, W), of what shapes are propagated with."""
        return self.input_size or default_input_size(self.model)

    @property
    def enlarged(self) -> ModelTrace:
        """The same model at a larger input, every dimension by a factor of its own.

        Images have twice the height and three times the width, signals three times the length; of clips and volumes
        the depth is doubled, the height times three and the width times four.

        Raises:
            StructureError: the input has no places that could be more.
        """
        if self._enlarged is None:
            channels, *sizes = self.image_size
            if not sizes:
                raise StructureError(
                    f"{self.name} takes vectors.\nThey have no positions.\nPass layout= where it is asked for."
                )
            factors = (3,) if len(sizes) == 1 else range(2, 2 + len(sizes))
            larger = (size * factor for size, factor in zip(sizes, factors, strict=True))
            self._enlarged = ModelTrace(self.shadow, (channels, *larger))
        return self._enlarged

    @property
    def observation(self) -> Observation:
        """The recorded calls of one evaluation pass.

        Raises:
            StructureError: the model does not run on a batch of images of that size, or is lazy.
            ConfigError: there are no images of that size.
        """
        if self._observation is None:
            self._check_shapes()
            try:
                self._observation = observe(self.model, self.image_size)
            except ConfigError:  # of the size itself
                raise
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise StructureError(
                    f"{self.name} chooses by the numbers in a tensor what it computes next: {error}.\n"
                    "Sites and shapes are found by passing a batch of fake images through the model, which have none.\n"
                    "Patch the part before that, as of a detector the backbone: fxgraft.patch(model.backbone, ...)."
                ) from error
            except DataSetError as error:
                raise StructureError(
                    f"The forward of {self.name} sets the data of {error}.\n"
                    "Sites and shapes are found by passing a batch of fake images through the model, whose numbers no "
                    "parameter can hold.\n"
                    "Write to it in place, as with torch.no_grad(): weight.copy_(new), before the model is called, or "
                    "make the weight by torch.nn.utils.parametrize."
                ) from error
            except Exception as error:
                self._check_arguments(error)
                raise StructureError(
                    f"{self.name} does not run on a batch of shape {(2, *self.image_size)}: "
                    f"{type(error).__name__}: {error}\n"
                    "Sites and shapes are found by passing one batch of fake images through the model.\n"
                    f"{self._wanted()}"
                ) from error
        return self._observation

    def _check_shapes(self) -> None:
        """Raise for parameters without a shape, which lazy modules get in their first call."""
        lazy = [name for name, parameter in self.model.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise StructureError(
                f"{self.name} is lazy: {', '.join(map(repr, lazy[:3]))} and {len(lazy[3:])} others have no shape "
                "before the first call.\nWhere a method goes depends on shapes.\n"
                "Run one batch through the model first, model(x)."
            )

    def _wanted(self) -> str:
        """Say which size to pass: that of images, or of clips where the first convolution is a 3-D one."""
        first, dims = first_convolution(self.model), len(self.image_size)
        if isinstance(first, nn.Conv3d):
            why = "Its first convolution is a Conv3d, which takes clips or volumes, and not images.\n"
            size, what = "(C, T, H, W)", "clips or volumes"
            return f"{why if dims < 4 else ''}Pass input_size={size} of the {what} you train on."
        why = "Its first convolution is a Conv2d, which takes images, and not clips or volumes.\n"
        return f"{why if dims > 3 and first is not None else ''}Pass input_size=(C, H, W) of the images you train on."

    def _check_arguments(self, error: Exception) -> None:
        """Raise where the forward cannot be called with images alone, which explains why it did not run."""
        parameters = forward_signature(self.model).parameters.values()
        required = [
            parameter
            for parameter in parameters
            if parameter.default is parameter.empty and parameter.kind in _NAMED
        ]
        if isinstance(error, TypeError) and len(required) > 1:
            names = [parameter.name for parameter in required[1:]]
            raise StructureError(
                f"{self.name} needs {', '.join(map(repr, names))} beside the images: its forward has no default for "
                "that.\nSites and shapes are found by passing one batch of fake images through the model, alone.\n"
                f"Give it one, as def forward(self, {required[0].name}, {names[0]}=None)."
            ) from error

    def module(self, path: str) -> nn.Module:
        """Return the look-alike of the module of that qualified name; '' is the model's."""
        return self.model.get_submodule(path)

    def original(self, path: str) -> nn.Module:
        """Return the model's own module of that qualified name. A caller may keep it, unlike a look-alike."""
        return self.shadow.original(path)

    def in_order(self) -> list[str]:
        """List the modules that a pass calls, by the time their first call returned."""
        calls = self.observation.calls
        return sorted(calls, key=lambda path: calls[path][0].order)

    def caller(self, path: str) -> str:
        """Find the module whose forward calls ``path``: the nearest ancestor that is itself called."""
        parent = path.rpartition(".")[0]
        while parent and parent not in self.observation.calls:
            parent = parent.rpartition(".")[0]
        return parent

    def graph(
        self,
        path: str,
        training: bool,
        opened: tuple[str, ...] = (),
        deep: tuple[str, ...] = (),
        hooks: bool = False,
    ) -> Traced:
        """Trace one module's forward as the model calls it; see `tracing.trace`.

        The result is shared: to edit it, take the copy that `fresh_graph` makes.
        """
        key = (path, training, opened, deep, *([hooks] if hooks else []))
        if key not in self._graphs:
            self._graphs[key] = self._trace(path, training, opened, deep, hooks=hooks)
        return self._graphs[key]

    def fresh_graph(self, path: str, training: bool, labels: tuple[str, ...] = ()) -> Traced:
        """Return a graph of one module's forward that the caller may edit, and run in the place of the forward.

        ``labels`` names arguments that the observed call left out, and that are inputs of this graph.

        Raises:
            TraceError: the forward cannot be traced, or acts through more than values.
        """
        if labels:
            return self._trace(path, training, labels=labels).runnable()
        known = self.graph(path, training).runnable()
        settings = {name: dict(kept) for name, kept in known.settings.items()}
        return replace(known, graph=copied(known.graph), constants=dict(known.constants), settings=settings)

    def _trace(
        self,
        path: str,
        training: bool,
        opened: tuple[str, ...] = (),
        deep: tuple[str, ...] = (),
        labels: tuple[str, ...] = (),
        hooks: bool = False,
    ) -> Traced:
        calls = self.observation.calls.get(path)
        if not calls:
            raise SiteError(
                f"{path!r} is never called in the model's forward pass.\n"
                "Its forward cannot be rewritten, since nothing would run it.\n"
                "Choose a site in the module that uses it; fxgraft.sites(model) lists them."
            )
        call = calls[0]
        if labels:
            batch = tensors(call.args)[0].shape[0]
            fake = self.observation.run(torch.zeros, (batch,), dtype=torch.long)
            call = Call(call.args, {**call.kwargs, **dict.fromkeys(labels, fake)})
        calls = self.observation.calls
        traced = trace(self.module(path), call, training, opened, deep, path, calls, hooks)
        return self._with_settings(path, traced, training)

    def _with_settings(self, path: str, traced: Traced, training: bool) -> Traced:
        """Store what a trace has read, as the model's own modules hold it: look-alikes hold things made for them."""
        paths = {module: name for name, module in self.module(path).named_modules()}
        settings = kept_reads(
            traced.reads,
            paths,
            traced.opened,
            lambda name: self.original(join(path, name)),
            self._code,
            training,
        )
        for name, special in traced.settings.items():
            settings[name].update(special)
        return replace(traced, settings=settings, reads={})

    def _code(self, kind: type[nn.Module]) -> Code:
        return self.once(("code", kind), lambda _: Code(kind))

    def values(self, path: str, traced: Traced | None = None) -> Values:
        """Return the values of a module's evaluation graph, or of another trace of it."""
        if traced is not None:
            return Values(self.model, path, traced, self.observation)
        if path not in self._values:
            self._values[path] = self.values(path, self.graph(path, training=False))
        return self._values[path]
