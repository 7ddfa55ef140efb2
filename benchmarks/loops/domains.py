"""Images of several domains: the same classes in several styles, tested on a style never seen in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxgraft.errors import ConfigError, candidates

ImagesAndLabels = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Domain:
    """The images of one domain, all in memory.

    Attributes:
        name: what the domain is called, e.g. ``"sketch"``.
        images: uint8 of shape (N, 3, S, S), RGB.
        labels: int64 of shape (N,), indices into `classes`.
        classes: names of the classes, the same for every domain of a set.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, share: float, *, seed: int = 0) -> tuple[Domain, Domain]:
        """Split into a part for training and a part for validation, class by class.

        Args:
            share: what goes to the second part, in [0, 1): ``round(share · count)`` images of each class.
            seed: chooses the images; the same seed gives the same split.

        Returns:
            The two parts, each in the order of this domain.

        Raises:
            ConfigError: if `share` is outside [0, 1).
        """
        if not 0 <= share < 1:
            raise ConfigError(f"The validation share must be in [0, 1), got {share}.")
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.classes)):
            members = (self.labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=generator)
            held[members[order[: round(share * len(members))]]] = True
        parts = [Domain(self.name, self.images[k], self.labels[k], self.classes) for k in (~held, held)]
        return parts[0], parts[1]


def leave_one_out(
    domains: Sequence[Domain], held_out: str, *, validation: float = 0.0, seed: int = 0
) -> tuple[ImagesAndLabels, ImagesAndLabels | None, ImagesAndLabels]:
    """Deal the domains out for one run of domain generalisation.

    Args:
        domains: two or more.
        held_out: name of the domain that is not trained on.
        validation: share of every class of every training domain that is kept from training, in [0, 1).
            The held-out domain never takes part in choosing a model.
        seed: of the split for validation.

    Returns:
        Images and labels to train on, to validate on (None if the share is 0) and to test on: the whole
        held-out domain.

    Raises:
        ConfigError: if there are fewer than two domains, none of that name, or `validation` keeps no image.
    """
    names = [domain.name for domain in domains]
    if len(domains) < 2:
        raise ConfigError(
            f"Leaving one domain out needs two or more, and there is {', '.join(names) or 'none'}."
        )
    if held_out not in names:
        raise ConfigError(f"There is no domain {held_out!r}. {candidates(held_out, names)}")
    rest = [domain.split(validation, seed=seed) for domain in domains if domain.name != held_out]
    test = domains[names.index(held_out)]
    train_set, kept = (_together(parts) for parts in zip(*rest, strict=True))
    if validation and not len(kept[1]):
        raise ConfigError(
            f"A validation share of {validation} of each class rounds to no image at all.\n"
            "Raise it, or use 0 to go without validation."
        )
    return train_set, kept if validation else None, (test.images, test.labels)


def _together(domains: Sequence[Domain]) -> ImagesAndLabels:
    return torch.cat([domain.images for domain in domains]), torch.cat([domain.labels for domain in domains])


def checked_images(data: ImagesAndLabels) -> ImagesAndLabels:
    """Raise `ConfigError` unless these are uint8 images (N, 3, S, S) with a label each; return them."""
    images, labels = data
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ConfigError(
            f"Images must be uint8 of shape (N, 3, S, S), got {images.dtype} of {tuple(images.shape)}."
        )
    if labels.shape != images.shape[:1] or len(labels) == 0:
        raise ConfigError(
            f"Every image needs a label, and there must be at least one: got {len(images)} images "
            f"and labels of shape {tuple(labels.shape)}."
        )
    return images, labels
