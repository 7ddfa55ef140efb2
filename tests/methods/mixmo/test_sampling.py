"""Batch repetition: what every batch holds, under a DataLoader with and without workers, and in two processes."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, TensorDataset

import fxgraft
from fxgraft.errors import ConfigError
from fxgraft.patches.mixmo.sampling import RepeatedBatchSampler


@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 4), st.booleans())
@settings(max_examples=80, deadline=None)
def test_each_sample_occurs_as_often_as_asked(length: int, samples: int, repetitions: int, drop_last: bool):
    sampler = RepeatedBatchSampler(range(length), samples * repetitions, repetitions, drop_last)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert list(sampler) == batches
    for batch in batches:
        assert set(Counter(batch).values()) == {repetitions}
    full = batches if length % samples == 0 else batches[: length // samples]
    assert all(len(batch) == samples * repetitions for batch in full)
    seen = [index for batch in batches for index in dict.fromkeys(batch)]
    kept = length - length % samples if drop_last else length
    assert seen == list(range(kept))


def test_one_repetition_is_a_plain_batch_sampler():
    assert list(RepeatedBatchSampler(SequentialSampler(range(5)), 2, 1)) == [[0, 1], [2, 3], [4]]


def test_every_epoch_is_drawn_anew():
    generator = torch.Generator().manual_seed(1)
    sampler = RepeatedBatchSampler(RandomSampler(range(30), generator=generator), 6, 2)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == sorted([*range(30)] * 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_under_a_loader(workers: int):
    data = TensorDataset(torch.arange(10) * 10, torch.arange(10))
    sampler = RepeatedBatchSampler(RandomSampler(data), 8, 4)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 5
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 5
        for values, labels in batches:
            assert torch.equal(values, labels * 10)
            assert torch.equal(labels.unique(return_counts=True)[1], torch.tensor([4, 4]))
        assert torch.equal(torch.cat([labels for _, labels in batches]).unique(), torch.arange(10))


def test_every_repetition_is_loaded_anew():
    class Noise(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.rand(())

    (batch,) = DataLoader(Noise(), batch_sampler=RepeatedBatchSampler(range(2), 8, 4))
    assert batch.unique().numel() == 8


def test_two_processes_share_the_data():
    data = TensorDataset(torch.arange(12))
    parts = [DistributedSampler(data, num_replicas=2, rank=rank, seed=3) for rank in range(2)]
    samplers = [RepeatedBatchSampler(part, 6, 2) for part in parts]
    epochs = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        seen = [list(chain(*sampler)) for sampler in samplers]
        assert [len(sampler) for sampler in samplers] == [2, 2]
        assert sorted(set(seen[0]) | set(seen[1])) == list(range(12))
        assert set(seen[0]).isdisjoint(seen[1])
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert samplers[0].sampler is parts[0]


def test_an_epoch_may_be_set_on_any_sampler():
    RepeatedBatchSampler(range(4), 4, 2).set_epoch(3)


@pytest.mark.parametrize(
    ("size", "repetitions", "message"),
    [
        (64, 3, r"64 rows cannot hold each sample 3 times(.|\n)*such as 63 or 66\."),
        (3, 4, r"such as 4\."),
        (8, 0, "repetitions must be a whole number of at least 1, got 0"),
        (8, 2.0, "repetitions must be a whole number of at least 1, got 2.0"),
        (8, True, "repetitions must be a whole number of at least 1, got True"),
        (0, 1, "batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_batches_that_cannot_be_made(size: int, repetitions: int, message: str):
    with pytest.raises(ConfigError, match=message):
        RepeatedBatchSampler(range(10), size, repetitions)


class Counted(torch.utils.data.Dataset[Any]):
    """Says which sample an image is of, and which of those that were loaded it is."""

    def __init__(self, size: int = 12) -> None:
        self.size, self.loaded = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded += 1
        return torch.full((2, 6, 6), float(index)) + torch.tensor(self.loaded / 1000), index


@pytest.mark.parametrize("members", [1, 2, 3])
def test_every_member_has_an_image_of_its_own(members: int) -> None:
    torch.manual_seed(0)
    data = Counted()
    loader = fxgraft.mixmo.paired_loader(data, 8, members=members, repetitions=2, drop_last=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert data.loaded == 3 * 8 * members  # nothing that two members, or two rows, share
    for images, labels in batches:
        assert len(images.inputs) == len(labels) == members
        for each, known in zip(images.inputs, labels, strict=True):
            assert torch.equal(each[:, 0, 0, 0].floor().long(), known)
            assert sorted(known.tolist()) == sorted(labels[0].tolist())
            assert all(count == 2 for count in known.bincount()[known.unique()])
    assert len({tuple(each.tolist()) for each in batches[0][1]}) == members


def test_cutmix_of_each_image_with_one_of_all_the_data() -> None:
    torch.manual_seed(0)
    seen, mixed, images_seen = set(), 0, 0
    for images, labels in fxgraft.mixmo.paired_loader(Counted(40), 4, cutmix=0.5):
        for each, known in zip(images.inputs, labels, strict=True):
            first = known.mask.bool().expand_as(each)
            assert torch.equal(torch.where(first, each.floor(), 0.0).amax((1, 2, 3)).long(), known.first)
            second = torch.where(first, -1.0, each.floor()).amax((1, 2, 3)).long()
            other = (known.mask == 0).flatten(1).any(1)
            assert torch.equal(second[other], known.second[other])
            assert bool((known.mask.mean((1, 2, 3)) >= 0.5).all())
            seen |= set(known.second[other].tolist())
            mixed, images_seen = mixed + int(other.sum()), images_seen + len(other)
    assert 0.25 < mixed / images_seen < 0.6  # half of them, but for boxes that come out empty
    assert len(seen) > 15


def test_a_step_with_the_loader_and_what_it_refuses() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6) % 4)
    model = fxgraft.patch(
        timm.create_model("test_resnet", num_classes=4), "mixmo", preset="cifar_cut"
    ).train()
    loader = fxgraft.mixmo.paired_loader(data, 6, cutmix=1.0, generator=torch.Generator().manual_seed(0))
    for images, labels in loader:
        moved, known = (
            images.to("cpu", non_blocking=True),
            [each.to("cpu", non_blocking=True) for each in labels],
        )
        fxgraft.loss(model, model(moved, target=known), known).backward()
    for options, match in (
        ({"cutmix": 1.5}, "cutmix must be a probability"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"members": 0}, "members must be a whole number"),
        ({"repetitions": 4}, "cannot hold each sample 4 times"),
    ):
        with pytest.raises(ConfigError, match=match):
            fxgraft.mixmo.paired_loader(data, 6, **options)
    whole = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4))
    with pytest.raises(ConfigError, match=r"images are Tensor of torch.uint8.*\n.*\nPut ToTensor"):
        next(iter(fxgraft.mixmo.paired_loader(whole, 2)))


@pytest.mark.parametrize("label", [0.7, torch.tensor(1.5), torch.tensor([0.2, 0.8]), "cat"])
def test_labels_that_are_not_class_indices(label: Any) -> None:
    data = [(torch.zeros(3, 8, 8), label)] * 4
    with pytest.raises(ConfigError, match="labels are class indices"):
        next(iter(fxgraft.mixmo.paired_loader(data, 4)))


@pytest.mark.parametrize("label", [1, np.int64(1), torch.tensor(1, dtype=torch.uint8)])
def test_labels_that_are_class_indices(label: Any) -> None:
    _, labels = next(iter(fxgraft.mixmo.paired_loader([(torch.zeros(3, 8, 8), label)] * 4, 4)))
    assert [each.tolist() for each in labels] == [[1] * 4] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": True}, "takes a sampler"),
        ({"alpha": "a"}, "alpha must be above 0"),
        ({"cutmix": "a"}, "a probability"),
    ],
)
def test_options_of_the_loader(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fxgraft.mixmo.paired_loader([(torch.zeros(3, 8, 8), 1)] * 4, 4, **options)
