"""The contract of a patch, and the registry of methods.

A method is a frozen dataclass of its options that derives from `Patch`, is decorated with `register`, and
says in `place` which units go where. Nothing else has to know it: the API, the documentation table, the test
sweeps and the benchmarks iterate over the registry.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from fxgraft.errors import (
    MergeError,
    SiteError,
)
from fxgraft.graph.grafting.graft import Graft
from fxgraft.graph.grafting.placement import Placement
from fxgraft.graph.grafting.state import state_of
from fxgraft.graph.grafting.unit import Unit
from fxgraft.graph.tracing.anatomy import Anatomy

Make = Callable[[str, Callable[[], Unit]], Unit]
"""``make(key, build)``: the graft's unit of that key, built the first time it is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
    """Base of all methods: the options of one, and what it does to a model.

    Class attributes describe the method for tables and messages:
        method: name in the registry.
        title, paper, url: what it is called and where it is from.
        where: where in a backbone it goes.
        cost: what it costs in training and in evaluation.
        train_only: evaluation is bitwise the bare model's.
        needs_labels: training passes need ``target``.
        adds_parameters: it has parameters of its own to train.
        call_options: keyword arguments of the model's call that are meant for this method's units.
        saves: a recipe of its options is enough to make it again; otherwise `fxgraft.save` refuses.
        example: options that sweeps over backbones use, where the method cannot do without any.
    """

    method: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    url: ClassVar[str] = ""
    where: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    train_only: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    adds_parameters: ClassVar[bool] = False
    call_options: ClassVar[tuple[str, ...]] = ()
    saves: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})

    def place(self, anatomy: Anatomy, make: Make) -> Sequence[Placement]:
        """Say which units go where on a bare model.

        Called when the patch is made and again whenever the model has to be planned anew; units come from
        ``make``, so that their parameters survive.
        """
        raise NotImplementedError

    def describe(self, graft: Graft) -> str:
        """Say what the graft does on its model, in one line, for `fxgraft.summary`."""
        return ""

    def losses(
        self, graft: Graft, out: Any, target: Tensor, criterion: Callable[..., Tensor]
    ) -> Mapping[str, Tensor]:
        """Return what the method adds to the loss, by name."""
        return {}

    def criterion(self, graft: Graft, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the criterion to use in place of the user's."""
        return criterion

    def merge(self, graft: Graft, model: nn.Module) -> None:
        """Fold the graft into the stock weights of ``model``; a method of training alone has nothing to fold.

        Raises:
            MergeError: the method changes the trained function in a way that stock weights cannot express.
        """
        if not self.train_only:
            raise MergeError(
                f"{graft.name!r} ({self.title}) acts in evaluation too, and stock weights cannot express it.\n"
                "Keep the patched model (fxgraft.save), or unpatch it and accept another function."
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """Look through what is wrapped around a patched model: DistributedDataParallel, torch.compile."""
    while state_of(model) is None:
        inner = next((model._modules[n] for n in ("_orig_mod", "module") if n in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def grafts_on(model: nn.Module) -> list[Graft]:
    """List the grafts of a model that nothing is wrapped around; empty for a bare one."""
    state = state_of(model)
    return state.ledger.grafts if state is not None and state.ledger is not None else []


@contextmanager
def recording(model: nn.Module, kind: type[Unit], missing: str) -> Iterator[list[Any]]:
    """Let the units of one kind on a model append to a list, as ``unit.records``, for the time of the block.

    Raises:
        SiteError: there is none of them; says ``missing``.
    """
    units: list[Any] = [u for graft in grafts_on(model) for u in graft.units.values() if isinstance(u, kind)]
    if not units:
        raise SiteError(missing)
    records: list[Any] = []
    for unit in units:
        unit.records = records
    try:
        yield records
    finally:
        for unit in units:
            unit.records = None


def card(cls: type[Patch]) -> str:
    """Return the documentation of a method, as written in its class docstring."""
    return inspect.cleandoc(cls.__doc__ or "")
