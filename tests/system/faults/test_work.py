"""An exception at any line of what works with a patched model: save, load, merge, a pass, the loss, an adaptation.

The model, the files and the random state are then as before or as after, and the same call works.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.graph.runtime import published_labels
from fxgraft.patches.gam import step as gam
from models.toys import LABELS, images, net
from system.contract.cases import same
from system.faults.lines import SIZE, Lines, bare, distinct, nothing_else_changes
from unit.adaptation.adapting import adam, everything, network, with_generators

KINDS = (KeyboardInterrupt, MemoryError, OSError)
World = dict[str, Any]


@dataclass(frozen=True)
class Act:
    """What is interrupted.

    Attributes:
        world: makes what it starts from, in a folder of its own.
        do: the act.
        seen: all that has to be as before or as after.
        draws: whether the act draws from the random state of the process.
        again: what the same call gives after an interruption; compared with a straight one.
    """

    world: Callable[[Path], World]
    do: Callable[[World], Any]
    seen: Callable[[World], Any]
    draws: bool = False
    again: Callable[[World], Any] | None = None


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*"))}


def shape(model: nn.Module) -> Any:
    """A model as values: what two models that were made alike have in common."""
    return {
        "classes": [(name, type(m).__name__, m.training) for name, m in model.named_modules()],
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "gradients": [p.requires_grad for p in model.parameters()],
        "grafts": [graft.name for graft in fxgraft.grafts(model)],
    }


def several(training: bool = False) -> nn.Module:
    model = bare()
    fxgraft.patch(model, "rsc", layer="stage2", batch_share=1.0, input_size=SIZE)
    fxgraft.patch(model, "crossnorm", p=1.0, active=None, input_size=SIZE)
    return fxgraft.patch(model, "selfnorm", input_size=SIZE).train(training)


def saving(folder: Path) -> World:
    fxgraft.save(fxgraft.patch(net(), "rsc", layer="stage1", input_size=SIZE), folder)
    return {"model": several(), "folder": folder}


def loading(folder: Path) -> World:
    fxgraft.save(several(), folder)
    model = bare()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return {"model": model, "folder": folder}


def merging(folder: Path) -> World:
    model = fxgraft.patch(bare(), "mixmo", members=2, init="random", input_size=SIZE)
    return {"model": fxgraft.patch(model, "rsc", layer="stage2", input_size=SIZE)}


def passed(world: World) -> Any:
    """A seeded pass with its gradients; statistics are put back."""
    model = world["model"]
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    model.zero_grad()
    out = model(images(), target=LABELS)
    fxgraft.loss(model, out, LABELS).backward()
    for name, buffer in model.named_buffers():
        buffer.detach().copy_(kept[name])
    return out.detach(), [p.grad.clone() for p in model.parameters()]


def passing(folder: Path) -> World:
    return {"model": several(training=True)}


def without_statistics(world: World) -> Any:
    now = shape(world["model"])
    own = dict(world["model"].named_parameters())
    now["tensors"] = {key: value for key, value in now["tensors"].items() if key in own}
    context = world["model"]._fxgraft.context
    return now, context.current, dict(context.asked)


def reading(folder: Path) -> World:
    world = passing(folder)
    world["batches"] = iter(fxgraft.with_targets(itertools.repeat((images(), LABELS)), model=world["model"]))
    world["x"], _ = next(world["batches"])
    return world


def read(world: World) -> Tensor:
    torch.manual_seed(3)
    return world["model"](world["x"]).detach()


def served(world: World) -> Any:
    """The state of the model, and whether the labels of the batch have served their pass."""
    (source,) = [each for each in published_labels._published.get() if each.serves(world["model"])]
    return without_statistics(world), source.known[-1].used


def losing(folder: Path) -> World:
    model = fxgraft.patch(bare(), "diversification", patch=1, p_peak=1.0, input_size=SIZE).train()
    fxgraft.patch(model, "manifold_mixup", layers="stage1", input_size=SIZE)
    torch.manual_seed(3)
    return {"model": model, "out": model(images(), target=LABELS)}


def lost(world: World) -> Tensor:
    return fxgraft.loss(world["model"], world["out"], LABELS).detach()


def starting(folder: Path) -> World:
    model = network()
    return {"model": model, "pair": adam(model), "loaders": with_generators(), "folder": folder}


def adapting(folder: Path) -> World:
    adapted(starting(folder), 2)
    return starting(folder)


def adapted(world: World, steps: int) -> Any:
    return fxgraft.adapt(
        world["model"],
        *world["loaders"],
        steps=steps,
        optimizers=world["pair"],
        checkpoint=world["folder"],
        checkpoint_every=1,
    )


def resumed(world: World) -> Any:
    """All that going on from a checkpoint writes to."""
    held = everything(world["model"], world["pair"])
    generators = [loader.generator.get_state() for loader in world["loaders"]]
    return held, generators, contents(world["folder"])


def finished(world: World) -> Any:
    """Go on with what the file holds, as another process would."""
    other = starting(world["folder"])
    adapted(other, 4)
    assert [file.name for file in world["folder"].iterdir()] == ["adaptation.pt"]
    return everything(other["model"], other["pair"])


ACTS = {
    "save": Act(
        saving,
        do=lambda w: fxgraft.save(w["model"], w["folder"]),
        seen=lambda w: (contents(w["folder"]), shape(w["model"])),
    ),
    "first save": Act(
        lambda folder: {"model": several(), "folder": folder / "new"},
        do=lambda w: fxgraft.save(w["model"], w["folder"], weights=False),
        seen=lambda w: (contents(w["folder"]), shape(w["model"])),
    ),
    "load": Act(
        loading, do=lambda w: fxgraft.load(w["model"], w["folder"]), seen=lambda w: shape(w["model"])
    ),
    "merge": Act(
        merging,
        do=lambda w: fxgraft.merge(w["model"]),
        seen=lambda w: shape(w["model"]),
        again=lambda w: shape(fxgraft.merge(w["model"])),
    ),
    "pass": Act(passing, do=passed, seen=without_statistics, draws=True, again=passed),
    "pass of a loader": Act(reading, do=read, seen=served, draws=True),
    "loss": Act(losing, do=lost, seen=lambda w: (shape(w["model"]), w["out"].detach()), again=lost),
    "resume": Act(adapting, do=lambda w: adapted(w, 2), seen=resumed, draws=True),
}


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[], Path]:
    number = itertools.count()

    def folder() -> Path:
        made = tmp_path / str(next(number))
        made.mkdir()
        return made

    return folder


def made(act: Act, folder: Path) -> World:
    torch.manual_seed(0)
    return act.world(folder)


def places(act: Act, folders: Callable[[], Path]) -> list[tuple[str, int]]:
    act.do(made(act, folders()))  # what is found once and remembered is remembered
    world = made(act, folders())
    with Lines() as lines:
        act.do(world)
    return lines.places


def interrupted(act: Act, world: World, at: int, kind: type[BaseException]) -> None:
    """Raise at one line of an act, however it takes it."""
    chance = torch.get_rng_state()
    with nothing_else_changes(draws=act.draws):
        try:
            with Lines(at, kind("injected")):
                act.do(world)
        except kind:
            pass
        except fxgraft.FxgraftError:  # what a call makes of a failure in its middle
            assert issubclass(kind, Exception)
    torch.set_rng_state(chance)


def chosen() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A few interruptions of one kind each in every run, many of all kinds in the sweep."""
    cells = []
    for index, name in enumerate((*ACTS, "adapt")):
        if name in ("save", "load", "pass", "adapt"):
            cells.append(pytest.param(name, KINDS[index % 3], 2, id=f"{name}-few"))
        for kind in KINDS:
            many = pytest.param(name, kind, 4, id=f"{name}-{kind.__name__}", marks=pytest.mark.sweep)
            cells.append(many)
    return pytest.mark.parametrize(("name", "kind", "count"), cells)


# What is raised in a finaliser goes nowhere: Python reports it and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@chosen()
def test_an_interruption(
    name: str, kind: type[BaseException], count: int, folders: Callable[[], Path]
) -> None:
    if name == "adapt":
        interrupt_an_adaptation(kind, count, folders)
        return
    act = ACTS[name]
    lines = places(act, folders)
    world = made(act, folders())
    before = act.seen(world)
    act.do(world)
    after = act.seen(world)
    wanted = act.again(made(act, folders())) if act.again is not None else None
    world = made(act, folders())
    for at in distinct(lines, count, f"{name} {kind.__name__}"):
        interrupted(act, world, at, kind)
        now = act.seen(world)
        assert same(now, before) or same(now, after), lines[at]
        if act.again is not None:
            assert same(act.again(world), wanted), lines[at]
        if not same(act.seen(world), before):
            world = made(act, folders())
    act.do(world)  # after all these interruptions
    assert same(act.seen(world), after)


def interrupt_an_adaptation(kind: type[BaseException], count: int, folders: Callable[[], Path]) -> None:
    """It leaves a whole checkpoint and the modes as they were, and ends bit for bit where a straight one does."""
    act = Act(adapting, do=lambda w: adapted(w, 4), seen=resumed, draws=True)
    wanted = finished(made(act, folders()))
    lines = places(act, folders)
    for at in distinct(lines, count, f"adapt {kind.__name__}"):
        world = made(act, folders())
        modes = [module.training for module in world["model"].modules()]
        interrupted(act, world, at, kind)
        assert [module.training for module in world["model"].modules()] == modes
        assert gam.discriminators(world["model"]).training
        assert same(finished(world), wanted), lines[at]
