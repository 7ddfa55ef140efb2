"""Warns of a graft's parameters that no optimiser moves.

It costs nothing after it has seen that all is well, a few passes after the start.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from fxgraft.errors import FxgraftWarning

MOVES = 3
"""So many steps of an optimiser that leave a parameter with gradients where it was."""

PATIENCE = 1000
"""So many passes without that, and it is not looked for any more."""

REFERENCES = 8
"""So many of the model's own parameters show that an optimiser has made a step."""


class ParameterWatch:
    """Warns of graft parameters that get gradients and that no optimiser moves.

    The version of a tensor says that it was written to, without a look at its values. Only tensors that seem to stand
    still are compared, and on an accelerator the answer is read in a later pass.
    """

    def __init__(self) -> None:
        self._done = False
        self._passes = self._moves = 0
        self._begun = False
        self._watched: dict[tuple[str, int], tuple[weakref.ref[nn.Parameter], int]] = {}
        self._seen: set[tuple[str, int]] = set()
        self._hooks: dict[tuple[str, int], Any] = {}
        self._references: list[tuple[weakref.ref[nn.Parameter], int]] = []
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._answer: Callable[[], list[bool] | None] | None = None

    def close(self) -> None:
        """Stop watching."""
        self._done = True
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._kept, self._answer = {}, {}, None

    def note(self, model: nn.Module, parameters: Callable[[], Mapping[str, Sequence[nn.Parameter]]]) -> None:
        """Look at the parameters before a training pass.

        Args:
            model: the model that makes it.
            parameters: a function that returns the parameters of every graft, by the graft's name.

        Warns:
            FxgraftWarning: `MOVES` steps of an optimiser have moved the model, but not these parameters.
        """
        if self._done or not torch.is_grad_enabled():
            return
        if not self._begun:
            self._begin(model, parameters())
        for key, (known, version) in list(self._watched.items()):
            p = known()
            if p is None or p._version != version:
                self._forget(key)
            elif p.grad is not None:
                self._seen.add(key)
        self._passes += 1
        if not self._watched or self._passes > PATIENCE:
            self.close()
            return
        moved = [
            p for known, version in self._references if (p := known()) is not None and p._version != version
        ]
        if not moved:
            return
        self._references = [
            (weakref.ref(p), p._version) for known, _ in self._references if (p := known()) is not None
        ]
        self._moves += 1
        if self._moves >= MOVES:
            self._compare(model)

    def _begin(self, model: nn.Module, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        own = {
            (name, index): p
            for name, parameter in parameters.items()
            for index, p in enumerate(parameter)
            if p.requires_grad and not p.is_inference()
        }
        self._begun = True
        self._watched = {key: (weakref.ref(p), p._version) for key, p in own.items()}
        for key, p in own.items():

            @unserializable_hook
            def hook(_: Tensor, key: tuple[str, int] = key) -> None:
                self._seen.add(key)

            self._hooks[key] = p.register_hook(hook)
        if own:  # once, and not in every pass
            ids = {id(p) for p in own.values()}
            others = [
                p for p in model.parameters() if p.requires_grad and not p.is_inference() and id(p) not in ids
            ]
            chosen = others[:: -(-len(others) // REFERENCES) or 1] + others[-1:]
            self._references = [(weakref.ref(p), p._version) for p in chosen]

    def _forget(self, key: tuple[str, int]) -> None:
        del self._watched[key]
        hook = self._hooks.pop(key, None)
        if hook is not None:
            hook.remove()

    def _compare(self, model: nn.Module) -> None:
        """Compare the values of parameters: some optimisers write without changing a tensor's version."""
        still = {
            key: p
            for key, (known, _) in self._watched.items()
            if key in self._seen and (p := known()) is not None
        }
        if self._answer is not None:
            answer = self._answer()
            if answer is not None:
                names = [key for key, same in zip(self._kept, answer, strict=True) if same and key in still]
                self.close()
                if names:
                    self._warn(model, {key: still[key] for key in names})
        elif self._kept:
            same = [(p == self._kept[key]).all() for key, p in still.items() if key in self._kept]
            self._kept = {key: value for key, value in self._kept.items() if key in still}
            if same:
                self._answer = _read_later(torch.stack([flag.detach() for flag in same]))
                self._compare(model)
        else:
            self._kept = {key: p.detach().clone() for key, p in still.items()}

    def _warn(self, model: nn.Module, still: Mapping[tuple[str, int], nn.Parameter]) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        shown = [names[id(p)] for p in still.values() if id(p) in names]
        where = f" ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if shown else ""
        grafts = dict.fromkeys(name for name, _ in still)
        warnings.warn(
            f"{len(still)} parameter{'s' * (len(still) > 1)} of {', '.join(map(repr, grafts))}{where} on this "
            f"{model._get_name()} get gradients, and no step of an optimiser moves them.\n"
            "An optimiser that was built before the patch does not know what the patch has added.\n"
            "Build it after fxgraft.patch, or add them: optimizer.add_param_group({'params': graft.parameters()}) with "
            f"graft from fxgraft.grafts(model); or freeze them: p.requires_grad_(False).",
            FxgraftWarning,
            stacklevel=2,
        )


def _read_later(flags: Tensor) -> Callable[[], list[bool] | None]:
    """Return a function that gives the values of flags, or None while an accelerator has not computed them."""
    if hasattr(flags, "fake_mode") or flags.is_meta:  # there are no values
        return lambda: [False] * len(flags)
    if not flags.is_cuda:
        return flags.tolist
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return lambda: host.tolist() if event.query() else None
