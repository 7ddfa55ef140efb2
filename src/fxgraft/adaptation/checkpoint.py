"""Checkpoints of an adaptation: everything that decides its next step, in one file of plain tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxgraft.adaptation.streams import Endless
from fxgraft.api import grafts
from fxgraft.errors import ConfigError, RecipeError
from fxgraft.files import Header, write_files
from fxgraft.graph.grafting.state import state_of

HEADER = Header(
    "fxgraft-adaptation",
    1,
    what="checkpoint of fxgraft.adapt",
    instead="Name another file, or a folder.",
    upgrade="Go on with the release that wrote it, or start a new run.",
)
FILE = "adaptation.pt"

_DIFFERENCES = {
    "architecture": "another architecture (class, or names and shapes of its tensors)",
    "patches": "other patches, or the same with other options",
    "source": "another source network",
    "discriminators": "other discriminators",
    "optimizers": "other optimisers",
}


class Checkpoint:
    """The file of a run, and what goes into it.

    Args:
        path: the file, or a folder (one that exists, or a name without a suffix).
        model: the target network, patched.
        players: the discriminators.
        frozen: the source network.
        pair: the optimisers.
        streams: the loaders.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        players: nn.Module,
        frozen: nn.Module,
        pair: tuple[Optimizer, Optimizer],
        streams: tuple[Endless, Endless],
    ) -> None:
        given = Path(path)
        self.path = given / FILE if given.is_dir() or not given.suffix else given
        self.model, self.players, self.pair, self.streams = model, players, pair, streams
        self.device = next(model.parameters()).device
        if {id(g) for g in streams[0].generators} & {id(g) for g in streams[1].generators}:
            raise ConfigError(
                "Both loaders draw from one torch.Generator, so neither's place can be found again.\n"
                "Give each loader a generator of its own, or none."
            )
        self.identity = {
            "architecture": _digest(_shapes(model), _class_name(model)),
            "patches": _digest(_settings(model)),
            "source": _digest(_contents(frozen)),
            "discriminators": _digest(_shapes(players)),
            "optimizers": _digest(
                f"{type(each).__name__} {[len(group['params']) for group in each.param_groups]}"
                for each in pair
            ),
        }

    def write(self, step: int, history: Any) -> None:
        """Write the file in one move, so that an interruption leaves the old one or the new one."""
        cuda = self.device.type == "cuda"
        content = {
            **HEADER.entries(),
            "identity": self.identity,
            "step": step,
            "model": self.model.state_dict(),
            "discriminators": self.players.state_dict(),
            "optimizers": [each.state_dict() for each in self.pair],
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
            "streams": [stream.state() for stream in self.streams],
            "history": dataclasses.asdict(history),
        }
        write_files(self.path.parent, {self.path.name: lambda file: torch.save(content, file)})

    def resume(self, history: Any, steps: int) -> int:
        """Go on from the file, if there is one; return how many steps are done.

        Raises:
            RecipeError: the file is damaged, or of another run. Model and optimisers are then as they were.
            ConfigError: it is further than ``steps``.
        """
        if not self.path.exists():
            return 0
        content = self._read()
        differing = [
            text for key, text in _DIFFERENCES.items() if content["identity"].get(key) != self.identity[key]
        ]
        if differing:
            raise RecipeError(
                f"The checkpoint {str(self.path)!r} belongs to another run: it is of {'; of '.join(differing)}.\n"
                "To go on from it would mix the two.\n"
                "Build model, source and optimisers as they were then, or name another checkpoint."
            )
        if content["step"] > steps:
            raise ConfigError(
                f"The checkpoint {str(self.path)!r} has made {content['step']} steps, more than steps={steps}.\n"
                "Steps count from the start of the run.\nAsk for more, or name another checkpoint."
            )
        for stream, state in zip(self.streams, content["streams"], strict=True):
            stream.resume(state)
        self.model.load_state_dict(content["model"])
        self.players.load_state_dict(content["discriminators"])
        for optimizer, state in zip(self.pair, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name, values in content["history"].items():
            setattr(history, name, values)
        # Last, since whatever ran above may have drawn.
        torch.set_rng_state(content["random"]["cpu"])
        if self.device.type == "cuda" and content["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["random"]["cuda"], self.device)
        return content["step"]

    def _read(self) -> dict[str, Any]:
        try:
            # On the CPU: random states stay there, and load_state_dict moves the rest.
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise RecipeError(
                f"The checkpoint {str(self.path)!r} cannot be read: {error}\n"
                "It is damaged, cut short, or no checkpoint.\nName another one, or remove it to start anew."
            ) from error
        HEADER.check(content, self.path)
        return content


def _digest(lines: Iterable[Any], *more: str) -> str:
    found = hashlib.sha256()
    for line in (*more, *lines):
        found.update(line if isinstance(line, bytes) else f"{line}\n".encode())
    return found.hexdigest()


def _class_name(model: nn.Module) -> str:
    state = state_of(model)
    return (state.base if state is not None else type(model)).__name__


def _shapes(module: nn.Module) -> list[str]:
    return [f"{key} {tuple(value.shape)}" for key, value in module.state_dict().items()]


def _contents(module: nn.Module) -> list[Any]:
    """Names and bytes of all tensors."""
    lines: list[Any] = _shapes(module)
    for value in module.state_dict().values():
        flat = value.detach().cpu().contiguous().reshape(-1)
        lines.append(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return lines


def _settings(model: nn.Module) -> list[str]:
    """Names and options of the grafts; networks and functions among the options are told by their names."""
    lines = []
    for graft in grafts(model):
        options = {
            f.name: _plain(getattr(graft.patch, f.name)) for f in dataclasses.fields(graft.patch) if f.init
        }
        lines.append(f"{graft.name} {graft.patch.method} {sorted(options.items())}")
    return lines


def _plain(value: Any) -> str:
    """Show an option without what differs from process to process."""
    if isinstance(value, Mapping):
        return str([(str(key), _plain(each)) for key, each in value.items()])
    if isinstance(value, (tuple, list)):
        return str([_plain(each) for each in value])
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    return getattr(value, "__qualname__", None) or repr(value)
