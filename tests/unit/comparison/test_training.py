"""Images with draws of their own, and scores."""

from __future__ import annotations

import random

import joblib
import numpy as np
import pytest
import torch
from timm.data.transforms_factory import create_transform
from torch import nn

from fxgraft.comparison import training
from fxgraft.comparison.data import read_data
from fxgraft.comparison.training import (
    Images,
    Training,
    calibration_error,
    fit,
    reading_processes,
    transform_of,
)
from unit.comparison.images import write_classes


def drawn(image):
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_draws_depend_on_seed_epoch_and_image_alone(tmp_path):
    items = read_data(write_classes(tmp_path)).tasks[0].train
    images = Images(items, drawn, 16, seed=3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batch = images.__getitems__([4, 2, 4])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert batch == [images[4], images[2], images[4]]
    assert batch[0] != batch[1]
    images.epoch = 1
    assert images[4] != batch[0]
    assert Images(items, drawn, 16, seed=4)[4] != batch[0]


def test_prepared_images_are_made_once(tmp_path):
    items, calls = read_data(write_classes(tmp_path)).tasks[0].test, []

    def prepare(image):
        calls.append(image)
        return image.rotate(90)

    images = Images(items, np.asarray, 16, prepare=prepare)
    first, again = images[0][0], images[0][0]
    assert len(calls) == 1
    assert (first == again).all()
    assert (first != Images(items, np.asarray, 16)[0][0]).any()


def test_the_cache_has_an_end(tmp_path, monkeypatch):
    items = read_data(write_classes(tmp_path)).tasks[0].train
    monkeypatch.setattr(training, "_cache", {})
    monkeypatch.setattr(training, "_cached_bytes", 0)
    monkeypatch.setattr(training, "_CACHE_BYTES", 3 * 18 * 18 * 5)
    images = Images(items, np.asarray, 16)
    for index in range(len(items)):
        assert images[index][0].shape == (18, 18, 3)
    assert len(training._cache) == 5


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_read_change_no_number(tmp_path, monkeypatch):
    items = read_data(write_classes(tmp_path)).tasks[0].train
    losses = []
    monkeypatch.setattr(training, "_cache", {})
    for count in (2, 0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        losses.append(fit(model, items, items, Training(epochs=2, batch_size=4), size=16, readers=count).loss)
        assert len(training._cache) == (0 if count else len(items))
    assert losses[0] == losses[1]


def test_runs_share_the_cores_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = torch.device("cuda")
    assert [reading_processes(gpu, runs) for runs in (1, 2, 4, 8, 14)] == [8, 8, 4, 2, 0]
    assert reading_processes(torch.device("cpu"), 1) == 0


@pytest.mark.parametrize("classes", [2, 7])
def test_the_calibration_error_is_that_of_torchmetrics(classes):
    metric = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, classes, generator=generator)
    labels = torch.randint(classes, (200,), generator=generator)
    wanted = metric(logits.softmax(1), labels, classes)
    assert calibration_error(logits, labels) == pytest.approx(wanted.item(), abs=1e-6)


def test_the_calibration_error_by_hand():
    """Sure and right, sure and wrong: one bin, 1/2 right, at a probability of 1."""
    logits = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    assert calibration_error(logits, torch.tensor([0, 1])) == pytest.approx(0.5)


def test_pixels_are_normalised_as_timm_does(tmp_path):
    item = read_data(write_classes(tmp_path)).tasks[0].train[0]
    transform = transform_of(nn.Conv2d(3, 2, 3), Training(), 24, training=False)
    image = training.open_image(item)
    wanted = create_transform(24, crop_pct=1.0, interpolation="bicubic")(image)
    assert torch.equal(transform(image), wanted)
    assert torch.equal(Images((item,), transform, 24)[0][0], wanted)


@pytest.mark.parametrize(("crop", "side"), [(1.0, 73), (0.8, 73), (0.08, 227)])
def test_small_crops_are_of_large_images(crop, side):
    """The smallest crop has as many pixels as the network sees: 64 of 227 are 0.08 of the area."""
    transform = transform_of(nn.Conv2d(3, 2, 3), Training(train_crop=crop), 64, training=True)
    assert Images((), transform, 64).side == side
