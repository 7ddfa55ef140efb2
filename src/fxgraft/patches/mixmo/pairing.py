"""Pairings: which images of a batch MixMo mixes in one pass, under which masks, and whose labels go with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxgraft.extend import ConfigError, PassView, TargetError, check_label_range, draws
from fxgraft.patches.mixmo.masks import Mixing, draw_masks, shuffle_roles
from fxgraft.patches.mixmo.tensors import MixedLabels, balance, dirichlet, one_hot

PAIRING = "pairing"
"""What a pass hands its pairing over by, from unit to unit."""


class MixMoInput:
    """M batches of images that the user paired: ``model(fxgraft.mixmo.MixMoInput([x0, x1]), target=[y0, y1])``.

    Row b of every batch goes into the same mixture; nothing is permuted.

    Args:
        inputs: one tensor (B, C, H, W) per member, all of one shape.

    Raises:
        ConfigError: no inputs, something that isn't a tensor, or different shapes.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = tuple(inputs)
        if not self.inputs or not all(isinstance(member, Tensor) for member in self.inputs):
            raise ConfigError(
                "MixMoInput takes a list of tensors, one batch of images per member.\n"
                "Pass for example MixMoInput([images, other_images])."
            )
        if any(member.shape != self.inputs[0].shape for member in self.inputs):
            shapes = ", ".join(str(tuple(member.shape)) for member in self.inputs)
            raise ConfigError(
                f"MixMoInput was given inputs of different sizes: {shapes}.\n"
                "They are mixed position by position.\nResize them to one size, in batches of one length."
            )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixMoInput:
        """The images on another device."""
        return MixMoInput([member.to(device, non_blocking=non_blocking) for member in self.inputs])

    def pin_memory(self) -> MixMoInput:
        """The images in pinned memory, for loaders."""
        return MixMoInput([member.pin_memory() for member in self.inputs])


@dataclass
class Pairing:
    """The images, masks and labels that one training pass mixes.

    Attributes:
        members: M.
        rows: how many mixtures the pass has: repetitions times the batch, B'.
        size: (H, W) of the images, (T, H, W) of clips and volumes.
        classes: K.
        permutations: (M, B') indices into the batch; none of them where the user paired the inputs.
        inputs: the user's M batches, or none.
        labels: the labels of the pass, as given.
        masks: (M, B', ...) as they were mixed with; None until the stem has drawn them.
        shares: (B', M), what each member has of the map.
        weights: (B', M) of the members' losses.
        even: whether all of these are 1.
    """

    members: int
    rows: int
    size: tuple[int, ...]
    classes: int
    permutations: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    labels: Any
    masks: Tensor | None = None
    shares: Tensor | None = None
    weights: Tensor | None = None
    even: bool = False

    def draw(
        self,
        encoding: Tensor,
        mixing: Mixing,
        chance: Tensor,
        *,
        alpha: float = 2.0,
        r: float = 3.0,
        shuffled: bool = True,
    ) -> None:
        """Draw the masks of the pass, and the weights that follow from them.

        Args:
            encoding: what is to be mixed, (B', C, *positions).
            mixing: see `fxgraft.patches.mixmo.masks.draw_masks`.
            chance: () on the CPU, probability that the batch is mixed so, else linearly.
            alpha: concentration of the ratios.
            r: root that weighs the losses.
            shuffled: deal the roles in a mixture again.
        """
        device, channels = encoding.device, encoding.shape[1]
        grid = self.grid(encoding)
        # As exact as the network, and never coarser than float32.
        dtype = torch.promote_types(encoding.dtype, torch.float32)
        kappa = dirichlet(alpha, self.rows, self.members, device, dtype)
        if mixing == "sum":
            self.masks, self.shares = draw_masks(mixing, kappa, channels, *grid)
            self.weights, self.even = torch.ones_like(self.shares), True
            return
        masks, shares = draw_masks("linear", kappa, channels, *grid)
        on = False if mixing == "linear" else draws.coin(chance, device)
        if on is not False:
            drawn = draw_masks(mixing, kappa, channels, *grid)
            drawn = shuffle_roles(*drawn) if shuffled else drawn
            pairs = zip(drawn, (masks, shares), strict=True)
            masks, shares = drawn if on is True else [torch.where(on, *pair) for pair in pairs]
        self.masks, self.shares, self.weights = masks, shares, balance(shares, r)
        self.even = math.isinf(r)

    def masks_for(self, encoding: Tensor) -> Tensor:
        """Shape the masks to be multiplied with a map (B', C, *positions), that of a coarser or finer stem as well.

        There every position has the mask of the one that lies nearest, so that a member has the same part of the
        image everywhere, to a position.
        """
        masks = self.masks
        if masks is None:
            raise ConfigError("The masks of a pass are drawn before they are used.\nCall draw first.")
        grid = self.grid(encoding)
        missing = 2 + len(grid) - encoding.ndim
        own = masks.shape[3:]
        size = [1 if length == 1 else wanted for length, wanted in zip(own, grid, strict=True)]
        if list(own) != size:
            rows = F.interpolate(masks.flatten(0, 1), size, mode="nearest-exact")
            masks = rows.unflatten(0, masks.shape[:2])
        if missing == 0:
            return masks
        if masks.shape[3:].numel() != 1:
            masks = masks.expand(*masks.shape[:3], *grid)
        return masks.flatten(2) if encoding.ndim == 2 else masks.flatten(3)

    def grid(self, encoding: Tensor) -> tuple[int, ...]:
        """Return the sizes of a map, of a clip or volume with its frames before rows and columns.

        Tokens are arranged as near to the shape of the image as they can be.
        """
        positions: tuple[int, ...] = tuple(encoding.shape[2:]) or (1,) * len(self.size)
        if len(positions) > 1:
            return positions
        tokens = math.prod(positions)
        *frames, height, width = self.size
        if frames:  # of a clip: those factors whose shares in the clip's own sizes are the most alike
            pairs = [(t, h) for t in _divisors(tokens) for h in _divisors(tokens // t)]
            grids = [(t, h, tokens // t // h) for t, h in pairs]
            return min(grids, key=lambda grid: _spread(grid, self.size))
        best = min(_divisors(tokens), key=lambda n: abs(n * n * width - tokens * height))
        return best, tokens // best

    def member_labels(self, y: Any) -> list[Any]:
        """Labels of each member's images.

        Args:
            y: labels of the batch, class indices (B,), soft targets (B, K) or `MixedLabels`; a list of M where
                the user paired the inputs.

        Raises:
            TargetError: labels of another batch, or not one for each member.
        """
        if self.inputs:
            if not isinstance(y, (list, tuple)) or len(y) != self.members:
                raise TargetError(
                    f"The last pass mixed {self.members} inputs of its own, which have labels each.\n"
                    f"Pass a list of {self.members} labels, as target= and to fxgraft.loss."
                )
            return list(y)
        self._check_batch(y)
        return [y[order] for order in self.permutations]

    def soft_labels(self, y: Any, visible: bool = True) -> list[Any]:
        """Labels of each member's images, those of images that are mixed themselves as soft targets.

        Args:
            y: the labels, as for `member_labels`.
            visible: weigh the labels of a mixed image by what the masks leave visible of its parts.
        """
        labels = self.member_labels(y)
        masks = [None] * self.members if self.masks is None or not visible else list(self.masks)
        return [
            part.soft(self.classes, mask) if isinstance(part, MixedLabels) else part
            for part, mask in zip(labels, masks, strict=True)
        ]

    def mixed_label(self) -> Tensor:
        """Soft targets (B', K) of the mixtures: every member's label with its share of the map."""
        labels = self.soft_labels(self.labels)
        shares = [None] if self.shares is None else self.shares.unbind(1)
        parts = []
        for label, share in zip(labels, shares, strict=True):
            soft = label if label.is_floating_point() and label.ndim > 1 else one_hot(label, self.classes)
            parts.append(soft if share is None else soft * share.unsqueeze(1))
        return torch.stack(parts).sum(0)

    def _check_batch(self, y: Any) -> None:
        repeats = self.rows // max(len(self.labels), 1)  # a batch may be empty
        if not isinstance(y, (Tensor, MixedLabels)) or len(y) * repeats != self.rows:
            shown = f"{len(y)} labels" if isinstance(y, (Tensor, MixedLabels)) else f"a {type(y).__name__}"
            raise TargetError(
                f"The pass of this output had labels for {len(self.labels)} samples; the loss was given {shown}.\n"
                "Which sample each member saw is known for all rows of the pass together.\n"
                "Call fxgraft.loss with the whole output and the labels of its batch."
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _spread(grid: Sequence[int], size: Sequence[int]) -> float:
    shares = [math.log(cells / whole) for cells, whole in zip(grid, size, strict=True)]
    return max(shares) - min(shares)


def check_pairs(graft: str, members: int, own: Sequence[Tensor], labels: Any) -> None:
    """Raise unless there is an input and a label for each member where the user paired them, else one label."""
    if own and len(own) != members:
        raise ConfigError(
            f"{graft!r} has {members} members, and MixMoInput holds {len(own)} inputs.\n"
            "Give it one batch of images for each member."
        )
    several = isinstance(labels, (list, tuple))
    if labels is None or (several == (len(own) > 0) and (not own or len(labels) == members)):
        return
    what = f"a list of {len(labels)}" if several else f"a {type(labels).__name__}"
    raise TargetError(
        f"{graft!r} was given {'MixMoInput' if own else 'one batch of images'} with {what} as labels.\n"
        f"Pass one tensor of labels with one batch, and a list of {members} with MixMoInput."
    )


def check_labels(run: PassView, members: int, own: tuple[Tensor, ...], batch: int, classes: int) -> None:
    """Raise unless the labels of a pass are class indices, soft targets or one number for every row that it mixes.

    Args:
        run: the pass, as the graft sees it.
        members: M.
        own: the user's M batches, or none.
        batch: B.
        classes: K.
    """
    check_pairs(run.graft, members, own, run.target)
    parts: Sequence[Any] = run.target if own and run.target is not None else (run.target,)
    for labels in parts:
        # Two lists of indices and a mask: the first stands for all of them.
        part = labels.first if isinstance(labels, MixedLabels) else labels
        taken = run.labels(batch, part)
        if classes > 1:
            check_label_range(run.graft, taken, classes, doubt=run.doubt)
        elif taken.shape[1:].numel() != 1:
            raise TargetError(
                f"{run.graft!r} was given labels of shape {tuple(taken.shape)} for one logit per image.\n"
                "One logit has one label, (B,) or (B, 1), in the form that the criterion takes.\n"
                "Check num_classes of the model."
            )
    if batch == 1 and members > 1 and not own:
        run.tell(
            "small batch",
            "pairs the image of a batch of one with itself: its members see no other image in such a pass.\n"
            "Use larger (micro-)batches, or pair images yourself, fxgraft.mixmo.MixMoInput.",
        )


def known_pairing(last: Pairing | None, out: Tensor) -> Pairing:
    """Return the pairing of a pass if it can be that of the logits ``out`` (M, B', K).

    Raises:
        TargetError: there was no such pass.
    """
    gave = None if last is None else (last.members, last.rows, last.classes)
    if last is None or tuple(out.shape) != gave:
        raise TargetError(
            f"The loss was given logits {tuple(out.shape)} of several members, and the training pass that they are of "
            f"{f'gave {gave}' if gave else 'is not known'}.\n"
            "Which sample each member saw is known for the output of a training pass as a whole.\n"
            "Call fxgraft.loss on what the pass returned, with the model that made it."
        )
    return last
