"""Training of a classifier alone, on maps that a frozen network computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxgraft

EPOCHS, BATCH, LR = 30, 32, 0.01  # the rate by the bare head on the validation split

_sets: dict[Any, tuple[Tensor, Tensor]] = {}


def head_alone(model: nn.Module, images: Any, validation: Any, seed: int) -> list[float]:
    """Train `networks.FrozenLite0` by SGD with momentum and a cosine, images as they are without augmentation.

    Args:
        model: bare or patched.
        images: map-style data set; its items say whether their maps are known.
        validation: not used.
        seed: of the order of the images.

    Returns:
        The mean loss of each epoch.
    """
    if images.items not in _sets:
        pictures = torch.stack([images[index][0] for index in range(len(images))])
        labels = torch.tensor([item.label for item in images.items])
        _sets[images.items] = torch.cat([model.maps(each) for each in pictures.split(64)]).half(), labels  # type: ignore[operator]
    maps, labels = _sets[images.items]
    # No decay: a classifier of 100 thousand weights on maps that stand still.
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], LR, momentum=0.9)
    steps = EPOCHS * (len(maps) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    means, done = [], 0
    for _ in range(EPOCHS):
        losses = []
        for rows in torch.randperm(len(maps), generator=order).split(BATCH):
            if len(rows) < BATCH:
                continue
            y = labels[rows]
            fxgraft.set_progress(model, done / steps)
            with fxgraft.targets(y):
                out = model(maps[rows].float())
                loss = fxgraft.loss(model, out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            done += 1
        means.append(float(torch.stack(losses).mean()))
    return means
