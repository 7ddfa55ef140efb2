"""Scoring a classifier on images in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from benchmarks.loops.domains import checked_images
from benchmarks.loops.images import as_input
from fxgraft.graph.tracing.preserve import preserved_modes


def evaluate(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, batch_size: int = 256, amp: bool = False
) -> float:
    """Share of images that the model, in evaluation mode, gives their label.

    The training flag of every submodule is put back afterwards.

    Args:
        model: a classifier; the images go to the device of its parameters, a batch at a time.
        images: uint8 (N, 3, S, S).
        labels: int64 (N,).
        batch_size: images per forward pass.
        amp: run under bfloat16 autocast.

    Raises:
        ConfigError: if there are no images, or the labels do not match them.
    """
    images, labels = checked_images((images, labels))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    hits = torch.zeros((), dtype=torch.long, device=device)
    with preserved_modes(model), torch.no_grad(), autocast(device, amp):
        model.eval()
        for start in range(0, len(labels), batch_size):
            batch = as_input(images[start : start + batch_size].to(device))
            hits += (model(batch).argmax(1) == labels[start : start + batch_size].to(device)).sum()
    return hits.item() / len(labels)


def autocast(device: torch.device, amp: bool) -> AbstractContextManager:
    """Return bfloat16 autocast on a device, or what does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()
