"""The tensor functions of RSC against the authors' numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxgraft.patches.rsc.closed_form import linear_tail_gradient, linear_tail_logits
from fxgraft.patches.rsc.tensors import (
    apply_selection,
    batch_count,
    batch_share_schedule,
    feature_mask,
    label_probability,
    label_score,
    mute_count,
    pooled_saliency,
    saliency,
    select_samples,
    vector_keep_mask,
    vector_select,
)
from golden_data import GoldenCase, load_golden
from methods.rsc.rsc_tools import close, exactly, gradient_at, head

OFFICIAL = [*load_golden("rsc_official_spatial"), *load_golden("rsc_official_channel")]
DOMAINBED = list(load_golden("rsc_domainbed"))
FEATURE_SHARE = {"spatial": 1 / 3, "channel": 1 / 3.2}


# --- the authors' release


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", OFFICIAL, ids=str)
def test_official_generic_path(case: GoldenCase, dtype: torch.dtype) -> None:
    scope = case.settings["mode"]
    z, weight, bias, y = (case.inputs_as(dtype)[name] for name in ("z", "W", "b", "y"))

    logits = head(z, weight, bias)
    gradient = gradient_at(z, y, weight, bias)
    close(logits, case.expected("logits_before", dtype))
    close(gradient, case.outputs["grad_z"].to(dtype))
    close(saliency(z, gradient, "channel"), case.expected("channel_mean", dtype))
    close(saliency(z, gradient, "spatial").flatten(1), case.expected("spatial_mean", dtype))

    scores = saliency(z, gradient, scope)
    mask = feature_mask(scores, z, scope, FEATURE_SHARE[scope])
    assert mask.dtype == dtype
    exactly(mask, case.outputs["mask_pre"])
    count = mute_count(scores.flatten(1).shape[1], FEATURE_SHARE[scope])
    assert count == case.outputs["drop_num"]
    close(scores.flatten(1).sort(descending=True).values[:, count], case.expected("threshold", dtype))

    masked_logits = head(z * mask, weight, bias)
    before, after = label_probability(logits, y), label_probability(masked_logits, y)
    close(masked_logits, case.expected("logits_allmasked", dtype))
    close(before, case.expected("before_vector", dtype))
    close(after, case.expected("after_vector", dtype))
    check_epochs(case, dtype, z, mask, before, after, closed_form=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", OFFICIAL, ids=str)
def test_official_closed_form(case: GoldenCase, dtype: torch.dtype) -> None:
    scope = case.settings["mode"]
    z, weight, bias, y = (case.inputs_as(dtype)[name] for name in ("z", "W", "b", "y"))

    channel_gradient = linear_tail_gradient(weight, y, positions=49)
    close(channel_gradient, case.expected("channel_mean", dtype))
    logits = linear_tail_logits(z, None, weight, bias)
    close(logits, case.expected("logits_before", dtype))
    mask = feature_mask(pooled_saliency(z, channel_gradient, scope), z, scope, FEATURE_SHARE[scope])
    exactly(mask, case.outputs["mask_pre"])
    masked_logits = linear_tail_logits(z, mask, weight, bias)
    close(masked_logits, case.expected("logits_allmasked", dtype))
    before, after = label_probability(logits, y), label_probability(masked_logits, y)
    check_epochs(case, dtype, z, mask, before, after, closed_form=True)


def check_epochs(
    case: GoldenCase,
    dtype: torch.dtype,
    z: Tensor,
    mask: Tensor,
    before: Tensor,
    after: Tensor,
    closed_form: bool,
) -> None:
    """Steps 3 and 4 for each epoch of the case, with the gradients of the loss that is trained on."""
    inputs = case.inputs_as(dtype)
    weight, bias = inputs["W"].requires_grad_(), inputs["b"].requires_grad_()
    z = z.clone().requires_grad_()
    for e, epoch in enumerate(case.settings["epochs"]):
        # The release updates its share only every tenth epoch; each epoch here is a new model.
        share = batch_share_schedule(epoch) if epoch % 10 == 0 else 1 / 3
        assert share == pytest.approx(case.outputs["e_pecent_used"][e].item(), rel=1e-15)
        count = batch_count(len(z), share)
        assert count == case.outputs["e_batch_index"][e]

        selected = select_samples(before, after, count)
        exactly(selected.long(), case.outputs["e_drop_index_fg"][e])
        final = apply_selection(mask, selected)
        exactly(final, case.outputs["e_mask_final"][e])

        logits = linear_tail_logits(z, final, weight, bias) if closed_form else head(z * final, weight, bias)
        close(logits, case.expected("e_logits_masked", dtype)[e].to(dtype))
        loss = F.cross_entropy(logits, inputs["y"])
        close(loss, case.expected("e_loss_ce", dtype)[e].to(dtype))
        gradients = torch.autograd.grad(loss, (z, weight, bias))
        for name, gradient in zip(("z", "W", "b"), gradients, strict=True):
            close(gradient, case.expected(f"e_grad_loss_{name}", dtype)[e].to(dtype))
        assert not gradients[0][(final == 0).expand_as(z)].any()


# --- DomainBed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", DOMAINBED, ids=str)
def test_domainbed(case: GoldenCase, dtype: torch.dtype) -> None:
    inputs = case.inputs_as(dtype)
    features, y = inputs["f"].requires_grad_(), inputs["y"]
    parameters = [inputs[f"p{i}"].requires_grad_() for i in range(len(inputs) - 2)]
    assert len(parameters) == (6 if case.settings["nonlinear"] else 2)

    def classify(x: Tensor) -> Tensor:
        for i in range(0, len(parameters), 2):
            x = F.linear(x.relu() if i else x, parameters[i], parameters[i + 1])
        return x

    logits = classify(features)
    (gradient,) = torch.autograd.grad(label_score(logits, y), features)
    mask = vector_keep_mask(gradient, case.settings["drop_f"])
    muted_logits = classify(features * mask)
    before, after = label_probability(logits, y), label_probability(muted_logits, y)
    selected = vector_select(before, after, case.settings["drop_b"])
    final = apply_selection(mask, selected)
    close(logits, case.expected("all_p", dtype))
    close(gradient, case.expected("all_g", dtype))
    exactly(mask, case.outputs["mask_f"])
    close(muted_logits, case.expected("all_p_muted", dtype))
    close(before - after, case.expected("changes", dtype))
    exactly((~selected).unsqueeze(1).long(), case.outputs["mask_b"].long())
    exactly(final, case.outputs["mask"])

    logits = classify(features * final)
    loss = F.cross_entropy(logits, y)
    close(logits, case.expected("all_p_muted_again", dtype))
    close(loss, case.expected("loss", dtype))
    grad_features, *grads = torch.autograd.grad(loss, (features, *parameters))
    close(grad_features, case.expected("grad_loss_f", dtype))
    for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        close(grad, case.expected(f"grad_loss_p{i}", dtype))
        stepped = (parameter - case.settings["lr"] * grad).detach()
        close(stepped, case.expected(f"p{i}_after_sgd", dtype))
