"""Training that goes on after an interruption, to the same weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxgraft.errors import ConfigError
from fxgraft.io.atomic_write import write_files


def keep(
    file: Path,
    parts: Mapping[str, Any],
    generator: torch.Generator,
    device: torch.device,
    extra: Mapping[str, Any],
) -> None:
    """Write where a run stands, whole or not at all.

    Args:
        file: what to write; its folder is made if need be.
        parts: what has a ``state_dict()``, by name.
        generator: of the batches; its state and those of torch's global generators are kept.
        device: the one that trains.
        extra: plain values that `resume` gives back.
    """
    state = {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "order": generator.get_state(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "extra": dict(extra),
    }
    write_files(file.parent, {file.name: lambda target: torch.save(state, target)})


def resume(
    file: Path, parts: Mapping[str, Any], generator: torch.Generator, device: torch.device
) -> dict[str, Any]:
    """Put everything back to where `keep` wrote it; return the plain values.

    Raises:
        ConfigError: if the file cannot be read, or is of a run with another model or optimiser.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        generator.set_state(state["order"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"Cannot go on from {file}: {error}\nIt is damaged or of another run. Delete it to start anew."
        ) from error
    torch.set_rng_state(state["random"])
    if device.type == "cuda" and state["random_cuda"] is not None:
        torch.cuda.set_rng_state(state["random_cuda"], device)
    return state["extra"]
