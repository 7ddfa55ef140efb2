"""A model's anatomy: its calls, its graphs and its shapes, found on demand and remembered."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgraft.errors import SiteError, StructureError
from fxgraft.graph.tracing.observe import Observation, observe
from fxgraft.graph.tracing.preserve import preserved_attributes, preserved_modes
from fxgraft.graph.tracing.signatures import INPUT, bind
from fxgraft.graph.tracing.trace import Traced, trace

__all__ = ["Anatomy"]


class Anatomy:
    """What patches may ask about a bare model. Nothing here changes it.

    Args:
        model: the model, with no graft installed.
        input_size: (C, H, W) to propagate shapes with; the model's own by default.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, ...] | None = None) -> None:
        self.model = model
        self.input_size = input_size
        self._observation: Observation | None = None
        self._graphs: dict[tuple[Any, ...], Traced] = {}
        self._values: dict[str, dict[str, Any]] = {}

    @property
    def observation(self) -> Observation:
        """The recorded calls of one evaluation pass.

        Raises:
            StructureError: the model does not run on a batch of images of that size.
        """
        if self._observation is None:
            try:
                self._observation = observe(self.model, self.input_size)
            except Exception as error:
                raise StructureError(
                    f"{type(self.model).__name__} does not run on a batch of shape (2, "
                    f"{', '.join(map(str, self.input_size)) if self.input_size else 'C, H, W'}): "
                    f"{type(error).__name__}: {error}\n"
                    "Sites and shapes are found by passing one batch of fake images through the model.\n"
                    "Pass input_size=(C, H, W) of the images you train on."
                ) from error
        return self._observation

    def module(self, path: str) -> nn.Module:
        """Return the module of that qualified name; '' is the model."""
        return self.model.get_submodule(path)

    def graph(
        self, path: str, training: bool, opened: tuple[str, ...] = (), deep: tuple[str, ...] = ()
    ) -> Traced:
        """Trace one module's forward as the model calls it; see `tracing.trace`.

        The result is shared: copy before editing (`fresh_graph` traces anew).
        """
        key = (path, training, opened, deep)
        if key not in self._graphs:
            self._graphs[key] = self.fresh_graph(path, training, opened, deep)
        return self._graphs[key]

    def fresh_graph(
        self, path: str, training: bool, opened: tuple[str, ...] = (), deep: tuple[str, ...] = ()
    ) -> Traced:
        """Trace one module's forward into a graph that the caller may edit."""
        calls = self.observation.calls.get(path)
        if not calls:
            raise SiteError(
                f"{path!r} is never called in the model's forward pass.\n"
                "Its forward cannot be rewritten, since nothing would run it."
            )
        return trace(self.module(path), calls[0], training, opened, deep, path, self.observation.calls)

    def values(self, path: str) -> dict[str, Any]:
        """Propagate fake tensors through a module's evaluation graph: node name to value."""
        if path not in self._values:
            traced = self.graph(path, training=False)
            call = self.observation.calls[path][0]
            self._values[path] = _propagate(self, traced, path, call.args, call.kwargs)
        return self._values[path]


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, traced: Traced) -> None:
        super().__init__(module, garbage_collect_values=False, graph=traced.graph)
        self.constants = traced.constants
        self.values: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.module.get_submodule(target).forward(*args, **kwargs)  # type: ignore[union-attr]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value
        return value


def _propagate(anatomy: Anatomy, traced: Traced, path: str, args: Any, kwargs: Any) -> dict[str, Any]:
    leaves = pytree.tree_leaves(bind(traced.signature, args, kwargs))
    inputs = [leaf for leaf, fixed in zip(leaves, traced.fixed, strict=True) if fixed is INPUT]
    module = anatomy.module(path)
    recorder = _Recorder(module, traced)
    mode = anatomy.observation.mode
    with preserved_modes(module), preserved_attributes(module.modules()):
        for each in module.modules():
            each.training = False
        # Shapes are a courtesy of the listing: where a value cannot be propagated, the nodes stand without.
        with contextlib.suppress(Exception), mode:
            recorder.run(*inputs, enable_io_processing=False)
    return recorder.values


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Return a tensor's shape with the batch dimension, or None for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else None
