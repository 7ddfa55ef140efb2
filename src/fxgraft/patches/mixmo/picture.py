"""The picture of MixMo: two images, the mask of each, and the mixture as if it were one of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxgraft.extend import Graft, Panel, Picture, View
from fxgraft.patches.mixmo.pairing import MixMoInput


def mixture_panels(view: View, graft: Graft, members: int) -> Picture:
    """Draw the images of one mixture, the mask of each member, and the sum of the masked images.

    What is mixed are the outputs of the encoders; the masks are those of that pass, brought to the image's size.

    Args:
        view: the view of the patched model.
        graft: the graft of the model.
        members: M.
    """
    chosen = [index % len(view.images) for index in range(members)]
    # Each twice: BatchNorm takes no batch of one value a channel.
    inputs = MixMoInput([view.inputs[[i, i]] for i in chosen])
    with torch.no_grad():
        out = view.model.train()(inputs, target=[view.labels[[i, i]] for i in chosen])
    pairing = graft.recall(out)
    images = view.images[chosen]
    if pairing.masks is None:  # one member alone
        masks = torch.ones(1, 1, *images.shape[2:])
    else:
        masks = pairing.masks[:, 0].float().mean(1, keepdim=True)
        masks = F.interpolate(masks, size=images.shape[2:], mode="nearest")
    shares = [1.0] if pairing.shares is None else pairing.shares[0].tolist()
    first = [Panel(f"member {i}'s image", image) for i, image in enumerate(images)]
    second = [
        Panel(f"mask of member {i}: {share:.0%}", image * mask)
        for i, (image, mask, share) in enumerate(zip(images, masks, shares, strict=True))
    ]
    mixture = (images * masks).sum(0).clamp(0, 1)
    told = ", ".join(f"{share:.0%}" for share in shares)
    return Picture([[*first, Panel("mixture", mixture)], second], f"one mixture of {members} images: {told}")
