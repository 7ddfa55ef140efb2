"""The diversification patch on models: the head rewrite, the block, the loss, copies, stacking, errors."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import BypassError, ConfigError, DuplicateGraftError, SiteError, StructureError
from fxgraft.functional.diversification import damp
from fxgraft.patches.diversification import Diversification, maps, record

CLASSES = 20
NEUTRAL = {"alpha": 1.0}


class Net(nn.Module):
    """Convolution, average pooling, dropout, one linear layer; maps of 8×8 for images of 16×16."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(F.relu(self.conv(x))).flatten(1)))


def net(**options) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options).train()


def small_resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("resnet18", channels=(8, 8, 8, 16), num_classes=CLASSES, output_stride=8)


def images(batch: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=g), torch.randint(CLASSES, (batch,), generator=g)


def patched(model: nn.Module | None = None, **options) -> nn.Module:
    return fxgraft.patch(model or net(), "diversification", input_size=(3, 16, 16), **options)


class TestHead:
    def test_the_rewrite_alone_changes_no_logit_and_no_gradient(self):
        x, y = images()
        bare, model = net(), patched(**NEUTRAL)
        F.cross_entropy(bare(x), y).backward()
        F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(model(x), bare(x))
        for name, parameter in bare.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)

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


class TestEverywhere:
    def test_copies_behave_as_the_original(self, tmp_path):
        x, _ = images()
        model = patched(p_patch=0.7)
        fxgraft.save(model, tmp_path)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fxgraft.load(net(), tmp_path)]
        torch.manual_seed(0)
        expected = model(x)
        for twin in twins:
            torch.manual_seed(0)
            assert torch.equal(twin(x), expected)
            with torch.no_grad():
                twin.fc.weight.zero_()
        assert model.fc.weight.any()

    def test_same_seed_same_result(self):
        x, _ = images()
        model = patched()
        first, again, other = [(torch.manual_seed(s), model(x))[1] for s in (0, 0, 1)]
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("options", [{}, {"loss": "gradient_boosting"}, {"return_maps": True}], ids=str)
    def test_training_compiles_in_one_graph(self, options):
        x, _ = images()
        model = patched(**options)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        got = compiled(x)
        torch.testing.assert_close(got, expected)
        (got.logits if options.get("return_maps") else got).sum().backward()

    def test_compiled_training_takes_batches_of_any_size(self):
        model = patched()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (4, 3, 6):
            x, _ = images(batch)
            torch.manual_seed(0)
            expected = model(x)
            torch.manual_seed(0)
            torch.testing.assert_close(compiled(x), expected)

    def test_autocast_gives_the_bare_models_dtype(self):
        x, y = images()
        model = patched()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
            assert out.dtype == net()(x).dtype == torch.bfloat16
            fxgraft.loss(model, out, y).backward()
        assert model.fc.weight.grad.dtype == torch.float32

    def test_channels_last(self):
        x, _ = images()
        model = patched(**NEUTRAL)
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)

    def test_float64_and_a_batch_of_one(self):
        model = patched().double()
        assert model(images(1)[0].double()).dtype == torch.float64

    @pytest.mark.parametrize("order", [("rsc", "diversification"), ("diversification", "rsc")])
    def test_stacks_with_rsc_in_both_orders(self, order):
        x, y = images(6, 64)
        bare = small_resnet().eval()
        model = small_resnet().train()
        for method in order:
            fxgraft.patch(model, method, input_size=(3, 64, 64))
        with record(model) as damped, fxgraft.patches.rsc.record(model) as muted:
            out = model(x, target=y)
        assert len(damped) == len(muted) == 1
        fxgraft.loss(model, out, y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        fxgraft.unpatch(model, order[0])
        assert [graft.name for graft in fxgraft.grafts(model)] == [order[1]]
        fxgraft.unpatch(model)
        assert type(model) is type(bare)

    def test_a_graft_inside_the_head_cannot_be_reached_and_says_so(self):
        model = fxgraft.patch(small_resnet().train(), "diversification", input_size=(3, 64, 64))
        fxgraft.patch(model, "rsc", layer="global_pool", input_size=(3, 64, 64))
        x, y = images(6, 64)
        with pytest.raises(BypassError, match="global_pool"):
            model(x, target=y)

    def test_merge_leaves_the_stock_model(self):
        x, _ = images()
        merged = fxgraft.merge(patched())
        assert type(merged) is Net
        assert torch.equal(merged.eval()(x), net().eval()(x))

    def test_twice_the_same_is_refused(self):
        with pytest.raises(DuplicateGraftError, match="on the model already"):
            patched(patched())


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 1.5}, "alpha must be a share"),
            ({"alpha": -0.1}, "alpha must be a share"),
            ({"p_peak": 2}, "p_peak must be a share"),
            ({"p_patch": -1}, "p_patch must be a share"),
            ({"loss_start": 3}, "loss_start must be a share"),
            ({"patch": 0}, "patch must be a whole number"),
            ({"patch": 1.5}, "patch must be a whole number"),
            ({"loss_k": 0}, "loss_k must be a whole number"),
            ({"border": "cut"}, "border must be one of"),
            ({"ties": "none"}, "ties must be one of"),
            ({"loss": "focal"}, "loss must be one of"),
        ],
    )
    def test_out_of_range(self, options, message):
        with pytest.raises(ConfigError, match=message):
            Diversification(**options)

    def test_patches_larger_than_the_map(self):
        model = net()
        with pytest.raises(ConfigError, match=r"9×9 cells are larger than the class maps of 8×8"):
            patched(model, patch=9)
        assert type(model) is Net

    def test_maps_smaller_than_a_patch_in_a_later_pass(self):
        with pytest.raises(ConfigError, match="larger than the class maps of 2×2"):
            patched()(images(size=4)[0])

    def test_neutral_settings_draw_nothing(self):
        x, _ = images()
        for options in (NEUTRAL, {"p_peak": 0.0, "p_patch": 0.0}):
            model = patched(**options)
            state = torch.get_rng_state()
            torch.testing.assert_close(model(x), net()(x))
            assert torch.equal(torch.get_rng_state(), state)

    def test_ties_and_borders_reach_the_block(self):
        x, _ = images()
        torch.manual_seed(0)
        with record(model := patched(net(), p_peak=0.0, p_patch=1.0, border="partial")) as partial:
            model(x)
        with record(model := patched(net(), p_peak=0.0, p_patch=1.0)) as skip:
            model(x)
        assert partial[0].mask.sum((2, 3)).unique().tolist() == [63]
        assert skip[0].mask.sum((2, 3)).unique().tolist() in ([35, 36], [35], [36])
        flat = net()
        nn.init.zeros_(flat.fc.weight)
        with record(model := patched(flat, p_peak=1.0, p_patch=0.0, ties="all")) as tied:
            model(x)
        assert tied[0].mask.all()
