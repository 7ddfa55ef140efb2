"""Reader for the reference numbers in ``tests/golden``: what the authors' own code gave on fixed inputs.

A file holds cases; a case holds named inputs, the random draws the reference made (to be fed, not redrawn),
the outputs of a float64 run and, for the smaller ones, of a float32 run, and the settings of the call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

# Longest first: "f32_out_" must not be read as a name that happens to contain "out_".
_PREFIXES = {"f32_out_": "f32_outputs", "draw_": "draws", "out_": "outputs", "in_": "inputs"}


@dataclass(frozen=True)
class GoldenCase:
    """One call of the reference. Tensors are shared between tests: clone before writing to one."""

    name: str
    settings: Mapping[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    draws: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    f32_outputs: dict[str, Tensor] = field(default_factory=dict)

    def inputs_as(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh copies of the inputs, the floating-point ones in `dtype`."""
        return {
            name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in self.inputs.items()
        }

    def expected(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """An output: from the float32 run if that is asked for and stored, else from the float64 run."""
        if dtype == torch.float32 and name in self.f32_outputs:
            return self.f32_outputs[name]
        return self.outputs[name]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class GoldenFile:
    """The cases of one file, in the order of the file; iterates over them."""

    name: str
    cases: Mapping[str, GoldenCase]

    def __getitem__(self, case: str) -> GoldenCase:
        return self.cases[case]

    def __iter__(self) -> Iterator[GoldenCase]:
        return iter(self.cases.values())

    def __len__(self) -> int:
        return len(self.cases)


@cache
def load_golden(name: str) -> GoldenFile:
    """Read ``tests/golden/<name>.npz``."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        cases = {case: GoldenCase(case, meta) for case, meta in json.loads(str(archive["__meta__"])).items()}
        for key in archive.files:
            if key == "__meta__":
                continue
            case, array = key.split(".", 1)
            prefix = next(p for p in _PREFIXES if array.startswith(p))
            group = getattr(cases[case], _PREFIXES[prefix])
            group[array.removeprefix(prefix)] = torch.from_numpy(archive[key])
    return GoldenFile(name, cases)
