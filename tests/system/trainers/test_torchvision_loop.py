"""A loop as in torchvision's reference scripts: it calls ``model(image)`` and ``criterion(output, target)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fxgraft
from models.tiny import BATCHES, assert_trained, batches, by_hand, loader, patched


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    data_loader: Iterable[Any],
    device: torch.device,
    epoch: int,
    clip: float | None = None,
    average: AveragedModel | None = None,
) -> None:
    """One epoch, written for bare models: nothing in it is of fxgraft."""
    model.train()
    for i, (image, target) in enumerate(data_loader):
        image, target = image.to(device), target.to(device)
        torch.manual_seed(1 + epoch * BATCHES + i)
        with torch.amp.autocast(device.type, enabled=False):
            output = model(image)
            loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rsc", {}),
        ("mixmo", {}),
        ("crossnorm", {"consistency": True, "p": 1.0}),
        ("diversification", {"loss": "gradient_boosting", "loss_k": 2}),
    ],
    ids=str,
)
def test_two_changed_arguments(method: str, options: dict[str, Any]) -> None:
    model = patched(method, **options)
    expected = by_hand(patched(method, **options), epochs=2)
    data_loader = fxgraft.with_targets(loader())  # labels for model(image)
    criterion = partial(fxgraft.loss, model)  # and what the patches contribute
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        fxgraft.set_progress(model, epoch / 2)
        train_one_epoch(model, criterion, optimizer, data_loader, torch.device("cpu"), epoch)
    assert len(data_loader) == BATCHES
    assert_trained(model.state_dict(), expected)


def test_label_smoothing_clipping_and_an_average_of_weights() -> None:
    model = patched("rsc")
    average = AveragedModel(model, use_buffers=True)
    criterion = partial(fxgraft.loss, model, criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data_loader = fxgraft.with_targets(loader())
    train_one_epoch(model, criterion, optimizer, data_loader, torch.device("cpu"), 0, 1.0, average)
    x, y = batches()[0]
    with torch.no_grad():
        assert F.cross_entropy(average.eval()(x), y).isfinite()
    assert [graft.name for graft in fxgraft.grafts(average)] == ["rsc"]
    plain = fxgraft.merge(average)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), average(x))
