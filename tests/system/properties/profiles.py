"""How many random examples a property is tried on: few in every test run, many in the sweep.

The environment variable FXGRAFT_EXAMPLES, a number, says how many the sweep tries for each property.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

QUIET: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "phases": [Phase.generate, Phase.shrink],
}


def profiles(few: int, many: int, *strategies: Any) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """Make a test of a property of what the strategies draw."""

    def parametrize(test: Callable[..., None]) -> Callable[[int], None]:
        def run(examples: int) -> None:
            settings(max_examples=examples, **QUIET)(given(*strategies)(test))()

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        sweep = pytest.param(
            int(os.environ.get("FXGRAFT_EXAMPLES", many)), marks=pytest.mark.sweep, id="many"
        )
        return pytest.mark.parametrize("examples", [pytest.param(few, id="few"), sweep])(run)

    return parametrize
