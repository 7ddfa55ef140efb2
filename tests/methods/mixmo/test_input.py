"""What MixMo is given: labels of every kind, inputs of the user's own pairing, options; and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

import fxgraft
from fxgraft import ConfigError, MixMo, StructureError, TargetError
from fxgraft.mixmo import MixMoInput
from fxgraft.patches.mixmo.patch import Encoders
from methods.mixmo.mixing import last_pairing, patched, unit
from models.small import CLASSES, batch, net

# Labels.


def test_soft_targets_are_permuted_with_their_images() -> None:
    model = patched(mixing="linear")
    x, y = batch()
    x, soft = Mixup(mixup_alpha=0.4, num_classes=CLASSES, label_smoothing=0.1, prob=1.0)(x, y)
    out = model(x, target=soft)
    last = last_pairing(model)
    expected = sum(
        (last.weights[:, i] * F.cross_entropy(out[i], soft[order], reduction="none")).mean()
        for i, order in enumerate(last.permutations)
    )
    torch.testing.assert_close(fxgraft.loss(model, out, soft), expected)


@pytest.mark.parametrize("visible", [True, False])
def test_mixed_images_have_the_labels_of_what_is_seen_of_them(visible: bool) -> None:
    model = patched(p=1.0, repetitions=2, visible_labels=visible)
    x, y = batch()
    mixed, labels = fxgraft.mixmo.input_cutmix(x, y)
    out = model(mixed, target=labels)
    last = last_pairing(model)
    expected = torch.zeros(())
    for i, order in enumerate(last.permutations):
        shown = labels[order]
        seen = F.interpolate(last.masks[i], size=(24, 24)) if visible else torch.ones_like(shown.mask)
        share = (shown.mask * seen).sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp(min=1e-6)
        target = share[:, None] * F.one_hot(shown.first, CLASSES)
        target = target + (1 - share[:, None]) * F.one_hot(shown.second, CLASSES)
        expected = expected + (last.weights[:, i] * F.cross_entropy(out[i], target, reduction="none")).mean()
    torch.testing.assert_close(fxgraft.loss(model, out, labels), expected)


def test_labels_from_around_the_call() -> None:
    model = patched()
    x, y = batch()
    with fxgraft.targets(y):
        out = model(x)
    fxgraft.loss(model, out, y, nn.CrossEntropyLoss(label_smoothing=0.1)).backward()
    for images, labels in fxgraft.with_targets([(x, y)]):
        fxgraft.loss(model, model(images), labels).backward()


def test_in_evaluation_the_loss_is_the_users() -> None:
    model = patched().eval()
    x, y = batch()
    out = model(x, target=y)
    assert torch.equal(fxgraft.loss(model, out, y), F.cross_entropy(out, y))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, "needs the labels of the batch"),
        (torch.arange(3), "labels for 3 samples with a batch of 6"),
        (torch.arange(6), "class indices from 0 to 5 for 5 classes"),
        (torch.rand(6, 3), "soft targets for 3 classes; the model has 5"),
        ([torch.arange(6) % 5] * 2, "one batch of images with a list of 2 as labels"),
    ],
)
def test_wrong_labels(labels: Any, match: str) -> None:
    model = patched()
    x, y = batch()
    with pytest.raises(TargetError, match=match):
        model(x, target=labels)
    assert model(x, target=y).shape == (2, 6, CLASSES)


def test_the_loss_is_for_the_pass_of_its_output() -> None:
    model = patched()
    x, y = batch()
    with pytest.raises(TargetError, match="training pass that they are of is not known"):
        fxgraft.loss(model, torch.zeros(2, 6, CLASSES), y)
    out = model(x, target=y)
    with pytest.raises(TargetError, match="had labels for 6 samples; the loss was given 3 labels"):
        fxgraft.loss(model, out, y[:3])
    with pytest.raises(TargetError, match="other labels than the pass of this output"):
        fxgraft.loss(model, out, (y + 1) % CLASSES)
    with pytest.raises(TargetError, match=r"\(2, 4, 5\) of several members.*gave \(2, 6, 5\)"):
        fxgraft.loss(model, out[:, :4], y[:4])
    fxgraft.loss(model, out, y)


# The user's own pairs.


class Padded(nn.Module):
    """Normalises and pads the image before its stem."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 0, 1, 0))
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.pad((x - 0.5) / 0.25))


@pytest.mark.parametrize("kind", [net, Padded])
def test_own_pairs(kind: Any) -> None:
    torch.manual_seed(0)
    model = patched(kind(), mixing="linear", members=2, spread=0)
    first, second = batch(seed=1), batch(seed=2)
    maps: list[Tensor] = []
    stem = unit(model, Encoders).path
    model.get_submodule(stem).register_forward_hook(lambda module, args, out: maps.append(out))
    out = model(MixMoInput([first[0], second[0]]), target=[first[1], second[1]])
    last = last_pairing(model)
    alone = []
    for x, y in (first, second):  # all members alike: each image by itself
        with torch.no_grad():
            model(MixMoInput([x, x]), target=[y, y])
        alone.append(maps[-1])
    share = last.shares[:, 0].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(maps[0], share * alone[0] + (1 - share) * alone[1], rtol=1e-4, atol=1e-5)

    out = model(MixMoInput([first[0], second[0]]), target=[first[1], second[1]])
    last = last_pairing(model)
    expected = sum(
        (last.weights[:, i] * F.cross_entropy(out[i], y, reduction="none")).mean()
        for i, (_, y) in enumerate((first, second))
    )
    torch.testing.assert_close(fxgraft.loss(model, out, [first[1], second[1]]), expected)
    with pytest.raises(TargetError, match="Pass a list of 2 labels"):
        fxgraft.loss(model, out, first[1])


def test_own_pairs_that_do_not_fit() -> None:
    model = patched(members=3)
    x, y = batch()
    with pytest.raises(ConfigError, match="has 3 members, and MixMoInput holds 2 inputs"):
        model(MixMoInput([x, x]), target=[y, y, y])
    with pytest.raises(TargetError, match="MixMoInput with a list of 2 as labels"):
        model(MixMoInput([x, x, x]), target=[y, y])
    with pytest.raises(TargetError, match="MixMoInput with a Tensor as labels"):
        model(MixMoInput([x, x, x]), target=y)
    with pytest.raises(TargetError, match="labels for 3 samples with a batch of 6"):
        model(MixMoInput([x, x, x]), target=[y, y, y[:3]])
    with pytest.raises(ConfigError, match=r"different sizes: \(6, 3, 24, 24\), \(6, 3, 12, 12\)"):
        MixMoInput([x, x[..., :12, :12]])
    with pytest.raises(ConfigError, match="takes a list of tensors"):
        MixMoInput([])
    with pytest.raises(ConfigError, match="the model is in evaluation mode"):
        model.eval()(MixMoInput([x, x, x]))


def test_own_pairs_compile() -> None:
    torch.compiler.reset()
    model = patched()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, y = batch()
    for _ in range(2):
        out = compiled(MixMoInput([x, x.flip(0)]), target=[y, y.flip(0)])
    fxgraft.loss(model, out, [y, y.flip(0)]).backward()
    torch.compiler.reset()


# Options.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"members": 0}, "members must be a whole number of at least 1, got 0"),
        ({"members": 2.0}, "members must be a whole number"),
        ({"repetitions": 0}, "repetitions must be a whole number of at least 1"),
        ({"repetitions": True}, "repetitions must be a whole number"),
        ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ({"alpha": -1}, "alpha must be a positive number"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"r": 0}, "r must be a positive number"),
        ({"p": 1.1}, r"p must be a share in \[0, 1\]"),
        ({"decay": -0.1}, "decay must be a share"),
        ({"kept": 2}, "kept must be a share"),
        ({"spread": -0.1}, "spread must be a share"),
        ({"mixing": "cutmix"}, "mixing must be one of 'linear', 'sum', 'cut'"),
        ({"init": "zeros"}, "init must be one of 'pretrained', 'random'"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        MixMo(**options)


class Flat(nn.Module):
    """One vector per image, without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(48, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x.flatten(1)).relu())


def test_vectors_mix_without_positions() -> None:
    for mixing in ("linear", "sum", "channel", "stack_channel"):
        model: Any = fxgraft.patch(Flat(), "mixmo", mixing=mixing, p=1.0, input_size=(3, 4, 4))
        y = torch.arange(4)
        fxgraft.loss(model, model(torch.randn(4, 3, 4, 4), target=y), y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ConfigError, match="'cut' needs positions, and 'first' gives one vector per image"):
        fxgraft.patch(Flat(), "mixmo", input_size=(3, 4, 4))


class Two(nn.Module):
    """Two stems of different widths on one image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat((self.a(x), self.b(x)), 1).mean((2, 3)))


def test_parallel_stems_share_their_masks() -> None:
    model: Any = fxgraft.patch(Two(), "mixmo", p=1.0, spread=0, input_size=(3, 8, 8))
    maps: list[Tensor] = []
    for stem in (model.a, model.b):
        stem.register_forward_hook(lambda module, args, out: maps.append(out))
        for parameter in stem.parameters():
            nn.init.ones_(parameter)
    x = torch.cat((torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)))
    for _ in range(5):
        maps.clear()
        model(x, target=torch.arange(2))
        assert torch.equal(maps[0][:, :1], maps[1][:, :1])
    with pytest.raises(ConfigError, match=r"needs stems of one width, and there are \{'a': 4, 'b': 6\}"):
        fxgraft.patch(Two(), "mixmo", mixing="channel", input_size=(3, 8, 8))


def test_what_follows_a_classifier_must_keep_rows_apart() -> None:
    class Rows(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.first(x.flatten(1)).relu()).view(x.shape[0], -1)

    model: Any = fxgraft.patch(Rows(), "mixmo", mixing="linear", input_size=(3, 4, 4))
    with pytest.raises(StructureError, match="gave 4 rows of logits for 2 members and 4 mixtures"):
        model(torch.randn(4, 3, 4, 4), target=torch.arange(4))


def test_described_by_its_ends() -> None:
    text = str(fxgraft.summary(patched(members=3, repetitions=2)))
    assert (
        "3 encoders at layer1.0 and heads at fc, cut mixing with probability 0.5, each batch 2 times" in text
    )
    plan = fxgraft.patch(net(), "mixmo", dry_run=True, input_size=(3, 24, 24))
    assert "layer1.0: Encoders instead, in training and evaluation" in str(plan)


class Auxiliary(nn.Module):
    """Has a second head while it trains, which wants larger images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.aux = nn.Conv2d(4, 5, 8)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        out = self.fc(z.mean((2, 3)))
        return out + self.aux(z).mean((2, 3)) if self.training else out


def test_images_that_are_too_small_for_training() -> None:
    with pytest.raises(
        fxgraft.StructureError, match=r"'aux' in Auxiliary(?s:.*)Kernel size(?s:.*)input_size="
    ):
        fxgraft.patch(Auxiliary(), "mixmo", input_size=(3, 8, 8))
