"""The picture of GAM: channel means at each tap, of the source, the target, and the matched target."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.extend import Graft, Panel, Picture, Tap, View, grafts_on, take
from fxgraft.patches.gam import tensors as core
from fxgraft.patches.gam.game import channel_dim, game_of


def tap_panels(view: View, graft: Graft) -> Picture:
    """Draw the channel means at every tap: the first image is the source domain, the second the target.

    Args:
        view: the view of the patched model.
        graft: the graft of the model.
    """
    game = game_of(graft)
    source = game.follow(view.model)
    frozen = grafts_on(source)[-1]
    taken = []
    with torch.no_grad(), frozen.override(listen=True):
        for image in view.inputs[:2]:  # with its mirror image: a single vector has no deviation
            source(torch.stack((image, image.flip(-1))))
            taken.append(list(take(frozen.units_of(Tap)).values()))
    panels = []
    for key, first, second in zip(game.layouts, *taken, strict=True):
        dim = channel_dim(game.layouts[key])
        matched = core.gaussian_match(second, *core.channel_moments(first, dim), dim=dim)
        means = [core.channel_moments(maps, dim)[0] for maps in (first, second, matched)]
        order = means[0].argsort()
        names = ("source", "target", "target, matched")
        curves: dict[str, Tensor] = {n: m[order] for n, m in zip(names, means, strict=True)}
        panels.append(
            Panel(
                f"channel means at {key}", curves=curves, unit="mean", along="channel, sorted by the source's"
            )
        )
    images = [Panel("source", view.images[0]), Panel("target", view.images[1])]
    return Picture([images, panels], f"channel means at {', '.join(game.layouts)}")
