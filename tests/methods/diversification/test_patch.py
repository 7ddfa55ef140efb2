"""The diversification patch on models: the head rewrite, the maps, the loss."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import ConfigError, SiteError, StructureError
from fxgraft.patches.diversification.patch import maps, record
from fxgraft.patches.diversification.tensors import damp
from methods.diversification.diversified import CLASSES, NEUTRAL, Net, images, net, patched, small_resnet


class TestHead:
    def test_the_rewrite_alone_changes_no_logit_and_no_gradient(self):
        x, y = images()
        bare, model = net(), patched(**NEUTRAL)
        F.cross_entropy(bare(x), y).backward()
        F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(model(x), bare(x))
        for name, parameter in bare.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)

    @pytest.mark.parametrize("options", [{"alpha": 1.0}, {"p_peak": 0.0, "p_patch": 0.0}])
    def test_nothing_is_drawn_where_nothing_can_be_damped(self, options):
        x, _ = images()
        state = torch.get_rng_state()
        patched(**options).train()(x)
        assert torch.equal(torch.get_rng_state(), state)

    def test_evaluation_is_the_bare_model_bit_for_bit(self):
        x, _ = images()
        state = torch.get_rng_state()
        assert torch.equal(patched().eval()(x), net().eval()(x))
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_logits_are_the_average_of_the_damped_maps(self):
        x, _ = images()
        model = patched()
        with record(model) as records:
            out = model(x)
        (seen,) = records
        assert seen.maps.shape == (4, CLASSES, 8, 8)
        assert 0.1 < seen.mask.double().mean() < 0.8
        torch.testing.assert_close(out, damp(seen.maps, seen.mask, 0.1).mean((2, 3)))
        weight, bias = model.fc.weight, model.fc.bias
        expected = torch.einsum("kc,bchw->bkhw", weight, F.relu(model.conv(x))) + bias[:, None, None]
        torch.testing.assert_close(seen.maps, expected.detach())

    def test_gradients_pass_with_alpha_where_damped(self):
        x, _ = images()
        model = patched(alpha=0.0, return_maps=True)
        with record(model) as records:
            out = model(x)
        (gradient,) = torch.autograd.grad(out.logits.sum(), out.maps)
        assert torch.equal(gradient == 0, records[0].mask)
        torch.testing.assert_close(
            gradient[~records[0].mask], torch.tensor(1 / 64).expand(int((~records[0].mask).sum()))
        )

    def test_keys_parameters_and_modules_stay(self):
        bare, model = net(), net()
        kept = dict(model.named_modules())
        patched(model)
        assert list(model.state_dict()) == list(bare.state_dict())
        assert dict(model.named_modules()) == kept
        assert not fxgraft.grafts(model)[0].parameters()
        fxgraft.unpatch(model)
        assert type(model) is Net
        assert torch.equal(model(images()[0]), bare(images()[0]))

    def test_dropout_drops_what_it_would_have_dropped_in_front_of_the_classifier(self):
        x, _ = images()
        bare, model = net(dropout=0.5), patched(net(dropout=0.5), **NEUTRAL)
        torch.manual_seed(3)
        expected = bare(x)
        torch.manual_seed(3)
        torch.testing.assert_close(model(x), expected)
        assert not torch.allclose(bare(x), expected)

    def test_batch_norm_between_keeps_the_statistics_of_the_pooled_vectors(self):
        def build() -> nn.Sequential:
            torch.manual_seed(0)
            body = nn.Conv2d(3, 6, 3, 2, 1)
            norm = nn.BatchNorm1d(6)
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm, nn.Linear(6, CLASSES))

        x, y = images()
        bare, model = build(), patched(build(), **NEUTRAL)
        F.cross_entropy(bare(x), y).backward()
        F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(dict(model.named_buffers()), dict(bare.named_buffers()))
        for name, parameter in bare.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-4)
        assert "differ" not in str(fxgraft.summary(model))

    def test_layers_that_do_not_commute_run_at_every_position_and_are_noted(self):
        def head() -> nn.Sequential:
            torch.manual_seed(0)
            parts = [nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, CLASSES)]
            return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1), *parts)

        x, _ = images()
        bare, model = head(), patched(head(), **NEUTRAL)
        assert "heads of training and evaluation differ" in str(fxgraft.summary(model))
        features = bare[0](x)
        cells = [bare[1:](features[:, :, i : i + 1, j : j + 1]) for i in range(8) for j in range(8)]
        torch.testing.assert_close(model(x), torch.stack(cells).mean(0))
        assert torch.equal(model.eval()(x), bare(x))

    def test_a_new_classifier_is_picked_up(self):
        x, _ = images(size=64)
        model = fxgraft.patch(small_resnet(), "diversification", input_size=(3, 64, 64))
        model.reset_classifier(7)
        assert model.get_classifier() is model.fc
        assert model.train()(x).shape == (4, 7)
        assert model.eval()(x).shape == (4, 7)
        model.train()(x).sum().backward()
        assert model.fc.weight.grad.any()

    def test_another_kind_of_head_is_noticed(self):
        model = fxgraft.patch(small_resnet(), "diversification", input_size=(3, 64, 64)).train()
        model.reset_classifier(7, "max")
        with pytest.raises(StructureError, match="a maximum over positions"):
            model(images(size=64)[0])

    def test_tokens_are_maps_where_they_are_averaged(self):
        torch.manual_seed(0)
        small = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
        model = timm.create_model(
            "vit_tiny_patch16_224", num_classes=CLASSES, global_pool="avg", fc_norm=False, **small
        )
        nn.init.normal_(model.head.weight)
        bare = copy.deepcopy(model)
        fxgraft.patch(model, "diversification", **NEUTRAL)
        x, _ = images(size=48)
        torch.testing.assert_close(model.train()(x), bare.train()(x))
        with record(model) as records:
            model(x)
        assert records[0].maps.shape == (4, CLASSES, 6, 6)
        # Row by row: the first image's first row of patches is the first row of its map.
        tokens = bare.forward_features(x)[:, 1:]
        torch.testing.assert_close(
            records[0].maps[:, :, 0, :].movedim(1, -1), bare.head(tokens[:, :6]).detach()
        )

    def test_a_model_without_an_average_says_what_to_do(self):
        model = timm.create_model(
            "vit_tiny_patch16_224", num_classes=3, img_size=32, embed_dim=24, depth=1, num_heads=2
        )
        with pytest.raises(StructureError, match=r"a class token[\s\S]*global_pool='avg'"):
            fxgraft.patch(model, "diversification")


class TestMaps:
    def test_their_average_is_the_logits(self):
        x, _ = images()
        for model in (net().eval(), patched().eval()):
            found = maps(model, x)
            assert found.shape == (4, CLASSES, 8, 8)
            torch.testing.assert_close(found.mean((2, 3)), model(x))

    def test_looking_changes_nothing(self):
        model = patched(net(dropout=0.5))
        model.fc.eval()
        flags = [m.training for m in model.modules()]
        state = torch.get_rng_state()
        maps(model, images()[0])
        assert [m.training for m in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), state)

    def test_on_request_training_passes_return_them(self):
        x, y = images()
        model = patched(return_maps=True, alpha=1.0)
        out = model(x)
        torch.testing.assert_close(out.maps.mean((2, 3)), out.logits)
        torch.testing.assert_close(fxgraft.loss(model, out, y), F.cross_entropy(out.logits, y))
        assert isinstance(model.eval()(x), Tensor)

    def test_record_without_a_patch(self):
        with pytest.raises(SiteError, match="no diversification block"), record(net()):
            pass


class TestLoss:
    def test_the_patch_asks_for_it(self):
        x, y = images()
        model = patched(loss="gradient_boosting", loss_k=3, **NEUTRAL)
        out = model(x)
        expected = fxgraft.gradient_boosting_cross_entropy(out, y, k=3)
        assert torch.equal(fxgraft.loss(model, out, y), expected)
        assert not torch.equal(expected, F.cross_entropy(out, y))

    def test_the_schedule_starts_it(self):
        x, y = images()
        model = patched(loss="gradient_boosting", loss_k=3, loss_start=0.5)
        out = model(x)
        assert torch.equal(fxgraft.loss(model, out, y), F.cross_entropy(out, y))
        fxgraft.set_progress(model, 0.5)
        assert torch.equal(fxgraft.loss(model, out, y), fxgraft.gradient_boosting_cross_entropy(out, y, k=3))
        assert "from 50% of the training" in str(fxgraft.summary(model))
        fxgraft.set_progress(model, 0.0)
        assert torch.equal(fxgraft.loss(model, out, y), F.cross_entropy(out, y))

    @pytest.mark.parametrize(
        "criterion",
        [nn.CrossEntropyLoss(label_smoothing=0.1), functools.partial(F.cross_entropy, label_smoothing=0.1)],
        ids=["module", "partial"],
    )
    def test_settings_of_cross_entropy_carry_over(self, criterion):
        x, y = images()
        model = patched(loss="gradient_boosting", loss_k=3)
        out = model(x)
        expected = fxgraft.gradient_boosting_cross_entropy(out, y, k=3, label_smoothing=0.1)
        assert torch.equal(fxgraft.loss(model, out, y, criterion), expected)

    def test_another_criterion_is_refused(self):
        x, y = images()
        model = patched(loss="gradient_boosting")
        with pytest.raises(ConfigError, match=r"was given multi_margin_loss[\s\S]*patch without loss="):
            fxgraft.loss(model, model(x), y, F.multi_margin_loss)

    @pytest.mark.parametrize("how", ["class", "instance", "legacy"])
    def test_cross_entropy_with_a_rule_of_its_own_is_another_criterion(self, how):
        class Own(nn.CrossEntropyLoss):
            def forward(self, out, y):
                return 100 * super().forward(out, y)

        criterion = Own() if how == "class" else nn.CrossEntropyLoss()
        if how == "instance":
            criterion.forward = lambda out, y: out.sum()
        if how == "legacy":
            criterion = functools.partial(F.cross_entropy, size_average=False)
        x, y = images()
        model = patched(loss="gradient_boosting")
        with pytest.raises(ConfigError, match=r"stands in for cross-entropy"):
            fxgraft.loss(model, model(x), y, criterion)


def test_tokens_of_a_signal_are_no_square() -> None:
    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.mix, self.fc = nn.Conv1d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.mix(self.embed(x).transpose(1, 2)).mean(1))

    with pytest.raises(fxgraft.ConfigError, match=r"class maps of 1×16"):
        fxgraft.patch(Signal(), "diversification", input_size=(3, 64))
    model = fxgraft.patch(Signal(), "diversification", patch=1, return_maps=True, input_size=(3, 64))
    assert model(torch.randn(2, 3, 64)).maps.shape == (2, 4, 1, 16)
    assert model(torch.randn(2, 3, 100)).maps.shape == (2, 4, 1, 25)
