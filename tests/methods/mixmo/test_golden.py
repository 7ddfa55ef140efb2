"""MixMo against the authors' code: masks, mixing, both ends of the network, weights, losses, labels, batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxgraft.patches.mixmo import masks as maker
from fxgraft.patches.mixmo import tensors as mixmo
from fxgraft.patches.mixmo.sampling import RepeatedBatchSampler
from golden_data import GoldenCase, load_golden

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
MASKS = load_golden("mixmo_masks")
DATASET = load_golden("mixmo_dataset")


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}


def mask_cases(*methods: str, members: int | None = None) -> list[GoldenCase]:
    return [
        case
        for case in MASKS
        if case.settings["method"] in methods and members in (None, len(case.settings["lams"]))
    ]


def kappa_of(case: GoldenCase) -> Tensor:
    return torch.tensor([case.settings["lams"]], dtype=torch.float64)


def assert_masks(case: GoldenCase, masks: Tensor, shares: Tensor) -> None:
    """Compare masks (M, 1, ...) and shares (1, M) with the authors' float32 ones."""
    expected = case.outputs["masks"].double()
    torch.testing.assert_close(masks[:, 0].expand_as(expected), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(shares[0], case.outputs["lams"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", mask_cases("mixup"), ids=str)
def test_linear_masks(case: GoldenCase):
    assert_masks(case, *maker.draw_masks("linear", kappa_of(case), 4, 16, 16))


@pytest.mark.parametrize("case", mask_cases("cutmix"), ids=str)
def test_cut_masks(case: GoldenCase):
    """The centre of the box is the first thing that was drawn, by a generator whose stream is fixed."""
    generator = np.random.RandomState(case.settings["seed"])
    centres = torch.tensor([[generator.randint(16), generator.randint(16)]])
    kappa = kappa_of(case)
    assert_masks(case, *maker.share_out(maker.box_mask(kappa[:, 0], centres, 16, 16), kappa))


STACKED = {"stackchannel": 0, "stackhorizontal": 1, "stackvertical": 2}


def stacked(case: GoldenCase) -> Tensor:
    """The authors' band along the dimension that they stack on."""
    mask = case.outputs["masks"][0].double()
    line = mask.movedim(STACKED[case.settings["method"]], 0).flatten(1)
    assert torch.equal(line, line[:, :1].expand_as(line))
    return line[:, 0]


@pytest.mark.parametrize("case", mask_cases(*STACKED), ids=str)
def test_bands(case: GoldenCase):
    line, kappa = stacked(case), kappa_of(case)
    # At the end the authors' band has the other member's share.
    at_end = bool(line[-1])
    share = 1 - kappa[:, 0] if at_end else kappa[:, 0]
    band = maker.band_mask(share, torch.tensor([at_end]), len(line))
    assert torch.equal(band[0], line)
    assert at_end is False or case.settings["config_mix"] == {}


def test_bands_lie_at_either_end():
    assert {bool(stacked(case)[-1]) for case in mask_cases(*STACKED)} == {False, True}


@pytest.mark.parametrize("case", mask_cases("noise"), ids=str)
def test_noise(case: GoldenCase):
    """The mask of the reference's draw, one for all channels or, here as a batch, one for each."""
    expected = case.outputs["masks"][0].unsqueeze(1)
    if case.settings["config_mix"]["noise_2d"]:
        assert torch.equal(expected, expected[:1].expand_as(expected))
        expected = expected[:1]
    noise = torch.rand(expected.shape, generator=torch.Generator().manual_seed(case.settings["seed"]))
    share = torch.full((len(expected),), case.settings["lams"][0])
    torch.testing.assert_close(maker.noise_mask(share, noise), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", mask_cases("patchuphard", "patchuphard2d", "patchupsoft"), ids=str)
def test_patches(case: GoldenCase):
    """The authors' masks are unions of whole patches, and ours of the same centres are the same."""
    block = case.settings["config_mix"].get("patchup_block_size", maker.PATCHUP_BLOCK)
    first = case.outputs["masks"][0].unsqueeze(1)  # channels as a batch: we draw one mask for all
    holes = (first == 1).float()
    # A centre is where the whole patch, as far as it lies in the map, belongs to the mask.
    centres = 1 - F.max_pool2d(1 - holes, block, 1, block // 2)
    patches = maker.patches_mask(centres, block)
    assert torch.equal(patches, holes)
    assert 0 < holes.mean() < 1
    if case.settings["method"] == "patchupsoft":
        lam = torch.tensor(case.settings["lams"][0])
        torch.testing.assert_close(torch.where(patches > 0, patches, lam), first)


@pytest.mark.parametrize("case", mask_cases("channel"), ids=str)
def test_channels_are_whole(case: GoldenCase):
    masks = case.outputs["masks"]
    assert torch.equal(masks, masks[..., :1, :1].expand_as(masks))
    assert set(masks.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("case", mask_cases("cow"), ids=str)
def test_cow_masks(case: GoldenCase):
    """Blobs from the reference's draws; a cell at which the threshold falls may round either way."""
    generator = np.random.RandomState(case.settings["seed"])
    proportion = torch.tensor(0.2 + generator.rand(1) * 0.6)
    sigma = torch.tensor(4.0 * 4.0 ** generator.rand(1))
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(case.settings["seed"])).double()
    mask = maker.cow_mask(proportion, sigma, noise)
    expected = case.outputs["masks"][0, :1].double()
    assert (mask[0] != expected).sum() <= 1


MIXES = [case for case in load_golden("mixmo_mix") if case.settings["mode"] == "train"]
INFERENCE = [case for case in load_golden("mixmo_mix") if case.settings["mode"] == "inference"]


def all_masks(stored: Tensor, members: int, dtype: torch.dtype) -> list[Tensor]:
    """The authors keep one mask of two, and take the rest in float32."""
    masks = list(stored.float())
    return [mask.to(dtype) for mask in (masks if members > 2 else [masks[0], 1 - masks[0]])]


@pytest.mark.parametrize("case", MIXES, ids=str)
@pytest.mark.parametrize("gain", [None, 1.0])
@DTYPES
def test_mixing(case: GoldenCase, gain: float | None, dtype: torch.dtype):
    members = case.settings["M"]
    inputs = case.inputs_as(dtype)
    encodings = [inputs[f"l{i}"].requires_grad_() for i in range(members)]
    mixed = mixmo.mix(encodings, all_masks(case.inputs["masks"], members, dtype), gain)
    scale = 1 if gain is None else members
    gradients = torch.autograd.grad(mixed, encodings, inputs["cot"])
    torch.testing.assert_close(mixed * scale, case.expected("y").to(dtype), **close(dtype))
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient * scale, case.expected(f"grad_l{i}").to(dtype), **close(dtype))


@pytest.mark.parametrize("case", INFERENCE, ids=str)
@DTYPES
def test_mixing_in_evaluation_is_the_sum(case: GoldenCase, dtype: torch.dtype):
    members = case.settings["M"]
    inputs = case.inputs_as(dtype)
    equal, _ = maker.draw_masks("sum", torch.ones(3, members, dtype=dtype) / members, 4, 8, 8)
    mixed = mixmo.mix([inputs[f"l{i}"] for i in range(members)], equal)
    torch.testing.assert_close(mixed, case.expected("y").to(dtype), **close(dtype))


@pytest.mark.parametrize("case", list(load_golden("mixmo_net")), ids=str)
@DTYPES
def test_stem_and_heads(case: GoldenCase, dtype: torch.dtype):
    members = case.settings["M"]
    inputs = case.inputs_as(dtype)
    images = inputs["pixels"].split(3, 1)
    kernels = [inputs[f"conv1_{i}"] for i in range(members)]
    encodings = [
        F.conv2d(image, kernel, stride=2, padding=1) for image, kernel in zip(images, kernels, strict=True)
    ]
    near = close(dtype) if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    masks = all_masks(case.inputs["masks"], members, dtype)
    mixed = mixmo.mix(encodings, masks)
    torch.testing.assert_close(mixed, case.expected("stem_train").to(dtype), **near)
    scaled = [members * encoding for encoding in encodings]
    torch.testing.assert_close(mixmo.mix(scaled, masks, gain=1.0), mixed, **near)

    # Both ends fold: the sum of the encoders, the mean of the heads.
    folded = F.conv2d(images[0], torch.stack(kernels).sum(0), stride=2, padding=1)
    torch.testing.assert_close(folded, case.expected("stem_infer_3ch").to(dtype), **near)
    weights = torch.stack([inputs[f"fc_w{i}"] for i in range(members)])
    biases = torch.stack([inputs[f"fc_b{i}"] for i in range(members)])
    for i in range(members):
        torch.testing.assert_close(
            F.linear(inputs["feats"], weights[i], biases[i]),
            case.expected(f"logits_{i}", dtype),
            **close(dtype),
        )
    torch.testing.assert_close(
        F.linear(inputs["feats"], weights.mean(0), biases.mean(0)),
        case.expected("logits", dtype),
        **close(dtype),
    )


@pytest.mark.parametrize("case", [c for c in load_golden("mixmo_loss") if "weights" in c.outputs], ids=str)
@DTYPES
def test_balance(case: GoldenCase, dtype: torch.dtype):
    weights = mixmo.balance(case.inputs["lams"].to(dtype), case.settings["weight_root"])
    torch.testing.assert_close(weights, case.outputs["weights"].to(dtype), **close(dtype))


@pytest.mark.parametrize("case", [c for c in load_golden("mixmo_loss") if "subloss" in c.outputs], ids=str)
@DTYPES
def test_losses(case: GoldenCase, dtype: torch.dtype):
    """The authors multiply the targets by the weights; here they weigh the rows."""
    members = case.settings["M"]
    inputs = case.inputs_as(dtype)
    logits = torch.stack([inputs[f"logits_{i}"] for i in range(members)]).requires_grad_()
    if case.settings["soft"]:
        weights = inputs["balance_w"]
        targets = [inputs[f"target_{i}"] / weights[:, i : i + 1] for i in range(members)]
    else:
        weights = torch.ones(logits.shape[1], members, dtype=dtype)
        targets = [inputs["target"]] * members
    losses = mixmo.member_losses(F.cross_entropy, logits, targets, weights)
    near = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(losses, case.expected("subloss").to(dtype), **near)
    regularised = case.outputs.get("l2", torch.tensor(0.0)) * (case.settings["l2_reg"] or 0)
    torch.testing.assert_close(
        losses.sum().double() + regularised, case.expected("loss_total"), rtol=1e-6, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    for i in range(members):
        torch.testing.assert_close(gradient[i], case.expected(f"grad_logits_{i}", dtype), **near)


def mixed_pair(case: GoldenCase, row: int, member: int) -> tuple[Tensor, int]:
    """Which pixels of a mixed image are of its own sample, and the index of the other one."""
    own = case.inputs["pixels"][case.inputs["index"][row, 1 + member]]
    image = case.outputs["pixels"][row, member]
    mask = (image == own).all(0)
    fits = [
        i for i, other in enumerate(case.inputs["pixels"]) if torch.equal(image[:, ~mask], other[:, ~mask])
    ]
    return mask.float(), fits[0]


@pytest.mark.parametrize("case", [c for c in DATASET if c.name.startswith("ds")], ids=str)
def test_targets_of_the_pipeline(case: GoldenCase):
    """Labels after input CutMix, corrected to what the mixing leaves visible, times the weights."""
    members, classes = case.settings["M"], case.settings["num_classes"]
    weights = mixmo.balance(case.outputs["mixmo_lams"].float(), case.settings["weight_root"])
    half = case.settings["half"]
    for member in range(members):
        index = case.inputs["index"][:, 1 + member]
        pairs = [mixed_pair(case, row, member) for row in range(len(index))]
        labels = mixmo.MixedLabels(
            case.inputs["targets"][index],
            case.inputs["targets"][torch.tensor([partner for _, partner in pairs])],
            torch.stack([mask for mask, _ in pairs]).unsqueeze(1),
        )
        stored = case.outputs["mixmo_masks"].float()
        visible = 1 - stored[:, 0] if (members, member) == (2, 1) else stored[:, member]
        targets = labels.soft(classes, visible) * weights[:, member : member + 1]
        # For stems that halve the size the authors compute the share in float16.
        near = {"rtol": 2e-3, "atol": 1e-3} if half else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(targets, case.outputs["targets"][:, member], **near)


@pytest.mark.parametrize("case", [c for c in DATASET if c.name.startswith("ds")], ids=str)
def test_the_authors_first_images_have_the_larger_visible_part(case: GoldenCase):
    """Of what the mixing leaves, not of the whole image: what `input_cutmix` is told by `visible`."""
    members = case.settings["M"]
    stored = case.outputs["mixmo_masks"].float()
    for member in range(members):
        for row in range(len(stored)):
            mask, _ = mixed_pair(case, row, member)
            seen = 1 - stored[row, 0] if (members, member) == (2, 1) else stored[row, member]
            if seen.mean() > 0:
                assert mixmo.visible_shares(mask[None, None], seen[None, None]).item() >= 0.5 - 1e-3


def test_some_labels_of_the_pipeline_are_mixed_and_need_the_correction():
    case = DATASET["ds3_M2"]
    corrected = 0
    for row in range(4):
        mask, _ = mixed_pair(case, row, 0)
        visible = case.outputs["mixmo_masks"][row].float().unsqueeze(0)
        share = mixmo.visible_shares(mask[None, None], visible[:, 0])
        corrected += int(abs(share.item() - mask.mean().item()) > 0.01)
    assert corrected > 0


@pytest.mark.parametrize("case", [c for c in DATASET if c.name.startswith("sampler")], ids=str)
def test_batches_of_the_sampler(case: GoldenCase):
    """Each batch holds the same indices as the authors', as often; they also shuffle it."""
    size, repetitions = case.settings["batch_size"], case.settings["rep"]
    sampler = RepeatedBatchSampler(case.inputs["order"].tolist(), size, repetitions)
    batches = list(sampler)
    assert len(sampler) == case.outputs["len"] == len(batches) == case.outputs["num_batches"]
    assert len(batches[0]) == case.outputs["batch_size_actual"]
    assert len(batches[-1]) == case.outputs["last_batch_size"]
    for ours, theirs in zip(batches, case.outputs["index"], strict=False):
        for member in range(case.settings["M"]):
            assert sorted(ours) == sorted(theirs[:, member].tolist())


def test_members_kept_together():
    """In the authors' batches the first rows, here half of them, show all members the same sample."""
    case = DATASET["sampler1"]
    fixed = math.floor(case.settings["batch_size"] * case.settings["p_rep"])
    rows = case.outputs["index"][0]
    assert (rows[:fixed] == rows[:fixed, :1]).all()
    ours = mixmo.permutations(4, case.settings["M"], case.settings["rep"], kept=case.settings["p_rep"]).t()
    assert (ours[:fixed] == ours[:fixed, :1]).all()
    assert not (ours == ours[:, :1]).all()
