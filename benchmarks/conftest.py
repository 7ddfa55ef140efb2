"""What pytest-benchmark writes of `benchmarks/micro.py`: the environment as other results have it, no raw timings."""

from __future__ import annotations

from typing import Any

import pytest

from fxgraft.environment import environment

KEPT = ("min", "median", "iqr", "rounds", "iterations")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep what is to be read and compared."""
    benchmarks = [
        {
            "group": each["group"],
            "name": each["param"] or each["name"],
            "seconds": {key: each["stats"][key] for key in KEPT},
        }
        for each in output_json["benchmarks"]
    ]
    output_json.clear()
    output_json.update({"environment": environment("cpu"), "benchmarks": benchmarks})
