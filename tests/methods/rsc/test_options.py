"""Every option of RSC does what it says, and nothing when it is neutral."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.patches.rsc.patch import record
from fxgraft.patches.rsc.tensors import batch_count, mute_count
from models.small import SITES, Net, batch, exactly, final_mask, muted_counts, net, patched, recorded


def value_at(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What a bare twin of `model` has at a site in this training pass."""
    seen: list[Tensor] = []
    twin = net()
    twin.load_state_dict(model.state_dict())
    twin.get_submodule(layer).register_forward_hook(lambda _, args, out: seen.append(out.detach().clone()))
    twin(x)
    return seen[0]


@SITES
@pytest.mark.parametrize("scope", ["spatial", "channel"])
def test_a_fixed_scope(scope: str, layer: str) -> None:
    model = patched(net(), layer, scope=scope, spatial_drop=0.25, channel_drop=0.5)
    _, (entry,) = recorded(model, *batch())
    channels, side = (8, 12) if layer == "layer1" else (12, 6)
    assert (entry.site, entry.scope) == (layer, scope)
    if scope == "spatial":
        assert entry.mask.shape == (6, 1, side, side)
        assert muted_counts(entry.mask) == [mute_count(side**2, 0.25)] * 6
    else:
        assert entry.mask.shape == (6, channels, 1, 1)
        assert muted_counts(entry.mask) == [channels // 2] * 6


def test_both_draws_one_scope_for_each_batch() -> None:
    model = patched(net(), "act2")
    x, y = batch()
    drawn = []
    for seed in range(40):
        torch.manual_seed(seed)
        expected = "spatial" if torch.rand(()).item() < 0.5 else "channel"
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        _, (entry,) = recorded(model, x, y)
        assert entry.scope == expected
        exactly(torch.get_rng_state(), after)
        drawn.append(entry.scope)
    assert 10 <= drawn.count("spatial") <= 30


def test_both_needs_only_one_of_the_shares() -> None:
    model = patched(net(), "act2", spatial_drop=0.0)
    x, y = batch()
    for seed in range(10):
        torch.manual_seed(seed)
        _, (entry,) = recorded(model, x, y)
        assert bool((entry.mask == 0).any()) == (entry.scope == "channel")


def test_the_two_saliencies_differ_before_the_tail() -> None:
    masks = {}
    for kind in ("grad_cam", "gradient"):
        _, (entry,) = recorded(patched(net(), "layer1", scope="spatial", saliency=kind), *batch())
        masks[kind] = entry.mask
        assert muted_counts(entry.mask) == [mute_count(144, 1 / 3)] * 6
    assert not torch.equal(masks["grad_cam"], masks["gradient"])


@pytest.mark.parametrize("scope", ["spatial", "both"])
def test_gradient_saliency_at_the_tail_warns_that_it_ties(scope: str) -> None:
    model = net()
    with pytest.warns(fxgraft.FxgraftWarning, match="behind 'act2'.*saliency=\"gradient\" mutes none"):
        patched(model, "act2", scope=scope, saliency="gradient")
    fxgraft.unpatch(model)
    with pytest.warns(fxgraft.FxgraftWarning, match="mutes none"):
        patched(model, "act2", scope="spatial", saliency="gradient")
    _, (entry,) = recorded(model, *batch())
    assert entry.mask.all()
    assert not entry.selected.any()


def test_gradient_saliency_is_the_same_for_channels() -> None:
    results = []
    for kind in ("grad_cam", "gradient"):
        # A warning here would be an error: channels do not tie.
        _, (entry,) = recorded(patched(net(), "act2", scope="channel", saliency=kind), *batch())
        results.append(entry)
    exactly(results[0].mask, results[1].mask)


@SITES
@pytest.mark.parametrize("scope", ["spatial", "channel"])
def test_top_activation_ranks_the_value_itself(scope: str, layer: str) -> None:
    x, y = batch()
    z = value_at(net(), layer, x)
    model = patched(net(), layer, scope=scope, strategy="top_activation", spatial_drop=0.5, channel_drop=0.5)
    _, (entry,) = recorded(model, x, y)
    scores = (z.mean(1) if scope == "spatial" else z.mean((2, 3))).flatten(1)
    top = scores.topk(muted_counts(entry.mask)[0], dim=1).indices
    exactly((entry.mask.flatten(1) == 0).float(), torch.zeros_like(scores).scatter(1, top, 1.0))


@SITES
def test_random_draws_its_ranks_from_torch(layer: str) -> None:
    x, y = batch()
    model = patched(net(), layer, scope="channel", strategy="random", channel_drop=0.5)
    channels = 8 if layer == "layer1" else 12
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        _, (entry,) = recorded(model, x, y)
        torch.manual_seed(seed)
        scores = torch.rand(6, channels)
        exactly((entry.mask.flatten(1) == 0).sum(1), torch.full((6,), channels // 2))
        top = scores.topk(channels // 2, dim=1).indices
        exactly((entry.mask.flatten(1) == 0).float(), torch.zeros_like(scores).scatter(1, top, 1.0))
        masks.append(entry.mask)
    exactly(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


NEUTRAL = [
    {"batch_share": 0.0},
    {"scope": "spatial", "spatial_drop": 0.0},
    {"scope": "channel", "channel_drop": 0.0},
    {"spatial_drop": 0.0, "channel_drop": 0.0},
    {"start": 0.5},
]


@SITES
@pytest.mark.parametrize("options", NEUTRAL, ids=str)
def test_neutral_settings_train_as_the_bare_model(options: dict[str, Any], layer: str) -> None:
    x, y = batch()
    results = []
    for model in (net(dropout=0.3), patched(net(dropout=0.3), layer, **options)):
        torch.manual_seed(7)
        out = model(x)  # and no labels are asked for
        F.cross_entropy(out, y).backward()
        results.append([out, torch.get_rng_state(), *(p.grad for p in model.parameters()), *model.buffers()])
    for expected, actual in zip(*results, strict=True):
        exactly(actual, expected)


def test_a_vector_drop_of_zero_is_neutral() -> None:
    x, y = batch()
    model = patched(net(), "drop", vector_drop=0.0)
    exactly(model(x), net()(x))
    model = patched(net(), "drop", vector_drop=0.25)
    _, (entry,) = recorded(model, x, y)
    assert entry.scope == "vector"
    # 12 features: the quantile of 0.75 lies between the third and fourth largest.
    assert muted_counts(entry.mask) == [3] * 6


@SITES
def test_a_drop_of_one_mutes_everything(layer: str) -> None:
    x, y = batch()
    model = patched(net(), layer, scope="channel", channel_drop=1.0, batch_share=1.0)
    out, (entry,) = recorded(model, x, y)
    assert not entry.mask.any()
    exactly(out, out[:1].expand_as(out))  # the tail of zeros, for every image


@SITES
def test_a_batch_share_of_one_keeps_every_sample_muted(layer: str) -> None:
    _, (entry,) = recorded(patched(net(), layer, scope="channel", batch_share=1.0), *batch())
    assert entry.selected.all()


@SITES
@pytest.mark.parametrize("share", [0.2, 1 / 3, 0.5, 0.9])
def test_the_batch_share_bounds_the_samples_that_stay_muted(share: float, layer: str) -> None:
    x, y = batch(12)
    model = patched(net(), layer, scope="channel", batch_share=share)
    _, (entry,) = recorded(model, x, y)
    assert 0 < entry.selected.sum() <= batch_count(12, share)


def test_the_authors_schedule_follows_progress() -> None:
    model = patched(net(), "act2", scope="channel", batch_schedule="authors", epochs=60, batch_share=0.0)
    (unit,) = fxgraft.grafts(model)[0].units.values()
    shares = []
    for epoch in range(60):
        fxgraft.set_progress(model, epoch / 60)
        shares.append(unit.batch_share)
    assert shares == [0.3] * 10 + [0.5] * 10 + [0.7] * 10 + [0.9] * 10 + [1.0] * 20


def test_nothing_is_muted_before_start() -> None:
    model = patched(net(), "act2", scope="channel", start=0.5, batch_share=1.0)
    x, y = batch()
    for fraction, expected in ((0.0, 0), (0.49, 0), (0.5, 1), (1.0, 1), (0.2, 0)):
        fxgraft.set_progress(model, fraction)
        assert len(recorded(model, x, y)[1]) == expected


def test_several_sites_act_one_after_the_other() -> None:
    x, y = batch()
    model = patched(net(), ["act2", "layer1"], scope="channel", batch_share=1.0)
    _, entries = recorded(model, x, y)
    assert [entry.site for entry in entries] == ["layer1", "act2"]
    assert list(fxgraft.grafts(model)[0].units) == ["act2", "layer1"]
    for entry in entries:
        # The second site sees what the first one left, but ranks channels by the weights of the linear tail.
        alone = patched(net(), entry.site, scope="channel", batch_share=1.0)
        exactly(entry.mask, recorded(alone, x, y)[1][0].mask)
    globbed = patched(net(), "layer?", scope="channel", batch_share=1.0)
    assert [entry.site for entry in recorded(globbed, x, y)[1]] == ["layer1", "layer2"]


@pytest.mark.parametrize("wrong", ["NC", "NLC", "NCL"])
def test_a_layout_of_other_dimensions_is_an_error(wrong: str) -> None:
    model = net()
    with pytest.raises(
        fxgraft.SiteError, match=rf"'layer1' was said to be {wrong}, but its shape is \(2, 8, 12, 12\)"
    ):
        patched(model, "layer1", layout=wrong)
    assert type(model) is Net


def test_a_layout_that_is_told_wins() -> None:
    x, y = batch()
    _, (entry,) = recorded(patched(net(), "layer1", layout="NHWC", scope="channel"), x, y)
    assert entry.mask.shape == (6, 12, 1, 1)  # what stands last counts as channels
    _, (found,) = recorded(patched(net(), "layer1", scope="channel"), x, y)
    assert found.mask.shape == (6, 8, 1, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scope": "rows"}, "scope must be one of 'both', 'spatial', 'channel', got 'rows'"),
        ({"strategy": "best"}, "strategy must be one of"),
        ({"saliency": "cam"}, "saliency must be one of"),
        ({"batch_schedule": "linear"}, "batch_schedule must be one of"),
        ({"layout": "CHWN"}, "layout must be one of"),
        *[
            ({name: value}, rf"{name} must be a share in \[0, 1\]")
            for name, value in itertools.product(
                ("spatial_drop", "channel_drop", "vector_drop", "batch_share", "start"),
                (-0.1, 1.5, True, "1/3"),
            )
        ],
        (
            {"spatial_drop": float("nan")},
            "spatial_drop must be a share.*\nLeave it out for the default, 0.33",
        ),
        ({"batch_schedule": "authors"}, "epochs must be their number, got None.\nPass .* epochs=30"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 2.5}, "epochs must be a whole number of at least 1, got 2.5"),
        ({"ignore_index": "a"}, "ignore_index must be a whole number, got 'a'"),
        ({"drop": 0.3}, "'rsc' has no option 'drop'"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    model = net()
    with pytest.raises(fxgraft.ConfigError, match=match):
        patched(model, "act2", **options)
    assert type(model) is Net


def test_record_needs_rsc() -> None:
    with pytest.raises(fxgraft.SiteError, match="no RSC on this model"), record(net()):
        pass
    model = patched(net(), "act2")
    with record(model) as records:
        model(batch()[0], target=batch()[1])
    model(batch()[0], target=batch()[1])
    assert len(records) == 1


def test_the_final_mask_is_ones_where_a_sample_is_not_selected() -> None:
    _, (entry,) = recorded(patched(net(), "act2", scope="channel", batch_share=0.5), *batch())
    mask = final_mask(entry)
    assert mask[~entry.selected].all()
    exactly(mask[entry.selected], entry.mask[entry.selected])
