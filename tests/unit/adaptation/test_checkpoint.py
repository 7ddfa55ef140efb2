"""An interrupted adaptation ends bit for bit where a straight one does, and mixes with no other run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fxgraft
from fxgraft.errors import ConfigError, RecipeError
from fxgraft.io.recipe import content_digest
from unit.adaptation.adapting import SOURCE, Net, adam, equal, everything, loaders, network, with_generators


class StoppedError(Exception):
    """What ends a run in the middle."""


def stop(at: int) -> Callable[[int, Any], None]:
    def check(step: int, values: Any) -> None:
        if step == at:
            raise StoppedError

    return check


@pytest.mark.parametrize("make", [loaders, with_generators])
@pytest.mark.parametrize("schedule", [None, lambda done: 1 - done], ids=["constant", "schedule"])
def test_an_interrupted_run_ends_where_a_straight_one_does(
    tmp_path: Path, make: Callable[[], Any], schedule: Any
) -> None:
    straight = network()
    torch.manual_seed(5)
    pair = adam(straight)
    history = fxgraft.adapt(straight, *make(), steps=10, optimizers=pair, schedule=schedule)
    wanted, drawn = everything(straight, pair), torch.rand(3)

    first = network()
    torch.manual_seed(5)
    options: dict[str, Any] = {
        "steps": 10,
        "schedule": schedule,
        "checkpoint": tmp_path,
        "checkpoint_every": 5,
    }
    with pytest.raises(StoppedError):
        # Two steps more than the checkpoint holds are lost, and made again.
        fxgraft.adapt(first, *make(), optimizers=adam(first), callback=stop(7), log_every=1, **options)
    second = network()
    torch.manual_seed(99)
    torch.rand(7)
    pair = adam(second)
    resumed = fxgraft.adapt(second, *make(), optimizers=pair, **options)

    assert equal(everything(second, pair), wanted)
    assert resumed == history
    assert torch.equal(torch.rand(3), drawn)


def test_five_steps_and_five_more_are_ten(tmp_path: Path) -> None:
    straight = network()
    history = fxgraft.adapt(straight, *loaders(), steps=10)
    halves = network()
    fxgraft.adapt(halves, *loaders(), steps=5, checkpoint=tmp_path / "run.pt")
    halves = network()
    assert fxgraft.adapt(halves, *loaders(), steps=10, checkpoint=tmp_path / "run.pt") == history
    assert equal(everything(halves), everything(straight))


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    model = network()
    history = fxgraft.adapt(model, *loaders(), steps=3, checkpoint=tmp_path)
    again = network()
    assert fxgraft.adapt(again, *loaders(), steps=3, checkpoint=tmp_path) == history
    assert equal(everything(again), everything(model))
    assert [file.name for file in tmp_path.iterdir()] == ["adaptation.pt"]


def test_checkpoints_do_not_change_a_run(tmp_path: Path) -> None:
    plain, kept = network(), network()
    fxgraft.adapt(plain, *loaders(), steps=4)
    torch.manual_seed(0)
    kept = network()
    fxgraft.adapt(kept, *loaders(), steps=4, checkpoint=tmp_path, checkpoint_every=1, log_every=1)
    assert equal(everything(kept), everything(plain))


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=tmp_path)
    before = (tmp_path / "adaptation.pt").read_bytes()

    def broken(content: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        fxgraft.adapt(network(), *loaders(), steps=4, checkpoint=tmp_path)
    assert (tmp_path / "adaptation.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: network(weights=[1.0, 1.0]), "of other patches, or the same with other options"),
        (lambda: network(layers=["fc"]), "of other patches.*of other discriminators"),
        (lambda: network(seed=1), "of another source network"),
        (lambda: fxgraft.patch(network(), "rsc", layer="bn"), "of other patches"),
    ],
    ids=["weights", "layers", "source", "second patch"],
)
def test_a_checkpoint_of_another_run(tmp_path: Path, other: Callable[[], Net], said: str) -> None:
    fxgraft.adapt(network(), *loaders(), steps=1, checkpoint=tmp_path)
    model = other()
    before = everything(model)
    with pytest.raises(RecipeError, match=rf"belongs to another run.*{said}"):
        fxgraft.adapt(model, *loaders(), steps=2, checkpoint=tmp_path)
    assert equal(everything(model), before)


def test_a_checkpoint_of_other_optimisers(tmp_path: Path) -> None:
    fxgraft.adapt(network(), *loaders(), steps=1, checkpoint=tmp_path)
    model = network()
    pair = adam(model)[0], torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RecipeError, match="of other optimisers"):
        fxgraft.adapt(model, *loaders(), steps=2, checkpoint=tmp_path, optimizers=pair)


def test_other_rates_are_not_passed_over(tmp_path: Path) -> None:
    fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=tmp_path, lr=1e-4)
    with pytest.raises(RecipeError, match="of other optimisers"):
        fxgraft.adapt(network(), *loaders(), steps=4, checkpoint=tmp_path, lr=1e-1)
    assert len(fxgraft.adapt(network(), *loaders(), steps=4, checkpoint=tmp_path, lr=1e-4)) == 4


def test_a_checkpoint_that_is_further(tmp_path: Path) -> None:
    fxgraft.adapt(network(), *loaders(), steps=3, checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="has made 3 steps, more than steps=2"):
        fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=tmp_path)


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    fxgraft.adapt(network(), *loaders(), steps=1, checkpoint=file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        file.write_bytes(content)
        with pytest.raises(RecipeError, match="cannot be read"):
            fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=file)
    torch.save(Net(), file)  # code, which is never loaded
    with pytest.raises(RecipeError, match="cannot be read"):
        fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=file)
    torch.save(Net().state_dict(), file)
    with pytest.raises(RecipeError, match=r"isn.t a checkpoint of fxgraft\.adapt"):
        fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=file)
    torch.save({"format": "fxgraft-adaptation", "version": 0}, file)
    with pytest.raises(RecipeError, match="of version 0"):
        fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=file)


def test_one_generator_for_both_loaders_cannot_be_resumed(tmp_path: Path) -> None:
    shared = torch.Generator()
    pair = loaders(generator=shared)
    fxgraft.adapt(network(), *pair, steps=1)
    with pytest.raises(ConfigError, match=r"Both loaders draw from one torch\.Generator"):
        fxgraft.adapt(network(), *pair, steps=1, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["model"].update({next(iter(c["model"])): torch.zeros(1)}),
            "of 'model' is missing or of another",
        ),
        (lambda c: c["optimizers"][0].pop("param_groups"), "state of an optimiser is not whole"),
        (lambda c: c["streams"][1].pop("start"), "the place in a loader is not whole"),
        (lambda c: c["random"].update(cpu=torch.zeros(3, dtype=torch.uint8)), "the random state is none"),
        (lambda c: c["model"].pop("fc.weight"), "'fc.weight' of 'model' is missing or of another"),
        (lambda c: c.update(step=-1), "it does not hold two sides of a run"),
        (lambda c: c["streams"].pop(), "it does not hold two sides of a run"),
        (lambda c: c["optimizers"].__setitem__(0, []), "state of an optimiser is not whole"),
        (lambda c: c["optimizers"][0]["param_groups"].pop(), "state of an optimiser is not whole"),
        (
            lambda c: c["optimizers"][0]["state"].update({0: {"step": "1"}}),
            "state of an optimiser is not whole",
        ),
        (
            lambda c: c["optimizers"][0]["state"].update({0: {"step": ["1"]}}),
            "state of an optimiser is not whole",
        ),
        (lambda c: c["streams"][0].update(taken=-1), "the place in a loader is not whole"),
        (lambda c: c["streams"].__setitem__(0, 3), "the place in a loader is not whole"),
        (lambda c: c["random"].update(cpu=3), "the random state is none"),
        (lambda c: c["history"].update(extra={}), "the history of losses is not whole"),
        (lambda c: c.pop("history"), "'history' is missing or of the wrong kind"),
        (lambda c: c.update(sha256="0"), "its digest is missing, or that of another content"),
        (lambda c: c.update(sha256=None), "its digest is missing, or that of another content"),
    ],
)
def test_a_checkpoint_that_is_not_whole_changes_nothing(
    tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    file = tmp_path / "run.pt"
    fxgraft.adapt(network(), *loaders(), steps=2, checkpoint=file)
    content = torch.load(file, weights_only=True)
    change(content)
    if "digest" not in said:
        content["sha256"] = content_digest({k: v for k, v in content.items() if k != "sha256"})
    torch.save(content, file)
    model = network()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(RecipeError, match=said):
        fxgraft.adapt(model, *loaders(), steps=3, checkpoint=file)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


class HearsOfEpochs(torch.utils.data.RandomSampler):
    """A sampler that keeps the epoch it was told."""

    epoch = 7

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_resume_that_fails_leaves_loaders_optimisers_and_chance_as_they_were(tmp_path: Path) -> None:
    earlier = network()
    fxgraft.adapt(earlier, *with_generators(), steps=4, checkpoint=tmp_path, optimizers=adam(earlier))
    model = network()
    pair, made = adam(model), with_generators()
    shorter = DataLoader(TensorDataset(SOURCE[:4]), 4, generator=torch.Generator().manual_seed(1))
    sampler = HearsOfEpochs(TensorDataset(SOURCE), generator=torch.Generator().manual_seed(0))
    first = DataLoader(TensorDataset(SOURCE), 4, sampler=sampler)

    def now() -> list[torch.Tensor]:
        generators = [each.generator.get_state() for each in (sampler, shorter, *made)]
        return [*everything(model, pair), *generators, torch.get_rng_state()]

    before = now()
    with pytest.raises(RecipeError, match="The target loader is not the one of the checkpoint"):
        fxgraft.adapt(model, first, shorter, steps=6, checkpoint=tmp_path, optimizers=pair)
    assert equal(now(), before)
    assert sampler.epoch == 7
    fxgraft.adapt(model, *made, steps=6, checkpoint=tmp_path, optimizers=pair)
    straight = network()
    fxgraft.adapt(straight, *with_generators(), steps=6, optimizers=adam(straight))
    assert equal(everything(model), everything(straight))
