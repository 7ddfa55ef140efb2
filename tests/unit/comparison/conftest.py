"""A comparison of a few steps."""

from __future__ import annotations

import pytest

import fxgraft
from unit.comparison.images import write_domains
from unit.comparison.small import Small


@pytest.fixture
def data(tmp_path):
    return write_domains(tmp_path / "data")


@pytest.fixture
def run(data, tmp_path):
    """`fxgraft.compare` on small data, in this process."""
    options = {
        "model": Small,
        "grafts": "rsc",
        "hold_out": "red",
        "seeds": 2,
        "size": 16,
        "training": {"epochs": 1, "batch_size": 8},
        "workers": 1,
        "out": tmp_path / "out",
    }
    return lambda **changes: fxgraft.compare(**{"data": data, **options, **changes})
