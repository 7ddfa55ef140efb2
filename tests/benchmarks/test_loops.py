"""The training loop that demo and benchmarks share."""

import copy

import pytest
import torch
from benchmarks.loops import training
from benchmarks.loops.augment import Augment
from benchmarks.loops.domains import Domain, leave_one_out
from benchmarks.loops.evaluation import evaluate
from benchmarks.loops.images import as_input
from benchmarks.loops.training import train
from torch import nn

import fxgraft
from fxgraft.environment import environment
from fxgraft.errors import ConfigError


class Small(nn.Module):
    """Two convolutions, pooling and a linear layer: the smallest thing that RSC fits on."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.pool(self.body(x)).flatten(1))


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


def blocks(count=48, classes=3, size=8):
    """One colour per class: learnt in a few steps."""
    labels = torch.arange(count) % classes
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, 3, size, size), generator=generator)
    images[torch.arange(count), labels] += 150
    return images.byte(), labels


class Watched(nn.Module):
    """Keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.fc(x.mean((2, 3)))


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learns(optimizer):
    data = blocks()
    model = small()
    history = train(model, data, epochs=15, batch_size=16, lr=0.05, optimizer=optimizer)
    assert evaluate(model, *data) == 1.0
    assert history.epoch_loss[-1] < 0.5 * history.epoch_loss[0]
    assert len(history.step_seconds) == 15 * 3
    assert history.median_step > 0
    assert history.selected_epoch == 14


@pytest.mark.parametrize("patch", [False, True], ids=["bare", "rsc"])
def test_same_seed_gives_the_same_weights(patch):
    def run(seed):
        model = small()
        if patch:
            fxgraft.patch(model, "rsc", layer="body")
        torch.rand(7)  # what the global generator did before is of no consequence
        train(model, blocks(), epochs=2, batch_size=16, seed=seed, augment=Augment(crop_padding=2, flip=0.5))
        return weights(model)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_a_model_that_draws_sees_the_same_batches():
    augment = Augment(crop_padding=2, flip=0.5, jitter=0.3, gray=0.2)
    bare, drawing = Watched(), Watched()
    train(bare, blocks(), epochs=2, batch_size=16, augment=augment)
    # A model that draws from torch's generator, as a patch does, moves no batch.
    drawing.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 0 * torch.rand(1),))
    train(drawing, blocks(), epochs=2, batch_size=16, augment=augment)
    assert len(bare.seen) == len(drawing.seen) == 6
    assert all(torch.equal(one, other) for one, other in zip(bare.seen, drawing.seen, strict=True))


def test_rsc_with_nothing_to_mute_trains_as_bare():
    bare, patched = small(), small()
    fxgraft.patch(patched, "rsc", layer="body", batch_share=0.0)
    for model in (bare, patched):
        train(model, blocks(), epochs=2, batch_size=16)
    assert torch.allclose(weights(bare), weights(patched), atol=1e-5)


def test_rsc_changes_the_training():
    bare, patched = small(), small()
    fxgraft.patch(patched, "rsc", layer="body")
    for model in (bare, patched):
        train(model, blocks(), epochs=2, batch_size=16)
    assert not torch.allclose(weights(bare), weights(patched), atol=1e-4)


def test_progress_reaches_patches_and_callback(monkeypatch):
    fractions, calls = [], []
    monkeypatch.setattr(fxgraft, "set_progress", lambda model, fraction: fractions.append(fraction))
    model = fxgraft.patch(small(), "rsc", layer="body")
    train(model, blocks(), epochs=2, batch_size=24, progress=lambda *step: calls.append(step))
    assert fractions == [0.0, 0.25, 0.5, 0.75]
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_global_generator_is_put_back():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(fxgraft.patch(small(), "rsc", layer="body"), blocks(), epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_incomplete_batch_is_dropped_unless_it_is_the_only_one():
    assert len(train(small(), blocks(48), epochs=1, batch_size=20).step_seconds) == 2
    assert len(train(small(), blocks(9), epochs=1, batch_size=20).step_seconds) == 1


def test_rate_warms_up_and_falls_to_nothing():
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    original, torch.optim.SGD = torch.optim.SGD, Spy
    try:
        train(small(), blocks(), epochs=10, batch_size=12, lr=0.1, warmup=0.1)
    finally:
        torch.optim.SGD = original
    assert len(rates) == 40
    assert max(rates) == pytest.approx(0.1)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.001


def test_biases_and_norms_are_not_decayed(monkeypatch):
    groups = []

    def spy(given, **_):
        groups.extend(given)
        raise InterruptedError

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    model = small()
    model.body[3].requires_grad_(False)
    with pytest.raises(InterruptedError):
        train(model, blocks(), epochs=1, optimizer="adamw", weight_decay=0.1)
    decayed = [p for group in groups if group["weight_decay"] == 0.1 for p in group["params"]]
    others = [p for group in groups if group["weight_decay"] == 0.0 for p in group["params"]]
    assert [id(p) for p in decayed] == [id(model.body[0].weight), id(model.fc.weight)]
    norm = model.body[1]
    assert {id(p) for p in others} == {
        id(p) for p in (model.body[0].bias, norm.weight, norm.bias, model.fc.bias)
    }


class StopError(Exception):
    pass


@pytest.mark.parametrize("method", [None, "rsc", "selfnorm"])
@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "schedule": "step"}])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, method, options):
    def run(checkpoint, stop_at=None):
        model = small()
        torch.manual_seed(0)  # a method may draw weights of its own
        if method is not None:
            fxgraft.patch(model, method, layer=-1)

        def progress(step, total):
            if step == stop_at:
                raise StopError

        arguments = {"epochs": 3, "batch_size": 8, "lr": 0.01, "validation": blocks(12)} | options
        history = train(
            model, blocks(), augment=Augment(flip=0.5), progress=progress, checkpoint=checkpoint, **arguments
        )
        return model.state_dict(), history

    straight, whole = run(None)
    file = tmp_path / "folder" / "run.pt"
    with pytest.raises(StopError):
        run(file, stop_at=15)  # in the third of three epochs of six steps
    weights, history = run(file)
    assert all(torch.equal(weights[key], straight[key]) for key in straight)
    assert history.epoch_loss == whole.epoch_loss
    assert history.validation == whole.validation
    assert len(history.step_seconds) == 18


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    train(small(), blocks(), epochs=1, batch_size=8, checkpoint=file)
    with pytest.raises(ConfigError, match="damaged or of another run"):
        train(Watched(), blocks(), epochs=1, batch_size=8, checkpoint=file)
    file.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="Cannot go on from"):
        train(small(), blocks(), epochs=1, batch_size=8, checkpoint=file)


def test_repetitions_show_each_image_several_times_in_a_batch():
    model = Watched()
    images, labels = blocks(12)
    train(model, (images, labels), epochs=1, batch_size=6, repetitions=3)
    assert [len(batch) for batch in model.seen] == [6] * 6
    assert all(len(batch.flatten(1).unique(dim=0)) == 2 for batch in model.seen)


def test_decay_all_shrinks_norms_too():
    groups = []
    for decay_all in (False, True):
        model = small()
        for parameter in model.parameters():
            parameter.register_hook(torch.zeros_like)
        train(model, blocks(), epochs=1, lr=0.1, weight_decay=0.5, decay_all=decay_all)
        groups.append(model.body[1].weight.detach())
    assert torch.equal(groups[0], torch.ones(8))
    assert (groups[1] < 1).all()


def test_step_schedule_falls_once():
    rates = [training._rate(step, 100, 0.0, "step") for step in range(100)]
    assert rates == [1.0] * 80 + [0.1] * 20


def test_best_goes_back_to_the_best_epoch(monkeypatch):
    scores = iter([0.5, 0.9, 0.9, 0.1])
    kept = []

    def score(model, *_, **__):
        kept.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    monkeypatch.setattr("benchmarks.loops.training.evaluate", score)
    model = small()
    history = train(model, blocks(), epochs=4, batch_size=16, validation=blocks(6), select="best")
    assert history.validation == [0.5, 0.9, 0.9, 0.1]
    assert history.selected_epoch == 1
    assert all(torch.equal(value, kept[1][key]) for key, value in model.state_dict().items())


def test_last_is_the_default(monkeypatch):
    scores = iter([0.9, 0.1])
    monkeypatch.setattr("benchmarks.loops.training.evaluate", lambda *_, **__: next(scores))
    assert train(small(), blocks(), epochs=2, validation=blocks(6)).selected_epoch == 1


def test_amp_and_channels_last():
    model = fxgraft.patch(small(), "rsc", layer="body")
    data = blocks()
    train(model, data, epochs=10, batch_size=16, lr=0.05, optimizer="adamw", amp=True, channels_last=True)
    assert model.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model.body[0].weight.dtype == torch.float32
    assert evaluate(model, *data, amp=True) > 0.9


def test_evaluate_keeps_every_flag():
    model = small().train()
    model.body[1].eval()
    flags = [module.training for module in model.modules()]
    before = weights(model)
    evaluate(model, *blocks(), batch_size=5)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(before, weights(model))


def test_evaluate_counts():
    images, labels = blocks(30)
    model = small().eval()
    expected = (model(as_input(images)).argmax(1) == labels).float().mean().item()
    assert evaluate(model, images, labels, batch_size=7) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "at least 1, got 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"lr": 0}, "lr must be above 0"),
        ({"warmup": 1}, r"warmup in \[0, 1\)"),
        ({"select": "first"}, "got 'first'"),
        ({"select": "best"}, "needs a validation part"),
        ({"optimizer": "lion"}, "got 'lion'"),
        ({"lr": 1e30}, "loss is not finite in epoch"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        train(small(), blocks(), **{"epochs": 3, "batch_size": 8, **options})


def test_bad_data():
    images, labels = blocks()
    for wrong in (images.float(), images[0], images[:, :1]):
        with pytest.raises(ConfigError, match="must be uint8 of shape"):
            train(small(), (wrong, labels), epochs=1)
    for wrong in ((images, labels[:3]), (images[:0], labels[:0])):
        with pytest.raises(ConfigError, match="Every image needs a label"):
            evaluate(small(), *wrong)


# ------------------------------------------------------------------------------------ augmentation


def test_augment_off_changes_nothing():
    images = torch.rand(4, 3, 8, 8)
    drawn = Augment().draw(4, torch.Generator())
    assert torch.equal(Augment().apply(images, drawn), images)


def test_crop_takes_a_window_of_the_padded_image():
    images = torch.rand(6, 3, 8, 8)
    augment = Augment(crop_padding=2)
    drawn = augment.draw(6, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    for index, out in enumerate(augment.apply(images, drawn)):
        top, left = drawn["shift"][index].tolist()
        assert torch.equal(out, padded[index, :, top : top + 8, left : left + 8])
    assert len(set(map(tuple, drawn["shift"].tolist()))) > 1


def test_flip_and_gray_are_per_image():
    images = torch.rand(40, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    augment = Augment(flip=0.5)
    drawn = augment.draw(40, generator)
    out = augment.apply(images, drawn)
    assert torch.equal(out[drawn["flip"]], images[drawn["flip"]].flip(-1))
    assert torch.equal(out[~drawn["flip"]], images[~drawn["flip"]])
    assert 5 < drawn["flip"].sum() < 35
    gray = Augment(gray=1.0)
    out = gray.apply(images, gray.draw(40, generator))
    assert torch.equal(out[:, 0], out[:, 2])


def test_jitter_stays_in_range_and_changes_each_image_its_own_way():
    images = torch.full((8, 3, 4, 4), 0.5)
    augment = Augment(jitter=0.4)
    out = augment.apply(images, augment.draw(8, torch.Generator().manual_seed(0)))
    assert out.min() >= 0
    assert out.max() <= 1
    assert len(out.mean((1, 2, 3)).unique()) == 8


@pytest.mark.parametrize("options", [{"crop_padding": -1}, {"flip": 1.5}, {"jitter": -0.1}, {"gray": 2}])
def test_augment_refuses(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Augment(**options)


# ------------------------------------------------------------------------------------- leaving out


def domains(*names):
    images, labels = blocks(30)
    return [Domain(name, images + index, labels, ("a", "b", "c")) for index, name in enumerate(names)]


def test_leave_one_out():
    train_set, kept, test = leave_one_out(domains("a", "b", "c"), "b")
    assert kept is None
    assert len(train_set[0]) == 60
    assert torch.equal(test[0], domains("a", "b", "c")[1].images)
    train_set, kept, _ = leave_one_out(domains("a", "b", "c"), "b", validation=0.2)
    assert kept is not None
    assert (len(train_set[1]), len(kept[1])) == (48, 12)


def test_leave_one_out_refuses():
    with pytest.raises(ConfigError, match="needs two or more, and there is a"):
        leave_one_out(domains("a"), "a")
    with pytest.raises(ConfigError, match=r"no domain 'phto'\. Close matches: 'photo'"):
        leave_one_out(domains("photo", "sketch"), "phto")
    with pytest.raises(ConfigError, match=r"share of 0\.01 of each class rounds to no image"):
        leave_one_out(domains("a", "b"), "a", validation=0.01)


def test_environment_says_what_it_was():
    found = environment("cpu")
    assert found["torch"] == torch.__version__
    assert set(found) >= {"fxgraft", "timm", "python", "device", "threads", "date"}
