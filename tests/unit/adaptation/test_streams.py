"""Streams of batches: cycled, kept apart from everyone else's random numbers, and found again exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from fxgraft.adaptation.streams import Endless, images_of
from fxgraft.errors import ConfigError, RecipeError

IMAGES = torch.arange(10.0).view(10, 1, 1, 1)


class Noisy(Dataset[Tensor]):
    """Augments: draws for each image."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Tensor:
        return IMAGES[index] + torch.rand(())


class Streamed(IterableDataset[Tensor]):
    """Images that come without indices."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from IMAGES + torch.rand(())


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "generator": lambda: DataLoader(Noisy(), 3, shuffle=True, generator=_seeded()),
    "workers": lambda: DataLoader(Noisy(), 3, shuffle=True, num_workers=1, multiprocessing_context="fork"),
    "streamed": lambda: DataLoader(Streamed(), 3),
    "distributed": lambda: DataLoader(Noisy(), 3, sampler=DistributedSampler(Noisy(), 2, 0)),
    "list": lambda: [IMAGES[:4], IMAGES[4:8], IMAGES[8:]],
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("taken", [0, 2, 4, 7])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_stream_is_found_again(kind: str, taken: int) -> None:
    torch.manual_seed(1)
    stream = Endless(LOADERS[kind](), "source")
    for _ in range(taken):
        stream.next()
        torch.rand(3)  # what a network draws in between
    state = stream.state()
    wanted = [stream.next() for _ in range(6)]
    torch.manual_seed(2)
    again = Endless(LOADERS[kind](), "source")
    again.resume(state)
    torch.rand(1)
    got = [again.next() for _ in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(2, 20),
    batch=st.integers(1, 7),
    taken=st.integers(0, 25),
    drop=st.booleans(),
    own=st.booleans(),
)
def test_any_place_of_any_loader_is_found_again(
    count: int, batch: int, taken: int, drop: bool, own: bool
) -> None:
    assume(not drop or batch <= count)

    def stream() -> Endless:
        generator = _seeded() if own else None
        data = TensorDataset(torch.arange(float(count)))
        return Endless(DataLoader(data, batch, shuffle=True, drop_last=drop, generator=generator), "source")

    first, second = stream(), stream()
    for _ in range(taken):
        first.next()
    second.resume(first.state())
    assert all(torch.equal(first.next(), second.next()) for _ in range(10))


def test_epochs_differ_and_hold_every_image() -> None:
    stream = Endless(DataLoader(TensorDataset(IMAGES), 5, shuffle=True), "source")
    epochs = [torch.cat([stream.next(), stream.next()]).flatten() for _ in range(3)]
    assert all(epoch.sort().values.equal(IMAGES.flatten()) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])
    assert not epochs[1].equal(epochs[2])


def test_samplers_hear_of_the_epoch() -> None:
    sampler = DistributedSampler(Noisy(), 2, 0)
    stream = Endless(DataLoader(Noisy(), 5, sampler=sampler), "source")
    for epoch in range(3):
        stream.next()
        assert sampler.epoch == epoch


def test_a_stream_leaves_the_global_generator_alone() -> None:
    stream = Endless(LOADERS["shuffled"](), "source")
    before = torch.get_rng_state()
    for _ in range(5):
        stream.next()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_single_leftover_image_is_passed_over() -> None:
    stream = Endless([IMAGES[:5], IMAGES[5:9], IMAGES[9:]], "source")
    assert [len(stream.next()) for _ in range(5)] == [5, 4, 5, 4, 5]
    single = Endless(list(IMAGES.split(1)), "source")
    assert len(single.next()) == 1


@pytest.mark.parametrize(
    "batch",
    [IMAGES, (IMAGES, 1), [IMAGES], {"label": 0, "image": IMAGES}, {"pixel_values": IMAGES}],
    ids=["tensor", "tuple", "list", "image", "pixel_values"],
)
def test_images_are_taken_out_of_a_batch(batch: Any) -> None:
    assert images_of(batch) is IMAGES


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"photo": IMAGES}, r"target loader holds no images: it is a mapping with 'photo'"),
        ((), r"it is tuple"),
        (("a", IMAGES), r"it is tuple"),
        (IMAGES[:0], r"it is Tensor"),
    ],
)
def test_a_batch_without_images(batch: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        images_of(batch, "target")


def test_a_loader_that_gives_nothing() -> None:
    with pytest.raises(ConfigError, match="target loader gives no batch"):
        Endless(DataLoader(TensorDataset(IMAGES), 20, drop_last=True), "target").next()


def test_a_loader_that_can_be_iterated_once() -> None:
    stream = Endless((batch for batch in IMAGES.split(5)), "source")
    stream.next(), stream.next()
    with pytest.raises(ConfigError, match="second epoch: it can be iterated only once"):
        stream.next()


@pytest.mark.parametrize("loader", [None, IMAGES], ids=["None", "tensor"])
def test_what_is_no_loader(loader: Any) -> None:
    with pytest.raises(ConfigError, match="source loader must give batches"):
        Endless(loader, "source")


def test_a_shorter_loader_is_not_the_same() -> None:
    stream = Endless(LOADERS["list"](), "source")
    stream.next(), stream.next()
    with pytest.raises(RecipeError, match="1 batches where 2 were read"):
        Endless([IMAGES], "source").resume(stream.state())


def test_a_loader_with_a_generator_is_not_one_without() -> None:
    stream = Endless(LOADERS["generator"](), "source")
    stream.next()
    with pytest.raises(RecipeError, match="it has 0 generators, not 1"):
        Endless(LOADERS["shuffled"](), "source").resume(stream.state())
