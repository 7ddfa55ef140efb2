"""The picture of the diversification block: an image's class maps, and what one pass damps in them."""

from __future__ import annotations

from typing import Any

import torch

from fxgraft.extend import Panel, Picture, View, position_scores
from fxgraft.patches.diversification import tensors as core


def class_map_panels(view: View, options: Any) -> Picture:
    """Draw the maps of the highest-scoring classes of the first image, with their peaks and what a pass damps.

    Args:
        view: the view of the patched model.
        options: options of the patch.
    """
    with torch.no_grad():
        maps = position_scores(view.model, view.inputs[:1], options.head)
    logits = maps.flatten(2).mean(2)[0]
    best = logits.topk(min(view.top, len(logits)))
    chosen = maps[:, best.indices]
    generator = torch.Generator().manual_seed(view.seed)
    draws = core.draw(
        chosen,
        p_peak=options.p_peak,
        p_patch=options.p_patch,
        patch=options.patch,
        border=options.border,
        generator=generator,
    )
    damped = core.suppression_mask(chosen, draws, patch=options.patch)[0]
    image = view.images[0]
    panels = [Panel("image", image)]
    for index, (number, score) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
        peak = tuple(core.peak_mask(chosen)[0, index].nonzero()[0].tolist())
        panels.append(
            Panel(
                f"{view.class_name(number)}: {score:.2f}",
                image,
                chosen[0, index],
                damped[index],
                peak,
                unit="score of the class, as a logit",
                hatched_as="damped in this pass",
                cross_as="peak of the map",
            )
        )
    scores = ", ".join(
        f"{view.class_name(n)} ({s:.2f})"
        for n, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    sides = "×".join(map(str, maps.shape[2:]))
    return Picture([panels], f"class maps of {sides} of {scores}")
