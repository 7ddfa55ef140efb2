"""Copies of a layer: several sets of tensors for one layer, and the one layer that they fold into."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxgraft.errors import MergeError
from fxgraft.extend import Unit, effective, layer_tensors, sharers, write_effective

Start = Literal["pretrained", "random"]


class LayerCopies(Unit):
    """Holds the tensors of further copies of a linear layer or convolution. The first copy is the layer itself.

    The tensors are ``weight_1``, ``bias_1``, ``weight_2``, ... They follow the layer's ``requires_grad``. What the
    copies act with, and what is averaged, are the weights that the layer makes of them: standardised ones, where it
    does that.

    With a spread the copies act with weights that lie apart from those: the buffer ``offset_0``, drawn once and not
    trained, is added to the weight of copy 0 and taken from that of copy 1, ``offset_1`` likewise for the copies 2 and
    3, and so on; the last of an odd number has none. The offsets of all copies cancel, whatever is trained, so the
    folded layer is that of the tensors alone, and where they start as the layer's own it is the layer to the bit.

    Args:
        module: the layer.
        count: how many copies there are in all, at least 1.
        start: "pretrained" copies its tensors, "random" draws them with its tensors' means and deviations.
        spread: length of the offsets, as a share of the weight's; used with "pretrained".

    Attributes:
        path: the layer's qualified name; set when the unit is placed.
    """

    path: str
    layer: Callable[[], nn.Module | None] | None = None
    served: dict[str, Tensor]

    def __init__(self, module: Any, count: int, start: Start, spread: float = 0.0) -> None:
        super().__init__()
        self.count, self.spread = count, spread
        self.start: Start = start
        for index in range(1, count):
            for name, tensor in layer_tensors(module).items():
                started = nn.Parameter(_start(tensor.detach(), start), tensor.requires_grad)
                self.register_parameter(f"{name}_{index}", started)
        for pair in range(count // 2) if spread > 0 and start == "pretrained" else ():
            self.register_buffer(f"offset_{pair}", _offset(effective(module)[0].detach(), spread))

    def serve(self, path: str, module: Any) -> None:
        """Remember the layer; where another one of the same shape took its place, follow it.

        With the same weights the copies and their offsets stay as they are. With others they start again from the new
        layer (`restart`).
        """
        now = layer_tensors(module)
        replaced = self.layer is not None and self.layer() is not module
        lost = replaced and not _same(self.served, now)
        # Keep the tensors: of a layer that was replaced, nothing else may be left to compare with.
        self.bind(path=path, layer=weakref.ref(module), served=now, restarts=lost)

    def restart(self, model: nn.Module) -> None:
        """Start again as copies of the layer, which has new weights."""
        self._start_again(model.get_submodule(self.path))

    @torch.no_grad()
    def _start_again(self, module: Any) -> None:
        for index in range(1, self.count):
            for name, tensor in layer_tensors(module).items():
                getattr(self, f"{name}_{index}").copy_(_start(tensor, self.start))
        for offset in self.buffers():
            offset.copy_(_offset(effective(module)[0].detach(), self.spread))

    def counterparts(self) -> dict[str, str]:
        """Map each copy's parameter to the layer's own."""
        pairs = ((name, name.rpartition("_")[0]) for name, _ in self.named_parameters())
        return {name: f"{self.path}.{own}" for name, own in pairs}

    def tensors(self, module: Any) -> list[tuple[Tensor, Tensor | None]]:
        """List weight and bias of every copy, as the layer multiplies with them and adds them.

        Args:
            module: the layer.
        """
        names = layer_tensors(module)
        others = [
            {name: getattr(self, f"{name}_{index}") for name in names} for index in range(1, self.count)
        ]
        return [effective(module), *(effective(module, other) for other in others)]

    def spread_out(self, module: Any) -> list[tuple[Tensor, Tensor | None]]:
        """List weight and bias with which every copy acts by itself: its tensors, moved by its offset.

        Args:
            module: the layer.
        """
        acting = self.tensors(module)
        for pair, offset in enumerate(self.buffers()):
            for index, sign in ((2 * pair, 1), (2 * pair + 1, -1)):
                weight, bias = acting[index]
                # Wrappers may run the layer in another dtype, and tell only its parameters.
                acting[index] = (torch.add(weight, offset.to(weight.dtype), alpha=sign), bias)
        return acting

    def folded(self, module: nn.Module, gain: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Return ``gain`` times the mean of the copies: weight and bias of the layer that gives the mean output."""
        weights, biases = zip(*self.tensors(module), strict=True)
        return _mean(weights, gain), None if biases[0] is None else _mean(biases, gain)


def fold(model: nn.Module, units: Sequence[LayerCopies]) -> None:
    """Write what the copies of layers fold into, into the layers' own tensors.

    Raises:
        MergeError: a layer's tensors belong to others as well. Nothing is written then.
    """
    for unit in units:
        others = list(sharers(model, model.get_submodule(unit.path)))
        if others:
            raise MergeError(
                f"{unit.path!r} shares its weight with {', '.join(map(repr, others))}, which would change as well by "
                "what its members fold into.\n"
                "Give it a weight of its own, or keep the patched model (torch.save(model, ...))."
            )
    for unit in units:
        module = model.get_submodule(unit.path)
        write_effective(module, *unit.folded(module))


def copies_key(path: str, module: Any) -> str:
    """Name a unit by the layer it serves and the shape of its tensors, so that another layer gets another unit."""
    return f"{path} {tuple(module.weight.shape)}{'' if module.bias is None else ' with bias'}"


def _same(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Say whether two layers have the same tensors, on whatever device and in whatever precision."""
    if before.keys() != now.keys():
        return False
    pairs = [(before[name].detach(), now[name].detach()) for name in now]
    if any(tensor.is_meta for pair in pairs for tensor in pair):
        return all(old is new for old, new in pairs)
    return all(torch.equal(old.to(new), new) or torch.equal(old, new.to(old)) for old, new in pairs)


def _start(tensor: Tensor, start: Start) -> Tensor:
    if start == "pretrained":
        return tensor.clone()
    return torch.randn_like(tensor) * tensor.std(correction=0) + tensor.mean()


def _offset(weight: Tensor, spread: float) -> Tensor:
    return torch.randn_like(weight) * (spread * weight.square().mean().sqrt())


def _mean(parts: Sequence[Tensor], gain: float) -> Tensor:
    """Average tensors; where all of them are equal the mean is that to the bit, for any number of them."""
    first = parts[0]
    if len(parts) > 1:
        first = first + sum(part - first for part in parts[1:]) / len(parts)
    return first if gain == 1 else first * gain
