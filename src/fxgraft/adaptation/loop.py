"""Activation matching, ready to run: the two optimisers in turn, with progress, diagnostics and checkpoints.

The game of `fxgraft.GAM`: discriminators learn to tell the activations of a frozen source network from those
of the target network, and the target network learns to be mistaken for it (H. Huang, Q. Huang, P. Krähenbühl,
*Domain Transfer Through Deep Activation Matching*, ECCV 2018). A step computes both losses on the same weights
and then updates both sides, as in the authors' release.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from fxgraft.adaptation.checkpoint import Checkpoint
from fxgraft.adaptation.history import AdaptationHistory, Recorder
from fxgraft.adaptation.streams import Endless
from fxgraft.api import set_progress
from fxgraft.arguments import checked_device
from fxgraft.errors import ConfigError, WrappedModelError
from fxgraft.graph.grafting.graft_registry import registry_of
from fxgraft.graph.tracing.preserve import preserved_modes
from fxgraft.patches.gam.step import begin, discriminators, gam_losses, source
from fxgraft.patches.options import is_count, is_number, plain_number


def adapt(
    model: nn.Module,
    source_loader: Iterable[Any],
    target_loader: Iterable[Any],
    *,
    steps: int = 10_000,
    lr: float = 2e-4,
    betas: tuple[float, float] = (0.5, 0.999),
    optimizers: tuple[Optimizer, Optimizer] | None = None,
    schedule: Callable[[float], float] | None = None,
    device: str | torch.device | None = None,
    amp: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
    callback: Callable[[int, dict[str, float]], Any] | None = None,
    log_every: int = 50,
    name: str | None = None,
) -> AdaptationHistory:
    """Adapt a model patched with ``"gam"`` to images of another domain, in place; no label is read.

    A model in evaluation mode is trained in training mode, and every flag is put back afterwards; one in
    training mode is left as it is, with the parts that you froze.

    With a checkpoint file present, the run goes on from there and ends bit for bit where it would have ended
    without the interruption, on the same machine, device and number of threads: model, discriminators, both
    optimisers, torch's random state and the place in both loaders are restored. The loaders read their
    current epoch again up to that place. Draws of a data set from Python's or NumPy's generators repeat
    themselves only in a loader's workers, and not in persistent ones.

    Args:
        model: patched with ``"gam"``; the target network, usually a copy of the source network.
        source_loader: images the source network was trained on. A batch is a tensor (B, C, H, W), a tuple or
            list that starts with one, or a mapping with one; labels are left unread.
        target_loader: images of the domain to adapt to. Both loaders are cycled, whatever their lengths.
        steps: in all, with those of the checkpoint. The release makes 10 000 of batch 128 on digits.
        lr: learning rate of Adam, for both sides.
        betas: the two betas of Adam.
        optimizers: yours in their place: (discriminators, target network).
        schedule: a function from the share of the steps done, in [0, 1), to a factor on the learning rates.
        device: where to train; by default where the model is. The model and its source network are moved.
        amp: compute the losses under bfloat16 autocast.
        checkpoint: file to write to and go on from, or a folder, for ``adaptation.pt`` in it.
        checkpoint_every: steps between two checkpoints; one is written after the last step, too.
        progress: show a bar with losses and accuracies, on a terminal.
        callback: a function, called with (steps done, latest values by name) every `log_every` steps.
        log_every: steps between two looks at the losses. Only then does a GPU wait for the host.
        name: name of the graft, where there are several.

    Returns:
        Losses and accuracies of every step, those before the checkpoint included.

    Raises:
        UnknownGraftError: there is no ``"gam"`` on the model.
        WrappedModelError: the model is inside DistributedDataParallel or another wrapper.
        ConfigError: an argument is out of range, a loader is empty, the optimisers are not for the two sides,
            images aren't finite, or a loss stops being so (names the part). On a CPU such images are found before
            they are trained on; elsewhere at the next look at the losses, when weights are spoilt.
        RecipeError: the checkpoint is damaged, or of another patch, source network or architecture.

    Warns:
        FxgraftWarning: a discriminator was perfect, or at chance, for 200 steps: the game stands still there.
    """
    for option, value in {
        "steps": steps,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
    }.items():
        if not is_count(value):
            raise ConfigError(f"{option} must be a whole number of at least 1, got {value!r}.")
    players, frozen = discriminators(model, name), source(model, name)
    if registry_of(model) is None:
        raise WrappedModelError(
            f"adapt takes the patched model itself, not inside {type(model).__name__}.\n"
            "It would not see the patches of what is wrapped, nor average discriminators over processes.\n"
            "Pass the model (model.compile() compiles it in place), or write the loop with fxgraft.gam.gam_losses."
        )
    for option, function in {"schedule": schedule, "callback": callback}.items():
        if function is not None and not callable(function):
            raise ConfigError(f"{option} is a function, got {function!r}.")
    target_device = checked_device(device) if device is not None else next(model.parameters()).device
    for network in (model, players, frozen):
        network.to(target_device)
    pair = _optimizers(model, players, optimizers, lr, betas)
    chance = torch.get_rng_state()
    saved = None
    try:
        streams = Endless(source_loader, "source"), Endless(target_loader, "target")
        history = AdaptationHistory()
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, model, players, frozen, pair, streams)
        done = 0 if saved is None else saved.resume(history, steps)
    except BaseException:
        torch.set_rng_state(chance)  # a run that does not start has drawn nothing
        raise
    begin(model, name)
    recorder = Recorder(history, done)
    with preserved_modes(model), _bar(progress, steps, done) as bar:
        if not model.training:
            model.train()
        for step in range(done, steps):
            set_progress(model, step / steps)
            if schedule is not None:
                _scale_rates(pair, _factor(schedule, step / steps))
            images = [stream.next().to(target_device, non_blocking=True) for stream in streams]
            if target_device.type == "cpu":  # elsewhere the host would have to wait for the answer
                _check_finite(images, step)
            with _autocast(target_device, amp):
                game = gam_losses(model, *images, name=name)
            _update(game, pair)
            recorder.add(game)
            count = step + 1
            write = saved is not None and (count % checkpoint_every == 0 or count == steps)
            if write or count % log_every == 0 or count == steps:
                values = recorder.read()
                bar(count, values)
                if callback is not None and (count % log_every == 0 or count == steps):
                    callback(count, values)
            if saved is not None and write:
                saved.write(count, history)
    set_progress(model, 1.0)
    return history


def _check_finite(images: list[torch.Tensor], step: int) -> None:
    for domain, batch in zip(("source", "target"), images, strict=True):
        if not batch.isfinite().all():
            raise ConfigError(
                f"Images of the {domain} loader hold NaN or infinity, in step {step + 1}.\n"
                f"One such value would spoil all weights; the model is as after {step} steps.\n"
                "Look for what the data set or its transforms make of the images."
            )


def _update(game: Any, pair: tuple[Optimizer, Optimizer]) -> None:
    """Update both sides from losses of the same weights: gradients of both first, then both steps."""
    for optimizer in pair:
        optimizer.zero_grad()
    game.mapping.backward()
    pair[0].zero_grad()  # whatever the mapping loss left on the discriminators is not theirs to follow
    game.discriminator.backward()
    for optimizer in pair:
        optimizer.step()


def _optimizers(
    model: nn.Module,
    players: nn.Module,
    given: tuple[Optimizer, Optimizer] | None,
    lr: float,
    betas: tuple[float, float],
) -> tuple[Optimizer, Optimizer]:
    """Make the pair, or check the user's."""
    judging = {id(p) for p in players.parameters()}
    mapping = [p for p in model.parameters() if p.requires_grad and id(p) not in judging]
    if not mapping:
        raise ConfigError(
            f"Every parameter of this {model._get_name()} is frozen, and nothing can be adapted.\n"
            "Set requires_grad on those to train."
        )
    if given is None:
        if not is_number(lr) or not 0 < lr < math.inf:
            raise ConfigError(f"lr must be a number above 0, got {lr!r}.")
        if not isinstance(betas, (tuple, list)) or not all(is_number(b) and 0 <= b < 1 for b in betas):
            raise ConfigError(f"betas are two numbers in [0, 1), those of Adam; got {betas!r}.")
        return torch.optim.Adam(players.parameters(), lr, betas), torch.optim.Adam(mapping, lr, betas)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ConfigError(
            "The two sides have an optimiser each.\nPass optimizers=(discriminators, target network)."
        )
    if not all(isinstance(optimizer, Optimizer) for optimizer in given):
        raise ConfigError(f"optimizers= takes two of torch.optim, got {given!r:.80}.")
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in given]
    if not held[0] <= judging or held[1] & judging:
        raise ConfigError(
            "The first optimiser is for the discriminators alone, the second for the target network without them.\n"
            "Here a side would follow the loss of the other.\n"
            "Build them from fxgraft.patches.gam.discriminators(model).parameters() and from the rest of "
            "model.parameters()."
        )
    if not held[1] & {id(p) for p in mapping}:
        raise ConfigError(
            "The second optimiser holds no parameter of this model, and nothing would be adapted.\n"
            "Build it from model.parameters(), of the model that is adapted, without the discriminators'."
        )
    return given[0], given[1]


def _factor(schedule: Callable[[float], float], share: float) -> float:
    factor = plain_number(schedule(share))
    if not is_number(factor) or not 0 <= factor < math.inf:
        raise ConfigError(
            f"schedule({share:.3f}) returned {factor!r}, and rates are multiplied with a number from 0 on."
        )
    return factor


def _scale_rates(pair: tuple[Optimizer, Optimizer], factor: float) -> None:
    for optimizer in pair:
        for group in optimizer.param_groups:
            # The name that torch's own schedulers use; it travels in the optimiser's state.
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def _autocast(device: torch.device, amp: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()


@contextmanager
def _bar(wanted: bool, steps: int, done: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Show progress on a terminal; hand out what moves it."""
    if not wanted or not sys.stderr.isatty():
        yield lambda count, values: None
        return
    from rich.console import Console

    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=steps, completed=done)

        def move(count: int, values: Mapping[str, float]) -> None:
            losses = (f"{name} {values[name]:.3f}" for name in ("discriminator", "mapping"))
            taps = (
                f"{n.partition('.')[2]} {100 * v:.0f} %" for n, v in values.items() if n[:9] == "accuracy."
            )
            shown.update(task, completed=count, description=", ".join((*losses, *taps)))

        yield move
