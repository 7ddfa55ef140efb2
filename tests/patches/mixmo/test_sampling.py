"""Batch repetition: what every batch holds, under a DataLoader with and without workers, and in two processes."""

from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, TensorDataset

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
