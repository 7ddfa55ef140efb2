"""Checkpoints of an adaptation: everything that decides its next step, in one file of plain tensors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxgraft.adaptation.streams import Endless
from fxgraft.api import grafts
from fxgraft.arguments import path_at
from fxgraft.errors import ConfigError, RecipeError
from fxgraft.graph.atomic import Step, apply_atomically, refilling
from fxgraft.graph.grafting.state import state_of
from fxgraft.io.atomic_write import clear_drafts, write_file
from fxgraft.io.header import Header
from fxgraft.io.recipe import content_digest

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


def _of_group(group: Mapping[str, Any]) -> list[Any]:
    """Return what a run that goes on must have given: the state that is loaded has the values of the first call."""
    named = [group[name] for name in ("betas", "momentum", "weight_decay") if name in group]
    return [len(group["params"]), group.get("initial_lr", group["lr"]), *named]


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
        target = path_at(path)
        self.path = target / FILE if target.is_dir() or not target.suffix else target
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
                f"{type(optimizer).__name__} {[_of_group(group) for group in optimizer.param_groups]}"
                for optimizer in pair
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
            "optimizers": [optimizer.state_dict() for optimizer in self.pair],
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            },
            "streams": [stream.state() for stream in self.streams],
            "history": dataclasses.asdict(history),
        }
        content["sha256"] = content_digest(content)

        def write_content(file: Path) -> None:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # the writer's own class, for errors of the system
                raise OSError(
                    f"The checkpoint {str(self.path)!r} cannot be written: {error}\n"
                    "The disk is full, perhaps, or the folder cannot be written to.\n"
                    "The last checkpoint is as it was, and the run can go on from there."
                ) from error

        write_file(self.path, write_content)

    def resume(self, history: Any, steps: int) -> int:
        """Go on from the file, if there is one; return how many steps are done.

        Raises:
            RecipeError: the file is damaged, or of another run. Model and optimisers are then as they were.
            ConfigError: it is further than ``steps``.
        """
        if not self.path.exists():
            return 0
        clear_drafts(self.path)  # of a run that was killed after its last step, too
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
        self._check(content, history)
        undo = self._as_now(history)
        try:
            for stream, state in zip(self.streams, content["streams"], strict=True):
                stream.resume(state)
            self._take_up(content, history)
            return content["step"]
        except BaseException:
            apply_atomically(undo)
            raise

    def _take_up(self, content: dict[str, Any], history: Any) -> None:
        try:
            self.model.load_state_dict(content["model"])
            self.players.load_state_dict(content["discriminators"])
            for optimizer, state in zip(self.pair, content["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise self._damaged(f"what it holds cannot be taken up ({error})") from error
        for name, values in content["history"].items():
            setattr(history, name, values)
        # Last: the code above may have drawn random numbers.
        torch.set_rng_state(content["random"]["cpu"])
        if self.device.type == "cuda" and content["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["random"]["cuda"], self.device)

    def _as_now(self, history: Any) -> list[Step]:
        """Return the steps that put back all that going on from a checkpoint writes to."""
        held = [*self.model.state_dict().values(), *self.players.state_dict().values()]
        return [
            *(partial(v.detach().copy_, v.detach().clone()) for v in held if isinstance(v, Tensor)),
            # An optimiser loads into new dictionaries, so the old ones are as they were.
            *(partial(optimizer.__dict__.update, dict(optimizer.__dict__)) for optimizer in self.pair),
            *(step for stream in self.streams for step in stream.restoring()),
            *refilling(history.__dict__),
            partial(torch.set_rng_state, torch.get_rng_state()),
        ]

    def _read(self) -> dict[str, Any]:
        try:
            # On the CPU: random states stay there, and load_state_dict moves the rest.
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive can raise nearly anything
            raise RecipeError(
                f"The checkpoint {str(self.path)!r} cannot be read: {error}\n"
                "It is damaged, cut short, or no checkpoint.\nName another one, or remove it to start again."
            ) from error
        HEADER.check(content, self.path)
        kinds = {
            "identity": dict,
            "step": int,
            "random": dict,
            "history": dict,
            "streams": list,
            "optimizers": list,
        }
        for key, kind in {**kinds, "model": dict, "discriminators": dict}.items():
            if not isinstance(content.get(key), kind):
                raise self._damaged(f"{key!r} is missing or of the wrong kind")
        if content.pop("sha256", None) != content_digest(content):
            raise self._damaged("its digest is missing, or that of another content")
        return content

    def _check(self, content: dict[str, Any], history: Any) -> None:
        """Raise for anything in the file that doesn't fit, before any of it is loaded."""
        for name, module in (("model", self.model), ("discriminators", self.players)):
            own, kept = module.state_dict(), content[name]
            differing = [
                key
                for key in {**own, **kept}
                if key not in own
                or not isinstance(kept.get(key), Tensor)
                or (kept[key].shape, kept[key].dtype) != (own[key].shape, own[key].dtype)
            ]
            if differing:
                raise self._damaged(
                    f"the tensor {differing[0]!r} of {name!r} is missing or of another shape or dtype"
                )
        if content["step"] < 0 or len(content["streams"]) != 2 or len(content["optimizers"]) != 2:
            raise self._damaged("it does not hold two sides of a run")
        for optimizer, state in zip(self.pair, content["optimizers"], strict=True):
            if not _is_like(state, optimizer.state_dict()):
                raise self._damaged("the state of an optimiser is not whole")
        if not all(map(_is_place, content["streams"])):
            raise self._damaged("the place in a loader is not whole")
        if not _is_random_state(content["random"].get("cpu")):
            raise self._damaged("the random state is none")
        if set(content["history"]) != {field.name for field in dataclasses.fields(history)} or not all(
            _is_history(values, content["step"]) for values in content["history"].values()
        ):
            raise self._damaged("the history of losses is not whole")

    def _damaged(self, what: str) -> RecipeError:
        return RecipeError(
            f"The checkpoint {str(self.path)!r} is damaged: {what}.\nName another one, or remove it to start again."
        )


def _is_like(state: Any, own: dict[str, Any]) -> bool:
    """Say whether the state of an optimiser fits one: the same groups of parameters, and settings of their kinds."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return False
    groups = state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        return False
    return all(
        isinstance(group, dict)
        and group.get("params") == mine["params"]
        and all(key in group and _is_kin(group[key], value) for key, value in mine.items())
        for group, mine in zip(groups, own["param_groups"], strict=True)
    ) and all(
        isinstance(values, dict) and all(map(_is_slot, values.values())) for values in state["state"].values()
    )


def _is_slot(value: Any) -> bool:
    """Say whether a value can be state that an optimiser keeps for a parameter: tensors, numbers, or lists of them."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_slot, value))
    return value is None or isinstance(value, (Tensor, int, float))


def _is_kin(value: Any, own: Any) -> bool:
    numbers = (int, float)
    return own is None or isinstance(value, numbers if isinstance(own, numbers) else type(own))


def _is_random_state(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _is_place(state: Any) -> bool:
    """Say whether something is what `Endless.state` returns."""
    if not isinstance(state, dict) or not isinstance(state.get("start"), dict):
        return False
    numbers = [state.get(key) for key in ("epoch", "taken", "largest")]
    if not all(type(n) is int and n >= low for n, low in zip(numbers, (-1, 0, 0), strict=True)):
        return False
    generators = state["start"].get("generators")
    return _is_random_state(state["start"].get("random")) and isinstance(generators, list)


def _is_history(values: Any, steps: int) -> bool:
    return isinstance(values, dict) and all(
        isinstance(value, list) and len(value) <= steps and all(isinstance(v, float) for v in value)
        for value in values.values()
    )


def _digest(lines: Iterable[Any], *more: str) -> str:
    digest = hashlib.sha256()
    for line in (*more, *lines):
        digest.update(line if isinstance(line, bytes) else f"{line}\n".encode())
    return digest.hexdigest()


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
    """Names and options of the grafts; networks and functions among the options are known by their names."""
    lines = []
    for graft in grafts(model):
        options = {
            f.name: _plain(getattr(graft.patch, f.name)) for f in dataclasses.fields(graft.patch) if f.init
        }
        lines.append(f"{graft.name} {graft.patch.method} {sorted(options.items())}")
    return lines


def _plain(value: Any) -> str:
    """Write an option as a text that is the same in every process."""
    if isinstance(value, Mapping):
        return str([(str(key), _plain(item)) for key, item in value.items()])
    if isinstance(value, (tuple, list)):
        return str([_plain(item) for item in value])
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    return getattr(value, "__qualname__", None) or repr(value)
