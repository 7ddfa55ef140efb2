"""The digits game of deep activation matching (Huang, Huang, Krähenbühl, ECCV 2018): five steps of the release.

Adam is torch's on both sides. The release's, of TensorFlow 1, adds its ε before the correction of the bias.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.gam import discriminators
from methods.releases import STEPS, TOLERANCE

SIZE = 6
TAPS = {"relu_2": 0.1, "fc4": 1.0}  # the release taps fc3 behind its ReLU


class LeNet(nn.Module):
    """Two convolutions and two linear layers; the inner one is matched, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 8, 5)
        self.fc3, self.fc4 = nn.Linear(8 * 4 * 4, 30), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc4(F.relu(self.fc3(x.flatten(1))))


def activations(p: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The last two layers of a `LeNet` with the given weights."""
    for name in ("conv1", "conv2"):
        x = F.max_pool2d(F.relu(F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"])), 2)
    inner = F.relu(x.flatten(1) @ p["fc3.weight"].T + p["fc3.bias"])
    return {"relu_2": inner, "fc4": inner @ p["fc4.weight"].T + p["fc4.bias"]}


def verdict(d: Mapping[str, Tensor], tap: str, x: Tensor) -> Tensor:
    """Two hidden layers and two logits: source, target."""
    for layer in range(3):
        x = x @ d[f"{tap}.layers.{layer}.weight"].T + d[f"{tap}.layers.{layer}.bias"]
        x = F.relu(x) if layer < 2 else x
    return x


def release(
    source: Mapping[str, Tensor], players: Mapping[str, Tensor], batches: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Play the game: after each step the weights of both sides, and what their losses were before it."""
    w = {name: each.detach().clone().requires_grad_() for name, each in source.items()}
    d = {name: each.detach().clone().requires_grad_() for name, each in players.items()}
    sides = [torch.optim.Adam(each.values(), 2e-4, (0.5, 0.999)) for each in (w, d)]
    truth = torch.cat((torch.zeros(SIZE), torch.ones(SIZE))).long()
    for x_source, x_target in batches:
        known, found = activations(source, x_source), activations(w, x_target)
        adversary = mapping = torch.zeros((), dtype=torch.float64)
        for tap, weight in TAPS.items():
            logits = verdict(d, tap, torch.cat((known[tap], found[tap])))
            adversary = adversary + weight * F.cross_entropy(logits, truth)
            mapping = mapping + weight * F.cross_entropy(logits, 1 - truth)
        mapping = mapping + sum((source[name] - w[name]).square().mean() for name in w)
        gradients = [
            torch.autograd.grad(loss, list(own.values()), retain_graph=True)
            for loss, own in ((mapping, w), (adversary, d))
        ]
        for own, found_gradients, side in zip((w, d), gradients, sides, strict=True):
            for each, gradient in zip(own.values(), found_gradients, strict=True):
                each.grad = gradient
            side.step()
        yield {**w, **d}, mapping.detach(), adversary.detach()


def test_five_steps_of_the_release() -> None:
    torch.manual_seed(0)
    model = LeNet().double()
    source = {name: each.detach().clone() for name, each in model.named_parameters()}
    fxgraft.patch(model, "gam", preset="digits", layers=list(TAPS), input_size=(1, 28, 28))
    judging = discriminators(model)
    players = copy.deepcopy(dict(_judges(judging)))
    batches = [
        (torch.randn(SIZE, 1, 28, 28).double(), 0.5 + 2 * torch.randn(SIZE, 1, 28, 28).double())
        for _ in range(STEPS)
    ]
    game, worst = release(source, players, batches), []

    def compare(done: int, values: Mapping[str, float]) -> None:
        weights, mapping, adversary = next(game)
        ours = {**dict(model.named_parameters()), **dict(_judges(judging))}
        assert sorted(ours) == sorted(weights)
        worst.extend((ours[name] - weights[name]).abs().max().item() for name in weights)
        worst.append(abs(values["mapping"] - mapping.item()))
        worst.append(abs(values["discriminator"] - adversary.item()))

    fxgraft.adapt(
        model, [s for s, _ in batches], [t for _, t in batches], steps=STEPS, lr=2e-4, betas=(0.5, 0.999),
        progress=False, callback=compare, log_every=1,
    )  # fmt: skip
    assert max(worst) < TOLERANCE
    assert len(worst) == STEPS * (2 + len(source) + len(players))
    assert all(not torch.equal(each, source[name]) for name, each in model.named_parameters())


def _judges(module: nn.ModuleDict) -> Iterator[tuple[str, Tensor]]:
    for tap, each in module.items():
        for name, parameter in each.named_parameters():
            yield f"{tap}.{name}", parameter
