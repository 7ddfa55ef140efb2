"""What a comparison finds out before its first training step, and state that callers leave behind."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fxgraft
from fxgraft.errors import ConfigError
from unit.comparison.images import write_domains
from unit.comparison.small import Small


class Returns(Small):
    """The same, with another output."""

    make = staticmethod(lambda logits: logits)

    def forward(self, x):
        return self.make(super().forward(x))


class Two(Returns):
    make = staticmethod(lambda logits: logits[:, :1])


class Dense(Returns):
    make = staticmethod(lambda logits: logits[..., None, None])


class Named(Returns):
    make = staticmethod(lambda logits: {"logits": logits, "loss": None})


def fails(num_classes):
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Two}, r"returns \(8, 1\) for 8 images of 2 classes"),
        ({"model": Dense}, r"returns \(8, 2, 1, 1\) for 8 images of 2 classes"),
        ({"model": fails}, r"fails with num_classes=2: ZeroDivisionError: division by zero"),
        ({"model": "timm/test_vit", "size": 20}, r"(?s)size"),
        (
            {"train": lambda model: None, "training": None},
            r"train= cannot be called as train\(model, images, valid",
        ),
        ({"measure": lambda model: {}}, r"measure= cannot be called as measure\(model, validation, test\)"),
        ({"train": print, "training": {"lr": 5.0}}, r"lr has no effect: a loop of your own"),
        ({"train": print, "training": None, "tune": {"lr": [1.0]}}, r"lr has no effect"),
        (
            {"per_class": 1, "tune": {"lr": [0.1]}, "training": {"batch_size": 4}},
            r"tune= needs images that are set apart",
        ),
    ],
)
def test_found_before_the_first_step(run, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(**changes)
    assert not (tmp_path / "out" / "runs.jsonl").exists()


def test_a_batch_of_one_where_a_norm_has_one_value(run):
    with pytest.raises(
        ConfigError, match=r"fails on a batch of 1 images \(3, 16, 16\): Expected more than 1 value"
    ):
        run(model="timm/test_resnet", size=16, training={"epochs": 1, "batch_size": 1})


def test_structured_outputs_are_scored(run, tmp_path):
    named, plain = run(model=Named, seeds=1), run(model=Returns, seeds=1, out=tmp_path / "plain")
    assert [r["scores"] for r in named.records] == [r["scores"] for r in plain.records]


def test_a_function_that_returns_one_model_again(run):
    shared = Small(2)
    with pytest.raises(ConfigError, match="returns the same weights each time"):
        run(model=lambda num_classes: shared)
    assert fxgraft.grafts(shared) == []


def test_a_function_whose_models_share_a_part(run):
    trunk = Small(2).requires_grad_(False)
    before = {key: value.clone() for key, value in trunk.state_dict().items()}

    class Headed(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.trunk, self.fc = trunk, nn.Linear(2, num_classes)

        def forward(self, x):
            return self.fc(self.trunk(x))

    with pytest.raises(ConfigError, match=r"or a part of them(?s:.*)copy.deepcopy"):
        run(model=Headed)
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())


def test_models_that_need_whole_batches_and_that_are_lazy(run, tmp_path):
    class Quarters(Small):
        def forward(self, x):
            assert not self.training or len(x) % 4 == 0
            return super().forward(x)

    class Lazy(nn.Sequential):
        def __init__(self, num_classes):
            super().__init__(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.append(nn.LazyLinear(num_classes))

    assert run(model=Quarters, seeds=1).complete
    assert run(model=Lazy, seeds=1, grafts="adapt_batchnorm", out=tmp_path / "lazy").complete


def test_runs_do_not_lie_among_the_images(run, data):
    with pytest.raises(ConfigError, match=r"inside of the images' folder .*\n.*Pass an out="):
        run(out=data / "fxgraft-compare")
    assert not (data / "fxgraft-compare").exists()


def test_the_callers_modes_of_torch(run, tmp_path):
    plain = run(seeds=1)
    for number, mode in enumerate((torch.no_grad, torch.inference_mode)):
        with mode():
            found = run(seeds=1, out=tmp_path / f"{number}")
        assert [r["scores"] for r in found.records] == [r["scores"] for r in plain.records]
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ConfigError, match=r"default dtype is torch.float64(?s:.*)set_default_dtype"):
            run(out=tmp_path / "double")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("returned", "losses", "diverged"),
    [
        (None, [], False),
        ([0.5, 0.25], [0.5, 0.25], False),
        (np.array([0.5, 0.25]), [0.5, 0.25], False),
        (torch.tensor([0.5]), [0.5], False),
        (0.5, [0.5], False),
        (np.float32(0.5), [0.5], False),
        (torch.tensor(0.5), [0.5], False),
        ([0.5, float("nan")], [0.5, None], True),
    ],
)
def test_what_a_loop_may_return(run, returned, losses, diverged):
    found = run(train=lambda model, images, validation, seed: returned, training=None, seeds=1)
    assert [(r["epoch_loss"], r["diverged"]) for r in found.records] == [(losses, diverged)] * 2


@pytest.mark.parametrize("returned", ["done", [None], object()])
def test_what_is_no_loss(run, returned):
    with pytest.raises(ConfigError, match=r"train= returned .*no list of losses"):
        run(train=lambda model, images, validation, seed: returned, training=None)


@pytest.mark.parametrize("returned", [None, [1.0], {"margin": "wide"}])
def test_what_is_no_measure(run, returned):
    with pytest.raises(ConfigError, match=r"measure= returned .*no dictionary of numbers"):
        run(measure=lambda model, validation, test: returned)


def test_every_reading_of_a_loop_of_ones_own_draws_again(run):
    seen = []

    def train(model, images, validation, seed):
        free = [images[0][0], images[0][0]]
        images.epoch = 1
        seen.append((*free, images[0][0], images[0][0]))
        loader = torch.utils.data.DataLoader(images, 4, num_workers=1)
        images.epoch = None
        seen.append([next(iter(loader))[0][0] for _ in range(2)])

    run(train=train, training=None, seeds=1)
    (first, second, fixed, again), workers, *_ = seen
    assert not torch.equal(first, second)
    assert torch.equal(fixed, again)
    assert not torch.equal(*workers)
    assert torch.equal(seen[2][0], first)  # the other run of the pair sees the same


def test_functions_of_any_kind(run):
    class Loop:
        def __call__(self, model, images, validation, seed):
            return [0.5]

    found = run(train=Loop(), training=None, seeds=1, model=functools.partial(Small, width=4))
    assert "Loop#" in found.protocol["training"]["loop"]
    assert found.protocol["model"].startswith("partial(")


def test_what_cannot_be_sent_to_another_process(run):
    lock = threading.Lock()

    def build(num_classes):
        with lock:
            return Small(num_classes)

    with pytest.raises(ConfigError, match=r"cannot be sent to another process(?s:.*)workers=1"):
        run(model=build, workers=2)


def test_counts_of_numpy(run):
    found = run(per_class=np.int64(6), test_per_class=np.int32(4), seeds=1)
    assert (found.protocol["per_class"], found.protocol["test_per_class"]) == (6, 4)


def test_a_report_that_cannot_be_written(run, tmp_path):
    found = run(seeds=1)
    with pytest.raises(ConfigError, match=r"is a folder"):
        found.to_html(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Cannot write the report"):
        found.to_html(tmp_path / "file" / "report.html")


def test_names_that_are_no_formula_and_no_text(run, tmp_path):
    place = write_domains(tmp_path / "odd", domains=("$^$", "red"))
    for domain in place.iterdir():
        (domain / "bars").rename(domain / b"b\xe4rs".decode("utf-8", "surrogateescape"))
    report = run(data=place, seeds=2, hold_out="all").to_html(tmp_path / "report.html")
    assert "$^$" in report.read_text(encoding="utf-8")
