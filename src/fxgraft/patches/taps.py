"""Activation taps: records the values at sites of every pass and hands them over once."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxgraft.extend import (
    Backbone,
    BypassError,
    Graft,
    LayeredPatch,
    Layout,
    Make,
    Panel,
    Picture,
    Placement,
    Unit,
    UnknownGraftError,
    View,
    candidates,
    grafts_in,
    register,
    take,
    tap_placements,
    unwrapped,
)

_USUAL = {5: "NCDHW", 4: "NCHW", 3: "NLC", 2: "NC"}
"""Layouts to draw values by, where a listing of sites does not say their own."""


@register("taps")
@dataclass(frozen=True, kw_only=True)
class Taps(LayeredPatch):
    """Taps: record the values at sites, to be fetched after each pass.

    The activations A_i at chosen sites (matched in Huang, Huang, Krähenbühl, ECCV 2018), in training and in
    evaluation. The network computes what it computes without taps. A value is copied only where a later operation
    of the pass writes over it in place; gradients flow through what is recorded into the network, unless it is
    detached.

    Args:
        layers: which values: qualified module names (``name_1`` for a second call), node names from
            ``fxgraft.sites(model)``, globs, stage numbers (-1 is the last), alone or several. Values come in
            this order, by these names; globs and stage numbers give the names of the sites they stand for. A
            tap sees what patches added before it make of the value.
        layer: the same, for one.
        detach: cut the values off the graph, instead of letting gradients flow through them.
        copy: record a copy of every value. By default only of those that are written over later in the pass.

    Raises:
        ConfigError: detach or copy isn't a bool.
        SiteError: no such site, one that holds no tensor, or one that only training or only evaluation reaches.
    """

    title = "Activation taps"
    paper = (
        "Huang, Huang, Krähenbühl: Domain transfer through deep activation matching. ECCV 2018 (which "
        "matches what taps record)"
    )
    url = "https://www.philkr.net/papers/huang2018domain/"
    where = "any sites, several at once"
    cost = "memory of the values until they are fetched, and a copy of those that are written over in place"
    idea = (
        "The values at any sites are recorded, in training and in evaluation, and handed over with their "
        "gradients; the network computes what it computes without them."
    )
    works_with = "all methods, torch.compile; absent from torch.export"
    hurts = "memory: large maps are held until they are fetched or the next pass begins"

    example = MappingProxyType({"layers": -1})
    needs_layers = True

    detach: bool = False
    copy: bool = False

    def place(self, backbone: Backbone, make: Make) -> list[Placement]:
        """Put one tap at every site."""
        sites = backbone.named_sites(() if self.layers is None else self.layers)
        return tap_placements(backbone, make, sites, self.detach, self.copy)

    def describe(self, graft: Graft) -> str:
        """Name the sites."""
        how = "detached" if self.detach else "gradients flow"
        return f"records {graft.where()} ({how})"

    def picture(self, graft: Graft, view: View) -> Picture:
        """Show what is recorded: the mean of the channels over each image, and vectors as curves."""
        with torch.no_grad():
            _, recorded = tapped(view.model.eval(), view.inputs[: view.given])
        layouts = view.layouts()
        rows = [[Panel("image", image)] for image in view.images[: view.given]]
        for key, value in recorded.items():
            if not isinstance(value, Tensor) or value.ndim not in _USUAL:
                continue
            name, _, prefix = (layouts.get(key) or _USUAL[value.ndim]).partition(", ")
            values = Layout(name, int(prefix.partition(" ")[0] or 0)).canonical(value)
            for row, image in zip(rows, values, strict=True):
                if image.ndim == 1:
                    row.append(Panel(key, curves={"value": image}, unit="value"))
                else:
                    heat = view.grid(image.mean(0))
                    row.append(Panel(key, row[0].image, heat, unit="mean of the channels"))
        return Picture(rows, f"values at {', '.join(recorded)}")

    def merge(self, graft: Graft, model: nn.Module) -> None:
        """Leave the stock weights as they are: taps change nothing."""


def activations(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Hand over what the taps of a model recorded in its last pass.

    Afterwards the model holds none of the values; those that nobody fetches go when the next pass begins.
    `fxgraft.loss` may make passes of its own (CrossNorm with consistency does), so fetch before it.

    Args:
        model: a model with taps; it may be inside DistributedDataParallel or torch.compile.
        name: the taps of that name alone. By default those of all "taps" patches together.

    Returns:
        Tensors by the names of their sites, in the order asked for. A site that gives several tensors has its
        tuple, list or dictionary of them. A site inside of a module that is called several times in a pass has a
        tuple of the values, one for each call.

    Raises:
        UnknownGraftError: there are no taps on the model, or none of that name.
        BypassError: there was no pass since the last time, it did not reach a site, or a value was written over.
            What was recorded stays where it is.
    """
    return take(_units(model, name))


def tapped(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Call a model and return its output together with what its taps recorded.

    Args:
        model: a model with taps.
        *args: arguments of the model's own call.
        **kwargs: keyword arguments of that call, ``target=`` included.

    Returns:
        What the model returns, and the values as `activations` gives them.

    Raises:
        UnknownGraftError: there are no taps on the model.
        BypassError: the pass did not reach a site, or a value was written over.
    """
    units = _units(model, None)
    out = model(*args, **kwargs)
    return out, take(units)


def _units(model: nn.Module, name: str | None) -> list[Unit]:
    """List the taps of a model, or of its graft of one name."""
    inner = unwrapped(model)
    known = {graft.name: graft for graft in grafts_in(inner) if isinstance(graft.patch, Taps)}
    if not known:
        raise UnknownGraftError(
            f"There are no taps on this {inner._get_name()}.\n"
            'Call fxgraft.patch(model, "taps", layers=[...]) first.'
        )
    if name is not None and name not in known:
        raise UnknownGraftError(
            f"There are no taps named {name!r} on this {inner._get_name()}.\n{candidates(name, known)}"
        )
    chosen = [graft for graft in known.values() if name in (None, graft.name)]
    keys = [key for graft in chosen for key in graft.units]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        both = [graft.name for graft in chosen if double in graft.units]
        raise BypassError(
            f"{double!r} is recorded by {' and by '.join(map(repr, both))}.\n"
            "One dictionary cannot hold it twice.\n"
            f"Fetch them one by one: fxgraft.activations(model, name={both[0]!r})."
        )
    return [unit for graft in chosen for unit in graft.units.values()]
