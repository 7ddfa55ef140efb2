"""Domains drawn from the embedded digits."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fxgraft.comparison import demo_data as drawing
from fxgraft.comparison.demo_data import DIGIT_DOMAINS, digits_domains, write_digits
from fxgraft.errors import ConfigError


@pytest.fixture(scope="module")
def digits():
    return digits_domains(16)


def test_four_balanced_domains(digits):
    assert tuple(digits) == DIGIT_DOMAINS
    assert sum(len(labels) for _, labels in digits.values()) == 1797
    for images, labels in digits.values():
        assert images.shape == (len(labels), 3, 16, 16)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        counts = torch.bincount(labels, minlength=10)
        assert counts.min() >= 43
        assert counts.max() <= 46


def test_domains_share_no_image(monkeypatch):
    # With styles that draw nothing, the domains together are the source, each image once.
    monkeypatch.setattr(drawing, "_STYLES", dict.fromkeys(DIGIT_DOMAINS, lambda ink, generator: ink))
    images = torch.cat([images for images, _ in digits_domains(16).values()]).flatten(1)
    assert len(images) == 1797
    assert len(images.unique(dim=0)) == 1797


def test_domains_differ_in_style(digits):
    plain, inverted, thick, sketch = (images.float() / 255 for images, _ in digits.values())
    assert plain.mean() < 0.35
    assert inverted.mean() > 0.5
    assert sketch.mean() > 0.6
    assert (thick.amax(1) - thick.amin(1)).mean() > 2 * (plain.amax(1) - plain.amin(1)).mean()


def test_equal_seeds_draw_the_same_and_leave_the_generator_alone(digits):
    before = torch.get_rng_state()
    again, other = digits_domains(16), digits_domains(16, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name, (images, labels) in digits.items():
        assert torch.equal(images, again[name][0])
        assert torch.equal(labels, again[name][1])
        assert images.shape != other[name][0].shape or not torch.equal(images, other[name][0])


def test_a_size_and_a_package_that_are_missing(monkeypatch):
    with pytest.raises(ConfigError, match="size must be at least 16"):
        digits_domains(8)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "fxgraft\[demo\]"'):
        digits_domains(16)


def test_digits_as_files(digits, tmp_path):
    folder = write_digits(tmp_path / "digits", 16)
    assert {each.name for each in tmp_path.iterdir()} == {"digits"}
    images, labels = digits["sketch"]
    files = sorted((folder / "sketch").rglob("*.png"), key=lambda each: each.name)
    assert [int(each.parent.name) for each in files] == labels.tolist()
    with Image.open(files[7]) as image:
        assert np.array_equal(np.asarray(image), images[7].permute(1, 2, 0).numpy())
    files[0].unlink()
    write_digits(folder, 16)  # a folder that is there is taken as it is
    assert not files[0].exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot write the digits"):
        write_digits(tmp_path / "file" / "digits", 16)
