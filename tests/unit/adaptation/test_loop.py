"""The ready loop of activation matching: it plays the game, tells how it goes, and says when it cannot."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.adaptation import history as recording
from fxgraft.adaptation import loop as adaptation
from fxgraft.errors import ConfigError, FxgraftWarning, UnknownGraftError, WrappedModelError
from fxgraft.patches.gam import step as gam
from unit.adaptation.adapting import SOURCE, TARGET, Net, adam, equal, everything, loaders, network


def test_it_is_the_loop_written_by_hand() -> None:
    model, by_hand = network(), network()
    batches = [list(SOURCE.split(4)[:3]), list(TARGET.split(4)[:2])]
    pair = adam(by_hand)
    by_hand.train()
    torch.manual_seed(3)
    for _ in range(2):
        torch.randint(2**62, ())  # the seeds of the loaders
    for step in range(5):
        game = fxgraft.gam.gam_losses(by_hand, batches[0][step % 3], batches[1][step % 2])
        for optimizer, loss in zip(pair, (game.discriminator, game.mapping), strict=True):
            optimizer.zero_grad()
            loss.backward()
        for optimizer in pair:
            optimizer.step()
    torch.manual_seed(3)
    history = fxgraft.adapt(model, *batches, steps=5, optimizers=adam(model))
    assert equal(everything(model), everything(by_hand))
    assert history.losses["mapping"][-1] == game.mapping.item()
    assert history.losses["discriminator.fc"][-1] == game.parts["discriminator.fc"].item()
    assert history.accuracy["bn"][-1] == game.accuracy["bn"].item()


def test_history_has_a_value_per_step() -> None:
    history = fxgraft.adapt(network(drift=0.5), *loaders(), steps=7, log_every=3)
    assert len(history) == 7
    names = {"discriminator", "mapping", "drift"} | {
        f"{s}.{t}" for s in ("discriminator", "mapping") for t in ("bn", "fc")
    }
    assert set(history.losses) == names
    assert set(history.accuracy) == {"bn", "fc"}
    assert {len(values) for values in [*history.losses.values(), *history.accuracy.values()]} == {7}
    total = math.fsum(v[-1] for k, v in history.losses.items() if k.startswith("mapping.") or k == "drift")
    assert history.losses["mapping"][-1] == pytest.approx(total, rel=1e-6)


def test_both_sides_learn_and_the_source_does_not() -> None:
    model = network()
    before = [each.clone() for each in gam.source(model).state_dict().values()]
    start = everything(model)
    fxgraft.adapt(model, *loaders(), steps=3)
    assert all(
        torch.equal(a, b) for a, b in zip(gam.source(model).state_dict().values(), before, strict=True)
    )
    names = [*model.state_dict(), *gam.discriminators(model).state_dict()]
    still = [n for n, a, b in zip(names, start, everything(model), strict=True) if torch.equal(a, b)]
    assert still == []


def test_activations_come_closer() -> None:
    model = network(layers=["fc"], matching=None, drift=0.0)
    model.eval()
    with torch.no_grad():
        goal, start = gam.source(model)(SOURCE).mean(0), model(TARGET).mean(0)
    fxgraft.adapt(model, [SOURCE], [TARGET], steps=150, lr=3e-3)
    with torch.no_grad():
        end = model(TARGET).mean(0)
    assert (end - goal).norm() < 0.5 * (start - goal).norm()


def test_flags_are_put_back_and_frozen_parts_stay_frozen() -> None:
    model = network()
    model.eval()
    fxgraft.adapt(model, *loaders(), steps=1)
    assert not any(module.training for module in model.modules())
    model.train()
    model.bn.eval()
    kept = model.bn.running_mean.clone()
    fxgraft.adapt(model, *loaders(), steps=2)
    assert torch.equal(model.bn.running_mean, kept)
    assert model.drop.training
    assert not model.bn.training


def test_labels_are_left_unread() -> None:
    class Unreadable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    fxgraft.adapt(network(), [(SOURCE, Unreadable())], [{"image": TARGET, "label": Unreadable()}], steps=2)


def test_schedules_and_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told, asked = network(), [], []
    monkeypatch.setattr(adaptation, "set_progress", lambda _, fraction: told.append(fraction))
    pair = adam(model)

    def schedule(done: float) -> float:
        asked.append(done)
        return 0.5

    fxgraft.adapt(model, *loaders(), steps=4, optimizers=pair, schedule=schedule)
    assert told == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert asked == told[:-1]
    assert [group["lr"] for each in pair for group in each.param_groups] == [0.005, 0.005]


def test_callback_hears_the_latest_values() -> None:
    heard: list[tuple[int, dict[str, float]]] = []
    history = fxgraft.adapt(
        network(), *loaders(), steps=5, log_every=2, callback=lambda s, v: heard.append((s, v))
    )
    assert [step for step, _ in heard] == [2, 4, 5]
    for step, values in heard:
        assert values["mapping"] == history.losses["mapping"][step - 1]
        assert values["accuracy.fc"] == history.accuracy["fc"][step - 1]


def test_bfloat16_autocast() -> None:
    history = fxgraft.adapt(network(), *loaders(), steps=3, amp=True)
    assert all(math.isfinite(value) for value in history.losses["mapping"])


def test_the_bar_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fxgraft.adapt(network(), *loaders(), steps=2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    fxgraft.adapt(network(), *loaders(), steps=2, progress=False)
    assert capsys.readouterr().err == ""
    fxgraft.adapt(network(), *loaders(), steps=2)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "mapping" in shown
    assert "fc " in shown


# ------------------------------------------------------------------------------------------ diagnostics


def standing_still(rate: float) -> tuple[Net, Any]:
    """A game in which the target network does not move, and discriminators learn at a rate."""
    model = network(layers=["fc"], matching=None)
    model.eval()
    model.training = True  # the parts stay in evaluation
    players = gam.discriminators(model)
    return model, (torch.optim.Adam(players.parameters(), rate), torch.optim.SGD(model.parameters(), 0.0))


@pytest.mark.parametrize(
    ("target", "rate", "said"),
    [(SOURCE + 50, 1e-2, "'fc' was perfect"), (SOURCE, 0.0, "'fc' was at chance")],
    ids=["perfect", "chance"],
)
def test_a_game_that_stands_still_is_seen(
    target: Tensor, rate: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pair = standing_still(rate)
    fxgraft.adapt(
        model, [SOURCE], [target], steps=100, optimizers=pair
    )  # shorter than the window: not a word
    monkeypatch.setattr(recording, "WINDOW", 10)
    with pytest.warns(FxgraftWarning, match=said) as caught:
        fxgraft.adapt(model, [SOURCE], [target], steps=40, optimizers=pair)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_game_that_goes_on_is_not_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "WINDOW", 10)
    recorder = recording.Recorder(recording.AdaptationHistory(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40):
            recorder._note({("accuracy", "fc"): 1.0 if step % 9 else 0.8, ("losses", "mapping"): 1.0})


def test_a_loss_that_is_not_finite_names_its_part() -> None:
    model = network(drift=1.0)
    model.fc.weight.data[0, 0] = math.inf
    with pytest.raises(
        ConfigError, match=r"Not finite in step 1: 'discriminator\.fc', 'mapping\.fc', 'drift'\."
    ) as caught:
        fxgraft.adapt(model, [SOURCE], [TARGET], steps=6)
    assert "'mapping.bn'" not in str(caught.value)


def test_a_loss_that_stops_being_finite_is_not_kept(tmp_path: Path) -> None:
    def schedule(share: float) -> float:
        return 1e38 if share == 0.5 else 1.0

    with pytest.raises(ConfigError, match="Not finite in step 4"):
        fxgraft.adapt(
            network(), [SOURCE], [TARGET], steps=4, checkpoint=tmp_path, checkpoint_every=2, schedule=schedule
        )
    assert torch.load(tmp_path / "adaptation.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_images_that_are_not_finite_are_not_trained_on(odd: float) -> None:
    model, states = network(), []

    def keep(step: int, values: dict[str, float]) -> None:
        states.append(copy.deepcopy(model.state_dict()))

    images = [SOURCE[:4], SOURCE[4:8] * odd]
    with pytest.raises(
        ConfigError, match=r"(?s)source loader hold NaN or infinity, in step 2.*as after 1 steps"
    ):
        fxgraft.adapt(model, images, [TARGET], steps=6, callback=keep, log_every=1)
    assert len(states) == 1
    for key, value in model.state_dict().items():
        assert torch.equal(states[0][key], value), key


# ------------------------------------------------------------------------------------------- wrong input


def test_a_model_without_the_patch() -> None:
    with pytest.raises(UnknownGraftError, match="not patched with GAM"):
        fxgraft.adapt(Net(), *loaders(), steps=1)


def test_a_wrapped_model() -> None:
    with pytest.raises(WrappedModelError, match="the patched model itself, not inside DataParallel"):
        fxgraft.adapt(nn.DataParallel(network()), *loaders(), steps=1)


@pytest.mark.parametrize("option", ["steps", "checkpoint_every", "log_every"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_counts(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be a whole number of at least 1"):
        fxgraft.adapt(network(), *loaders(), **{option: value})


def test_rates() -> None:
    with pytest.raises(ConfigError, match="lr must be a number above 0"):
        fxgraft.adapt(network(), *loaders(), steps=1, lr=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "lr must be a number above 0"),
        ({"lr": "a"}, "lr must be a number above 0"),
        ({"betas": (1.5, 0.9)}, "betas are two numbers"),
        ({"betas": 0.5}, "betas are two numbers"),
        ({"schedule": 3}, "schedule is a function"),
        ({"schedule": lambda share: None}, r"schedule\(0\.000\) returned None"),
        ({"schedule": lambda share: -1}, r"schedule\(0\.000\) returned -1"),
        ({"callback": 3}, "callback is a function"),
        ({"device": "nowhere"}, "no device 'nowhere'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    model = network()
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        fxgraft.adapt(model, *loaders(), steps=1, **options)
    assert equal(everything(model), before)


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_loader(empty: int) -> None:
    given: list[Any] = loaders()
    given[empty] = []
    with pytest.raises(ConfigError, match=f"{('source', 'target')[empty]} loader gives no batch"):
        fxgraft.adapt(network(), *given, steps=1)


def test_optimisers_of_the_wrong_side() -> None:
    model = network()
    with pytest.raises(ConfigError, match="first optimiser is for the discriminators alone"):
        fxgraft.adapt(model, *loaders(), steps=1, optimizers=adam(model)[::-1])
    with pytest.raises(ConfigError, match="an optimiser each"):
        fxgraft.adapt(model, *loaders(), steps=1, optimizers=adam(model)[:1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"two of torch\.optim"):
        fxgraft.adapt(model, *loaders(), steps=1, optimizers=("a", "b"))  # type: ignore[arg-type]
    other = adam(network())[1]  # of another model: it would move nothing here
    with pytest.raises(ConfigError, match="holds no parameter of this model"):
        fxgraft.adapt(model, *loaders(), steps=1, optimizers=(adam(model)[0], other))


def test_nothing_to_train() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing can be adapted"):
        fxgraft.adapt(model, *loaders(), steps=1)


def test_a_copy_plays_its_own_game() -> None:
    model = network()
    before = everything(model)
    fxgraft.adapt(copy.deepcopy(model), *loaders(), steps=1)
    assert equal(everything(model), before)
