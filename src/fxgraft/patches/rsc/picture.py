"""The picture of RSC: what one training pass would mute in an image, position by position and channel by channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxgraft.extend import Panel, Picture, SiteError, View


def mute_panels(view: View, units: Sequence[Any], options: Any) -> Picture:
    """Draw, for every image of the user's, the positions that are muted and where the muted channels respond.

    Args:
        view: the view of the patched model.
        units: the units of the graft.
        options: options of the patch.

    Raises:
        SiteError: the units act on vectors, which have no positions to draw.
    """
    units = [unit for unit in units if unit.layout.name != "NC"]
    if not units:
        raise SiteError(
            "RSC acts on vectors here, and a picture needs positions.\n"
            "Pass a layer with maps or tokens: --graft rsc:layer=layer4."
        )
    rows = [
        [Panel(f"image, taken for {view.class_name(label)}", image)]
        for image, label in zip(view.images[: view.given], view.labels.tolist(), strict=False)
    ]
    for unit in units:
        for scope in ("spatial", "channel") if options.scope == "both" else (options.scope,):
            values, record = _one_pass(view, unit, scope)
            for index, row in enumerate(rows):
                mask, value = record.mask[index] == 0, values[index]
                heat = view.grid(value.mean(0) if scope == "spatial" else value[mask.flatten()].mean(0))
                muted = view.grid(mask[0]) if scope == "spatial" else None
                share = f"{mask.double().mean():.0%}"
                what = f"{share} of positions" if scope == "spatial" else f"the muted {share} of channels"
                unit_of = "mean activation" if scope == "spatial" else "mean activation of those channels"
                title = f"{unit.site.name}: {what}"
                row.append(Panel(title, view.images[index], heat, muted, unit=unit_of, hatched_as="muted"))
    sites = ", ".join(unit.site.name for unit in units)
    classes = ", ".join(map(view.class_name, view.labels[: view.given].tolist()))
    return Picture(rows, f"what RSC mutes at {sites} for {classes}")


def _one_pass(view: View, unit: Any, scope: str) -> tuple[Tensor, Any]:
    """Make one training pass in a scope; return the values at the site and the record of what was muted."""
    seen: list[Tensor] = []
    unit.config = dataclasses.replace(unit.config, scope=scope, layer=None)
    unit.active = True
    handle = unit.register_forward_hook(lambda _, args, out: seen.append(unit.layout.canonical(args[0])))
    unit.bind(records=[])
    with torch.no_grad():
        view.model.train()(view.inputs, target=view.labels)
    handle.remove()
    return seen[-1].detach(), unit.records[-1]
