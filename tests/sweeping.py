"""Parameters of a test of which a few are tried in every run, and the rest in the sweep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], first: int) -> list[Any]:
    """Mark all values but the first few for the sweep."""
    return [
        value if index < first else pytest.param(value, marks=pytest.mark.sweep)
        for index, value in enumerate(values)
    ]
