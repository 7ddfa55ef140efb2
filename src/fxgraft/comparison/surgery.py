"""What the demo shows before it compares anything: a stock model is patched, trained, folded and undone.

Every line is checked as it is said.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import fxgraft
from fxgraft.comparison.data import Items
from fxgraft.comparison.training import Images, Training, fit, transform_of
from fxgraft.graph.tracing.preserve import preserved_modes

PATCHES = ("rsc", "crossnorm", "mixmo")


@dataclass(frozen=True)
class Check:
    """A line of the demo, and whether it holds."""

    text: str
    holds: bool


def surgery(model: nn.Module, items: Items, training: Training, *, size: int) -> Iterator[Check]:
    """Patch a model with three methods, train it for an epoch, fold it, and take everything off again.

    Args:
        model: the model, as its library built it; it ends trained, and bare.
        items: images to train on.
        training: how; for one epoch.
        size: side of the images in pixels.

    Yields:
        What was done, and whether what it says was found to be so.
    """
    images = Images(items, transform_of(model, training, size, training=False), size)
    x = torch.stack([images[index][0] for index in range(8)])
    cls, keys, parts = type(model), list(model.state_dict()), _parts(model)
    before, exported = _output(model, x), _exported(model, x)
    yield Check(f"a stock {cls.__module__}.{cls.__name__}, {len(keys)} tensors in its state dict", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a method may have weights of its own to draw
        for method in PATCHES:
            fxgraft.patch(model, method, input_size=(3, size, size))
    names = ", ".join(graft.name for graft in fxgraft.grafts(model))
    stock = set(keys) <= set(model.state_dict())
    yield Check(
        f"patched with {names}: still a {cls.__name__}, its keys unchanged", isinstance(model, cls) and stock
    )
    yield Check(
        "as it was patched it predicts what it did, bit for bit", torch.equal(_output(model, x), before)
    )
    fitted = fit(model, items, (), training, size=size)
    yield Check(f"trained for an epoch on {len(items)} images: loss {fitted.loss[0]:.2f}", True)
    trained, folded = _output(model, x), fxgraft.merge(model)
    fits = type(folded) is cls and list(folded.state_dict()) == keys
    close = torch.allclose(_output(folded, x), trained, rtol=1e-4, atol=1e-4)
    yield Check(
        f"folded by fxgraft.merge: a {cls.__name__} with the stock keys that predicts the same",
        fits and close,
    )
    fxgraft.unpatch(model)
    same = type(model) is cls and list(model.state_dict()) == keys and _parts(model) == parts
    yield Check(
        "undone by fxgraft.unpatch: the same class, the same keys, the same modules and tensors", same
    )
    yield Check(
        "and the graph that torch.export takes from it is that of the stock model",
        _exported(model, x) == exported,
    )


def _output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with preserved_modes(model), torch.no_grad():
        return model.eval()(x)


def _parts(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(part)) for name, part in [*model.named_modules(), *model.named_parameters()]]


def _exported(model: nn.Module, x: torch.Tensor) -> str:
    return str(torch.export.export(copy.deepcopy(model).eval(), (x,)).graph)
