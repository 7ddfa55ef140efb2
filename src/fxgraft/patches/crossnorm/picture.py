"""The picture of CrossNorm: two images that exchange their styles, and the channel means inside the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxgraft.extend import Panel, Picture, View
from fxgraft.patches.crossnorm import tensors as core


def style_panels(view: View, units: Sequence[Any], box: Any) -> Picture:
    """Draw two images, each with the other's channel statistics, and the channel means of the first unit.

    Args:
        view: the view of the patched model.
        units: the units of the graft.
        box: draws the box of a map (B, C, H, W), for options that crop; returns None for the rest.
    """
    pair = view.images[:2]
    swapped = torch.tensor([1, 0])
    styled = core.crossnorm(pair, swapped, content_box=box(pair, "content"), style_box=box(pair, "style"))
    images = [
        Panel(title, image.clamp(0, 1))
        for title, image in (
            ("first", pair[0]),
            ("second", pair[1]),
            ("first, in the second's style", styled[0]),
            ("second, in the first's style", styled[1]),
        )
    ]
    unit = units[0]
    seen: list[Tensor] = []
    handle = unit.register_forward_hook(lambda _, args, out: seen.append(unit.layout.canonical(args[0])))
    with torch.no_grad():
        view.model.train()(view.inputs[:2])
    handle.remove()
    maps = seen[-1]
    means = [batch.flatten(2).mean(2) for batch in (maps, core.crossnorm(maps, swapped))]
    curves = {
        "first": means[0][0],
        "second": means[0][1],
        "first, restyled": means[1][0],
    }
    inside = Panel(
        "channel means at the first unit",
        curves=_sorted(curves),
        unit="mean",
        along="channel, sorted by the first's",
    )
    return Picture([images, [inside]], "styles exchanged in the image and at the first unit in the network")


def _sorted(curves: dict[str, Tensor]) -> dict[str, Tensor]:
    order = curves["first"].argsort()
    return {name: curve[order] for name, curve in curves.items()}
