"""The probe of RSC leaves no trace, and training goes on from the muted value and from nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from models.small import CLASSES, Net, OpaqueLinear, batch, exactly, final_mask, net, patched, recorded

SITES = pytest.mark.parametrize("layer", ["layer1", "act1", "act2"])
SCOPES = pytest.mark.parametrize("scope", ["spatial", "channel"])
TAILS = pytest.mark.parametrize("linear", [nn.Linear, OpaqueLinear], ids=["closed_form", "general"])


def masked_twin(model: nn.Module, layer: str, mask: Tensor) -> nn.Module:
    """Multiply the value at a site by a given mask, with a forward hook."""
    model.get_submodule(layer).register_forward_hook(lambda _, args, out: out * mask)
    return model


@SITES
@SCOPES
@TAILS
@pytest.mark.parametrize("inplace", [False, True])
def test_training_is_that_of_a_manually_masked_forward(
    linear: type, scope: str, layer: str, inplace: bool
) -> None:
    x, y = batch()
    build = {"dropout": 0.4, "inplace": inplace, "linear": linear}
    model = patched(net(**build), layer, scope=scope, batch_share=0.5)
    torch.manual_seed(11)
    out, (entry,) = recorded(model, x, y)
    fxgraft.loss(model, out, y).backward()
    assert entry.selected.any()

    twin = masked_twin(net(**build), layer, final_mask(entry))
    torch.manual_seed(11)  # the same dropout, since the probe draws nothing
    expected = twin(x)
    F.cross_entropy(expected, y).backward()
    exactly(out, expected)
    for (name, parameter), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, theirs.grad, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        exactly(ours, theirs)  # BatchNorm counted one pass, the muted one


@SITES
@TAILS
def test_the_masks_do_not_depend_on_what_only_training_does(linear: type, layer: str) -> None:
    x, y = batch()
    plain, noisy = (
        recorded(patched(net(dropout=p, linear=linear), layer, scope="channel"), x, y)[1][0]
        for p in (0.0, 0.9)
    )
    exactly(noisy.mask, plain.mask)
    exactly(noisy.selected, plain.selected)


@SITES
@SCOPES
@TAILS
def test_the_closed_form_and_the_general_path_mute_the_same(linear: type, scope: str, layer: str) -> None:
    x, y = batch(12)
    model = patched(net(linear=linear), layer, scope=scope, batch_share=0.5)
    _, (entry,) = recorded(model, x, y)
    # The reference is written out here: autograd through an evaluation-mode copy of the tail.
    twin = net(linear=linear)
    stages = {"layer1": 0, "act1": 1, "act2": 3}[layer]
    modules = [twin.layer1, twin.act1, twin.layer2, twin.act2]
    z = x
    for module in modules[: stages + 1]:
        z = module(z)
    twin.eval()

    def tail(value: Tensor) -> Tensor:
        for module in modules[stages + 1 :]:
            value = module(value)
        return twin.fc(value.mean((2, 3)))

    z = z.detach().requires_grad_()
    logits = tail(z)
    (g,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), z)
    pooled = g.mean((2, 3), keepdim=True)
    scores = (pooled if scope == "channel" else (z * pooled).sum(1)).detach().flatten(1)
    count = int((entry.mask[0] == 0).sum())
    exactly(entry.mask.flatten(1), torch.ones_like(scores).scatter(1, scores.topk(count).indices, 0.0))
    before, after = (F.softmax(tail(v), 1).gather(1, y[:, None])[:, 0] for v in (z, z * entry.mask))
    fall = (before - after - 1e-4).clamp(min=0)
    exactly(entry.selected, fall > fall.sort(descending=True).values[6])


@SITES
@SCOPES
@TAILS
@pytest.mark.filterwarnings("ignore:'rsc' did nothing in a training pass. 'act2' is in evaluation mode")
def test_no_flag_gradient_or_random_state_changes(linear: type, scope: str, layer: str) -> None:
    x, y = batch()
    model = net(linear=linear)
    model.layer2[1].eval()  # a frozen BatchNorm behind the site
    model.layer1[1].eval()
    model.act2.eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    model.fc.weight.requires_grad_(False)
    gradients = [parameter.grad for parameter in model.parameters()]
    patched(model, layer, scope=scope)
    flags = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()

    out, _ = recorded(model, x, y)

    exactly(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        exactly(gradient, torch.full_like(gradient, 3.0))
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        exactly(buffer, before)  # all BatchNorms are frozen here
    assert out.requires_grad


def test_modes_survive_a_failing_pass() -> None:
    x, y = batch()
    model = patched(net(), "layer1", scope="channel")
    model.layer2[1].eval()
    flags = [module.training for module in model.modules()]
    handle = model.layer2[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x, target=y)
    assert [module.training for module in model.modules()] == flags
    handle.remove()
    recorded(model, x, y)  # and the pass that failed has left no labels or values behind
    with pytest.raises(fxgraft.TargetError, match="none were given"):
        model(x)


@SITES
def test_gradients_accumulate_over_batches(layer: str) -> None:
    batches = [batch(seed=1), batch(seed=2)]
    apart = []
    for x, y in batches:
        model = patched(net(norm=False), layer, scope="spatial")
        fxgraft.loss(model, model(x, target=y), y).backward()
        apart.append([p.grad for p in model.parameters()])
    model = patched(net(norm=False), layer, scope="spatial")
    for x, y in batches:
        fxgraft.loss(model, model(x, target=y), y).backward()
    for parameter, *parts in zip(model.parameters(), *apart, strict=True):
        exactly(parameter.grad, parts[0] + parts[1])


@SITES
def test_two_forwards_before_one_backward(layer: str) -> None:
    model = patched(net(norm=False), layer, scope="spatial")
    total: Any = 0
    for seed in (1, 2):
        x, y = batch(seed=seed)
        total = total + fxgraft.loss(model, model(x, target=y), y)
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class FromMap(nn.Module):
    """A network whose image is the value at the site, so that its gradient can be read."""

    def __init__(self, channels: int, linear: type, after: nn.Module | None = None) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.after = after or nn.Identity()
        self.fc = linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.after(self.site(x)).mean((2, 3)))


@SCOPES
@TAILS
@pytest.mark.parametrize(
    ("shape", "share"),
    [((6, 8, 5, 5), 0.5), ((6, 8, 3, 7), 0.5), ((6, 8, 1, 9), 1.0), ((6, 8, 1, 1), 1.0), ((1, 8, 4, 4), 1.0)],
    ids=str,
)
def test_muted_entries_pass_exactly_no_gradient(
    shape: tuple[int, ...], share: float, linear: type, scope: str
) -> None:
    torch.manual_seed(2)
    model = FromMap(8, linear)
    patched(model, "site", scope=scope, batch_share=share, layout="NCHW", input_size=shape[1:])
    z = torch.randn(shape, requires_grad=True)
    y = torch.arange(shape[0]) % CLASSES
    out, (entry,) = recorded(model, z, y)
    fxgraft.loss(model, out, y).backward()
    muted = (final_mask(entry) == 0).expand_as(z)
    assert muted.any()
    assert not z.grad[muted].any()
    assert (z.grad[~muted] != 0).all()
    if scope == "spatial" and shape[2] * shape[3] == 1:
        assert muted.all()  # a third of one position, rounded up
    # In canonical form the mask never cuts across the other scope.
    assert entry.mask.shape == ((shape[0], 8, 1, 1) if scope == "channel" else (shape[0], 1, *shape[2:]))


@TAILS
@pytest.mark.filterwarnings("ignore:'rsc' mutes nothing in a batch of 1")
def test_a_batch_of_one_is_never_selected_by_a_share_below_one_half(linear: type) -> None:
    model = patched(FromMap(8, linear), "site", scope="channel", layout="NCHW", input_size=(8, 4, 4))
    z = torch.randn(1, 8, 4, 4)
    out, (entry,) = recorded(model, z, torch.tensor([2]))
    assert not entry.selected.any()
    exactly(out, copy.deepcopy(model).eval()(z))


@SCOPES
@pytest.mark.parametrize("size", [(24, 40), (17, 9), (8, 64)], ids=str)
def test_sizes_other_than_the_one_patched_at(size: tuple[int, int], scope: str) -> None:
    x, y = batch(6, *size)
    model = patched(net(), ["layer1", "act2"], scope=scope)
    out, entries = recorded(model, x, y)
    fxgraft.loss(model, out, y).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if scope == "spatial":
        height, width = ((n + 1) // 2 for n in size)
        assert [tuple(e.mask.shape[2:]) for e in entries] == [
            (height, width),
            ((height + 1) // 2, (width + 1) // 2),
        ]


@pytest.mark.parametrize("size", [(24, 40), (16, 10), (10, 16)], ids=str)
def test_nonsquare_maps_are_found_when_patching(size: tuple[int, int]) -> None:
    # At 16×10 the map of layer1 is 8 channels of 8×5: its channels and height are equal by chance.
    model = patched(net(), "layer1", input_size=(3, *size))
    (unit,) = fxgraft.grafts(model)[0].units.values()
    assert str(unit.layout) == "NCHW"


@SCOPES
@pytest.mark.parametrize("after", [nn.ReLU, nn.Hardswish, nn.Tanh])
def test_an_inplace_layer_right_after_the_site(after: type, scope: str) -> None:
    torch.manual_seed(3)
    z, y = torch.randn(6, 8, 5, 5), torch.arange(6) % CLASSES
    results = []
    for inplace in [False, True] if after is not nn.Tanh else [False, False]:
        layer = after(inplace=inplace) if after is not nn.Tanh else after()
        torch.manual_seed(4)
        model = FromMap(8, nn.Linear, layer)
        stem = nn.Conv2d(8, 8, 1)
        model = nn.Sequential(stem, model)
        patched(model, "1.site", scope=scope, batch_share=0.5, layout="NCHW", input_size=(8, 5, 5))
        out, (entry,) = recorded(model, z.clone(), y)
        fxgraft.loss(model, out, y).backward()
        results.append([entry.mask, entry.selected, out, stem.weight.grad])
    assert results[0][1].any()
    for expected, actual in zip(*results, strict=True):
        exactly(actual, expected)


def test_no_grad_training_passes_work() -> None:
    x, y = batch()
    model = patched(net(), ["layer1", "act2"], scope="channel")
    with torch.no_grad():
        quiet, first = recorded(copy.deepcopy(model), x, y)
    loud, second = recorded(model, x, y)
    exactly(quiet, loud.detach())
    for a, b in zip(first, second, strict=True):
        exactly(a.mask, b.mask)
    with torch.inference_mode():  # where every tensor made is one that autograd refuses
        x, y = batch()
        silent, third = recorded(model, x, y)
    assert silent.is_inference()
    for a, b in zip(second, third, strict=True):
        exactly(a.mask, b.mask)


def test_frozen_backbone_trains_the_head_only() -> None:
    x, y = batch()
    model: Net = net()
    for parameter in [*model.layer1.parameters(), *model.layer2.parameters()]:
        parameter.requires_grad_(False)
    patched(model, "layer1", scope="channel", batch_share=1.0)
    out, (entry,) = recorded(model, x, y)
    fxgraft.loss(model, out, y).backward()
    assert (entry.mask == 0).any()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}
