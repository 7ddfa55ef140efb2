"""Consistency among several predictions of the same images."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.errors import ConfigError
from fxgraft.functional.binary import Probability, questions


def jensen_shannon(*logits: Tensor, probability: Probability | None = None) -> Tensor:
    """Jensen-Shannon divergence among predictions: the mean KL divergence of each to their mixture.

    As in the training of AugMix and CrossNorm: with p_i = softmax(logits_i) and m their mean, clamped to at
    least 1e-7, it is the mean over i of KL(p_i ‖ m), averaged over the batch. Zero when all agree.

    A single logit is that of yes and no: the divergence is that of Bernoulli distributions, p_i = sigmoid(logits_i).
    With several labels for each image (``probability="sigmoid"``) it is the mean over the K labels of the same.

    AugMix compares the clean images with two mixed views of them, and judges the clean ones by their labels. With
    CrossNorm's consistency as well, as in the presets ``..._cnsn_augmix``, the same pass serves both:

    >>> import fxgraft, timm, torch
    >>> model = timm.create_model("test_resnet", num_classes=4).train()
    >>> options = {"consistency": True, "views": 3, "p": 1.0}  # of CIFAR; ImageNet's have CrossNorm on the views
    >>> model = fxgraft.patch(model, "crossnorm", **options)
    >>> images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    >>> views = [images, images + 0.1, images.flip(-1)]  # the second and third by AugMix
    >>> clean, *mixed = model(torch.cat(views)).chunk(3)
    >>> loss = fxgraft.loss(model, clean, labels)  # with 10 · that of the clean and two CrossNorm passes
    >>> loss = loss + 12 * fxgraft.functional.jensen_shannon(clean, *mixed)
    >>> loss.backward()

    Args:
        *logits: two or more of the same shape, (B, K) or (B, K, ...) for dense predictions.
        probability: "softmax" over the K classes, or "sigmoid" of each logit; by default softmax, and sigmoid where
            K is 1.

    Returns:
        A scalar, in float32 at least.

    Raises:
        ConfigError: fewer than two predictions, of different shapes or without rows; or the softmax of one logit,
            which is 1.
    """
    odd = [each for each in logits if not isinstance(each, Tensor) or each.ndim < 2]
    if odd:
        given = tuple(odd[0].shape) if isinstance(odd[0], Tensor) else type(odd[0]).__name__
        raise ConfigError(
            f"The divergence is among logits (B, K), a row for each image; got {given}.\n"
            "Pass tensors of logits, also for a single image: (1, K)."
        )
    if len(logits) < 2 or any(member.shape != logits[0].shape for member in logits):
        shapes = ", ".join(str(tuple(member.shape)) for member in logits)
        raise ConfigError(
            f"The divergence is among two or more predictions of one shape; got {shapes or 'none'}."
        )
    if probability == "softmax" and logits[0].shape[1] == 1:
        raise ConfigError(
            "The softmax of a single logit is 1, whatever the logit is.\nTwo predictions never differ in it.\n"
            'Leave probability= out, or pass probability="sigmoid".'
        )
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    logs = [questions(member, probability).log_softmax(dim=1, dtype=wide) for member in logits]
    chances = [log.exp() for log in logs]
    mixture = (sum(chances[1:], chances[0]) / len(chances)).clamp(1e-7, 1).log()
    divergences = [(p * (log - mixture)).sum(1).mean() for p, log in zip(chances, logs, strict=True)]
    return torch.stack(divergences).mean()
