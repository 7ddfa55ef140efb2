"""CrossNorm where predictions and labels meet: consistency training, and the block before global pooling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft import ConfigError
from fxgraft.functional.modulation import instance_moments
from methods.crossnorm.test_patch import SMALL, resnet, watch


def test_consistency_adds_the_divergence_of_two_more_passes() -> None:
    model = fxgraft.patch(
        resnet(), "crossnorm", consistency=True, p=1.0, active=None, consistency_weight=3.0, **SMALL
    )
    on, x, y = watch(model.train()), torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    out = model(x)
    assert on == [[]]
    torch.manual_seed(1)
    parts = fxgraft.losses(model, out, y)
    assert len(on[0]) == 16  # eight units, two passes
    torch.manual_seed(1)
    with fxgraft.grafts(model)[0].override(forced=True):
        others = [model(x), model(x)]
    chances = [each.softmax(1) for each in (out, *others)]
    mixture = sum(chances) / 3
    divergence = sum((p * (p / mixture).log()).sum(1).mean() for p in chances) / 3
    torch.testing.assert_close(parts["crossnorm.consistency"], 3.0 * divergence, rtol=1e-3, atol=1e-6)
    parts["crossnorm.consistency"].backward()
    assert set(parts) == {"criterion", "crossnorm.consistency"}


def test_a_step_compares_with_probability_p() -> None:
    bare = resnet()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])

    def compares(p: float, steps: int) -> list[bool]:
        model = fxgraft.patch(copy.deepcopy(bare), "crossnorm", consistency=True, p=p, **SMALL).train()
        found = [set(fxgraft.losses(model, model(x), y)) for _ in range(steps)]
        return ["crossnorm.consistency" in parts for parts in found]

    before = torch.get_rng_state()
    assert not any(compares(0.0, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(compares(1.0, 3))
    assert 8 <= sum(compares(0.5, 30)) <= 22
    model = fxgraft.patch(copy.deepcopy(bare), "crossnorm", consistency=True, p=0.1, **SMALL).train()
    torch.manual_seed(0)  # the first draw is above 0.1: one clean pass and nothing else
    loss = fxgraft.loss(model, model(x), y)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(bare.train()(x), y))


def test_consistency_is_a_matter_of_training_and_of_its_own_batch() -> None:
    model = fxgraft.patch(resnet(), "crossnorm", consistency=True, p=1.0, **SMALL).eval()
    x, y = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    assert set(fxgraft.losses(model, model(x), y)) == {"criterion"}
    out = model.train()(x)
    model(x[:2])
    torch.manual_seed(0)
    parts = fxgraft.losses(model, out, y)  # on the batch that gave these predictions, not on the last one
    again = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(
        parts["crossnorm.consistency"], fxgraft.losses(model, again, y)["crossnorm.consistency"]
    )
    torch.manual_seed(0)
    torch.testing.assert_close(  # made again, as a wrapper may do
        fxgraft.losses(model, out + 0, y)["crossnorm.consistency"], parts["crossnorm.consistency"]
    )
    with pytest.raises(ConfigError, match=r"loss of 2 predictions, but .* had 3 images"):
        fxgraft.loss(model, out[:2], y[:2])


def test_without_the_last_unit_the_pooled_features_keep_their_own_statistics() -> None:
    x = torch.randn(4, 3, 64, 64) * torch.rand(4, 3, 1, 1) + torch.randn(4, 3, 1, 1)
    seen: dict[str, Tensor] = {}
    for skip in (False, True):
        model = fxgraft.patch(resnet(), "crossnorm", p=1.0, active=None, skip_last=skip, **SMALL).train()
        assert ("layer4.1.add" in fxgraft.grafts(model)[0].units) is not skip
        last = model.layer4[1]
        last.register_forward_pre_hook(lambda _, args: seen.update(given=args[0]))
        last.act2.register_forward_pre_hook(lambda _, args: seen.update(summed=args[0].clone()))
        model.global_pool.register_forward_pre_hook(lambda _, args: seen.update(pooled=args[0]))
        model(x)
        branch = last.bn2(last.conv2(last.act1(last.bn1(last.conv1(seen["given"])))))
        own = instance_moments(branch + seen["given"])
        found = instance_moments(seen["summed"])
        # The unit hands on a permutation of the batch's statistics; without it they are those of the block itself.
        assert torch.allclose(found[0], own[0], atol=1e-4) is skip
        assert torch.allclose(found[1], own[1], rtol=1e-3) is skip
        torch.testing.assert_close(found[0].sum(0), own[0].sum(0), rtol=1e-3, atol=1e-3)
        if skip:
            torch.testing.assert_close(seen["pooled"], (branch + seen["given"]).relu(), rtol=1e-3, atol=1e-4)
    model = fxgraft.patch(resnet(), "crossnorm", layers=("layer3.1", "layer4"), skip_last=True, **SMALL)
    assert list(fxgraft.grafts(model)[0].units) == ["layer3.1.add", "layer4.0.add"]


def test_of_several_views_the_clean_images_alone_are_compared() -> None:
    bare = resnet().double()
    options: dict[str, Any] = {"consistency": True, "p": 1.0, "active": 2, **SMALL}
    views = fxgraft.patch(copy.deepcopy(bare), "crossnorm", views=3, **options).train()
    x, y = torch.randn(6, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 1])
    found, rows = [], []
    views.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    for rows_given in (
        6,
        2,
    ):  # predictions of all views, of which the first are the clean images', or of those alone
        out = views(x)
        torch.manual_seed(0)
        parts = fxgraft.losses(views, out[:rows_given], y.repeat(rows_given // 2))
        found.append(parts["crossnorm.consistency"])
    assert rows == [6, 2, 2, 6, 2, 2]
    alone = fxgraft.patch(copy.deepcopy(bare), "crossnorm", **options).train()
    torch.manual_seed(0)
    with fxgraft.grafts(alone)[0].override(forced=True):
        others = [alone(x[:2]) for _ in range(2)]
    wanted = 10 * fxgraft.functional.jensen_shannon(out[:2], *others)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], wanted, rtol=0, atol=1e-12)


def test_views_that_a_batch_does_not_hold() -> None:
    model = fxgraft.patch(resnet(), "crossnorm", consistency=True, views=3, p=1.0, **SMALL).train()
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ConfigError, match=r"loss of 4 predictions, but .* had 4 images, 3 views of each"):
        fxgraft.loss(model, model(x), y)
    with pytest.raises(ConfigError, match="views must be a whole number of at least 1, got 0"):
        fxgraft.CrossNorm(views=0)


@pytest.mark.parametrize("logits", [torch.zeros(4), torch.zeros(()), [0.0, 1.0]])
def test_the_divergence_is_of_rows(logits: Any) -> None:
    with pytest.raises(ConfigError, match=r"among logits \(B, K\)(?s:.*)a single image: \(1, K\)"):
        fxgraft.functional.jensen_shannon(logits, logits)
