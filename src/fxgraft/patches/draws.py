"""Random decisions: plain numbers in eager mode, tensors in code that is compiled or recorded.

A number drawn on the CPU stalls no device, and the side that it rules out is not computed. But torch.compile,
torch.export, torch.jit.trace and make_fx would freeze a number, or break the graph; and under `torch.func.vmap` every
network has its own decision. There the decision is a tensor, and both sides are computed. All draws come from torch's
generators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxgraft._torch import sample_dirichlet, vmapped
from fxgraft.graph.runtime.recorders import recorded

Decision = bool | Tensor
"""A decision: True or False in eager mode, () bool on the device where it is data."""


def as_data() -> bool:
    """Say whether decisions have to be tensors: in code that is compiled or recorded, and under `torch.func.vmap`."""
    if recorded():
        return True
    return vmapped()


def coin(p: float | Tensor, device: torch.device) -> Decision:
    """Decide with probability ``p``.

    Args:
        p: in [0, 1]; a tensor () on the CPU where it follows a schedule that compiled code must not guard on.
        device: where the decision is needed.
    """
    if as_data():
        return torch.rand((), device=device) < p
    chance = p.item() if isinstance(p, Tensor) else p
    return torch.rand(()).item() < chance


def choice(count: int, device: torch.device) -> int | Tensor:
    """Choose one of ``count`` things: returns its number, where a tensor is needed as () int64 on the device."""
    if as_data():
        return torch.randint(count, (), device=device)
    return int(torch.randint(count, ()))


def subset(count: int, size: int, p: float, device: torch.device) -> frozenset[int] | Tensor:
    """With probability ``p`` choose ``size`` of ``count`` things, else none.

    Returns:
        Their numbers; as data (count,) bool.
    """
    if as_data():
        rank = torch.rand(count, device=device).argsort()
        return (rank < size) & (torch.rand((), device=device) < p)
    if p < 1 and not coin(p, device):
        return frozenset()
    return frozenset(torch.randperm(count)[:size].tolist())


def among(chosen: frozenset[int] | Tensor, index: int, device: torch.device) -> Decision:
    """Say whether a number is in a `subset`."""
    return chosen[index].to(device) if isinstance(chosen, Tensor) else index in chosen


def numbers(draw: Callable[[torch.device], Tensor], device: torch.device) -> Sequence[int] | Tensor:
    """Draw whole numbers: a list, drawn on the CPU; as data a tensor on the device.

    Args:
        draw: makes the tensor on a device.
        device: where the numbers are needed.
    """
    return draw(device) if as_data() else draw(torch.device("cpu")).tolist()


def permutation(count: int, device: torch.device) -> Tensor:
    """Permute ``count`` things, on the device: (count,) int64."""
    return torch.randperm(count, device=device)


def ratios(count: int, alpha: float, device: torch.device) -> Tensor:
    """Draw ratios of mixtures from Beta(alpha, alpha): (count,) float32."""
    return sample_dirichlet(torch.full((count, 2), float(alpha), device=device))[:, 0]


def choose(decision: Decision, yes: Callable[[], Tensor], no: Tensor) -> Tensor:
    """Return the chosen side of a decision; in eager mode the other one isn't computed.

    Args:
        decision: what `coin` or `among` returned.
        yes: computes what to return if it is true, shaped as ``no``.
        no: what to return otherwise.
    """
    if decision is False:
        return no
    return yes() if decision is True else torch.where(decision, yes(), no)
