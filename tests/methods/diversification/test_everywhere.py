"""The diversification patch where it has to run, in any company, and what bad options get."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fxgraft
from fxgraft.errors import ConfigError, SiteError, StructureError
from fxgraft.patches.diversification.patch import Diversification, record
from methods.diversification.diversified import NEUTRAL, Net, images, net, patched, small_resnet


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
    @pytest.mark.sweep
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

    @pytest.mark.sweep
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

    def test_a_graft_inside_the_head_would_never_run_and_is_refused(self):
        model = fxgraft.patch(small_resnet().train(), "diversification", input_size=(3, 64, 64))
        with pytest.raises(
            SiteError, match="'rsc' acts on 'global_pool', which 'diversification' leaves out"
        ):
            fxgraft.patch(model, "rsc", layer="global_pool", input_size=(3, 64, 64))
        assert [graft.name for graft in fxgraft.grafts(model)] == ["diversification"]

    def test_merge_leaves_the_stock_model(self):
        x, _ = images()
        merged = fxgraft.merge(patched())
        assert type(merged) is Net
        assert torch.equal(merged.eval()(x), net().eval()(x))

    def test_twice_the_same_is_refused(self):
        with pytest.raises(ConfigError, match="on the model already"):
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


@pytest.mark.parametrize("after", [False, True])
def test_a_classifier_whose_weight_a_hook_makes_is_refused(after):
    model = net()
    if after:
        patched(model)
    nn.utils.spectral_norm(model.fc)
    x, _ = images()
    with pytest.raises(StructureError, match=r"The classifier 'fc' of .* makes its weight in a hook"):
        (model.train() if after else patched(model))(x)
