"""Batches in which every sample occurs several times, for training with several inputs at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.utils.data import BatchSampler, Sampler

from fxgraft.errors import ConfigError


class RepeatedBatchSampler(BatchSampler):
    """Batches that hold each of their samples `repetitions` times, for ``DataLoader(batch_sampler=...)``.

    MixMo and MIMO pair every row of a batch with others. With batch repetition a sample is seen in several
    pairs by one step of the optimiser, each time loaded, and augmented, anew. Where one copy of the sample is
    enough, the repetitions of the patch cost no loading.

    As in the authors' release `batch_size` is the number of rows, repetitions included, and an epoch takes
    `repetitions` times as many batches as without.

    Args:
        sampler: gives the indices of an epoch: any sampler or iterable. Over a `DistributedSampler` every
            process repeats its own part; `set_epoch` is passed on.
        batch_size: rows of a batch; the batch has batch_size / repetitions different samples.
        repetitions: how many times each of them occurs, 1 or more.
        drop_last: leave out the last batch if it is not full.

    Raises:
        ConfigError: repetitions below 1, or a batch size that they do not divide.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        repetitions: int,
        drop_last: bool = False,
    ) -> None:
        for name, value in (("repetitions", repetitions), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if batch_size % repetitions:
            lower = batch_size // repetitions * repetitions
            near = [size for size in (lower, lower + repetitions) if size]
            raise ConfigError(
                f"A batch of {batch_size} rows cannot hold each sample {repetitions} times.\n"
                "batch_size counts the repetitions and must be a multiple of them, such as "
                f"{' or '.join(map(str, near))}."
            )
        super().__init__(sampler, batch_size, drop_last)
        self.repetitions = repetitions

    def _once(self) -> BatchSampler:
        # Made when asked for: frameworks put another sampler in place of this one's.
        return BatchSampler(self.sampler, self.batch_size // self.repetitions, self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for samples in self._once():
            yield samples * self.repetitions

    def __len__(self) -> int:
        return len(self._once())

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler beneath which epoch begins, if it is one that asks."""
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
