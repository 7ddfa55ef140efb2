"""Batches for training with several inputs at once: samples are repeated, or each member gets its own."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

from fxgraft.errors import ConfigError
from fxgraft.extend import is_count, is_number
from fxgraft.patches.mixmo.masks import box_mask, draw_centres
from fxgraft.patches.mixmo.pairing import MixMoInput
from fxgraft.patches.mixmo.tensors import MixedLabels, dirichlet


class RepeatedBatchSampler(BatchSampler):
    """Batches that hold each of their samples `repetitions` times, for ``DataLoader(batch_sampler=...)``.

    MixMo and MIMO pair every row of a batch with others. With batch repetition a sample is seen in several
    pairs by one step of the optimiser, each time loaded, and augmented, again. Where one copy of the sample is
    enough, the repetitions of the patch cost no loading. Members share the batch; `paired_loader` has an image loaded
    for each of them, as the release does.

    As in the authors' release `batch_size` is the number of rows, repetitions included, and an epoch takes
    `repetitions` times as many batches as without.

    Args:
        sampler: the indices of an epoch: any sampler or iterable. Over a `DistributedSampler`
            every process repeats its own part; `set_epoch` is passed on.
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
            if not is_count(value):
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
        # Made on demand: frameworks replace the sampler of this one.
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


class PairedBatchSampler(RepeatedBatchSampler):
    """The same batches, each row with one sample per member: tuples of M indices, for `paired_loader`.

    The members see the same samples of a batch, each in an order of its own.

    Args:
        sampler, batch_size, repetitions, drop_last: see `RepeatedBatchSampler`.
        members: M.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        repetitions: int = 1,
        drop_last: bool = False,
        members: int = 2,
    ) -> None:
        super().__init__(sampler, batch_size, repetitions, drop_last)
        if not is_count(members):
            raise ConfigError(f"members must be a whole number of at least 1, got {members!r}.")
        self.members = members

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:  # type: ignore[override]
        for rows in super().__iter__():
            orders = [torch.randperm(len(rows)).tolist() for _ in range(self.members)]
            yield [tuple(rows[order[row]] for order in orders) for row in range(len(rows))]


class PairedDataset(Dataset[Any]):
    """Loads one image per member, each by itself, and mixes each with another of the data by CutMix, by chance.

    Args:
        data: a data set of (image, label), read by index: images (C, H, W) as floating-point tensors of one size,
            labels as whole numbers.
        cutmix: probability that an image is mixed.
        alpha: parameter of CutMix's Beta distribution.
    """

    def __init__(self, data: Any, cutmix: float = 0.0, alpha: float = 1.0) -> None:
        if not is_number(cutmix) or not 0 <= cutmix <= 1:
            raise ConfigError(f"cutmix must be a probability in [0, 1], got {cutmix!r}.")
        self.data, self.cutmix, self.alpha = data, cutmix, alpha

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, members: Sequence[int]) -> list[tuple[Tensor, int, int, Tensor]]:
        """Return image, its label, that of the image it was mixed with, and whose each pixel is, for every member."""
        return [self._one(index) for index in members]

    def _one(self, index: int) -> tuple[Tensor, int, int, Tensor]:
        image, label = self._load(index)
        mask = torch.ones(1, *image.shape[-2:])
        if self.cutmix == 0 or torch.rand(()).item() >= self.cutmix:
            return image, label, label, mask
        other, second = self._load(int(torch.randint(len(self.data), ())))
        height, width = image.shape[-2:]
        share = dirichlet(self.alpha, 1, 2)[:, 0]
        mask = box_mask(share, draw_centres(1, height, width, device=image.device), height, width)[0]
        mask = 1 - mask if mask.mean() < 0.5 else mask  # the first of the two is the one with the larger part
        return torch.where(mask > 0, image, other), label, second, mask

    def _load(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise ConfigError(
                f"paired_loader was given data whose images are {type(image).__name__}"
                f"{f' of {image.dtype}' if isinstance(image, Tensor) else ''}.\n"
                "Members' images are mixed in the network, so they have to be floating-point tensors (C, H, W).\n"
                "Put ToTensor, or ToImage and ToDtype, last in the data set's transform."
            )
        try:
            return image, operator.index(label)
        except TypeError as error:
            raise ConfigError(
                f"paired_loader was given data with the label {label!r:.60}, and labels are class indices.\n"
                "CutMix names the classes of both images by them; soft labels and numbers to predict have none.\n"
                "Convert them in the data set, as by its target_transform."
            ) from error


def paired_loader(
    data: Any,
    batch_size: int,
    *,
    members: int = 2,
    repetitions: int = 1,
    cutmix: float = 0.0,
    alpha: float = 1.0,
    sampler: Sampler[int] | Iterable[int] | None = None,
    drop_last: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """Load batches as MixMo's release does: every member's image is loaded, augmented and cut-mixed by itself.

    Gives pairs for ``model(images, target=labels)``, with `fxgraft.mixmo.MixMoInput` as images and a list of labels,
    one for each member. A step loads M times as many images as one whose pairs the patch makes by permuting one batch,
    which is the cheaper way: there an image is augmented once, and all members share what was made of it.

    >>> import fxgraft, timm, torch
    >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 4)
    >>> model = fxgraft.patch(timm.create_model("test_resnet", num_classes=4), "mixmo", init="random").train()
    >>> for images, labels in fxgraft.mixmo.paired_loader(data, 8, repetitions=4, cutmix=0.5):
    ...     loss = fxgraft.loss(model, model(images, target=labels), labels)
    >>> len(images.inputs), len(labels)
    (2, 2)

    Args:
        data: a data set of (image, label), read by index: images (C, H, W) as floating-point tensors of one size,
            augmented again whenever they are asked for; labels as class indices.
        batch_size: rows of a batch, repetitions included.
        members: M of the patch.
        repetitions: how many times each sample of a batch occurs for each member; 4 in the release.
        cutmix: probability of mixing an image, a coin for each image and member, with one from all of ``data``; 0.5
            in the release's rows with CutMix. Labels are then `fxgraft.mixmo.MixedLabels`, class indices otherwise.
        alpha: parameter of CutMix's Beta distribution.
        sampler: the indices of an epoch, such as a `DistributedSampler`; by default all of them
            in random order.
        drop_last: leave out the last batch if it is not full.
        **options: options of `torch.utils.data.DataLoader`: num_workers, pin_memory, generator, ...

    Raises:
        ConfigError: repetitions that do not divide the batch, a probability outside [0, 1], ``shuffle=`` among the
            options; in the loop, images that aren't tensors and labels that aren't class indices.
    """
    if "shuffle" in options:
        raise ConfigError(
            "paired_loader was given shuffle=, and takes a sampler: by default one in random order.\n"
            "Pass sampler=range(len(data)) for the order of the data."
        )
    if not is_number(alpha) or not alpha > 0:
        raise ConfigError(f"alpha must be above 0, got {alpha!r}.")
    if sampler is None:
        sampler = RandomSampler(data, generator=options.get("generator"))

    return DataLoader(
        PairedDataset(data, cutmix, alpha),
        batch_sampler=PairedBatchSampler(sampler, batch_size, repetitions, drop_last, members),
        collate_fn=functools.partial(_batch, cutmix > 0),
        **options,
    )


def _batch(mixed: bool, rows: list[list[tuple[Tensor, int, int, Tensor]]]) -> tuple[MixMoInput, list[Any]]:
    """Stack the rows of a batch, member by member."""
    images, labels = [], []
    for member in zip(*rows, strict=True):
        parts, first, second, masks = zip(*member, strict=True)
        images.append(torch.stack(parts))
        one = torch.tensor(first)
        labels.append(MixedLabels(one, torch.tensor(second), torch.stack(masks)) if mixed else one)
    return MixMoInput(images), labels
