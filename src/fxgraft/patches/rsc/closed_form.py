"""RSC in closed form, where average pooling and one linear layer are all that follows the map z.

The gradient of the label's logit is then a row of the weight, equal at every position, and no layer runs twice.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fxgraft.patches.rsc.tensors import matmul, score_dtype, spatial_mean


def linear_tail_gradient(weight: Tensor, target: Tensor, positions: int) -> Tensor:
    """The gradient g under mean over `positions` and one linear layer: W[y_b] / positions, at every position.

    Returned once, as (B, C), from `weight` (K, C) and indices (B,) or soft targets (B, K): t · W / positions.
    """
    rows = weight[target] if target.ndim == 1 else matmul(target, weight)
    return rows.to(score_dtype(weight)) / positions


def linear_tail_logits(z: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits linear(mean_S(z · mask)), (B, K), without forming z · mask; differentiable in z, weight, bias.

    `mask` comes from `feature_mask`, or is None for the plain logits, or is one of (B, C, *S) that is chosen between
    such ones as data, where z · mask is formed. The linear layer runs as it would in
    the network: in the dtype of `weight` (K, C), or in autocast's.
    """
    if mask is None:
        pooled = spatial_mean(z)
    elif mask.shape[2:].numel() == 1:  # constant over positions, so it commutes with their mean
        pooled = spatial_mean(z) * mask.flatten(1)
    elif mask.shape[1] > 1:
        pooled = spatial_mean(z * mask)
    else:  # this order of the factors is the fast one for both memory formats
        pooled = matmul(mask.flatten(2), z.flatten(2).transpose(1, 2)).squeeze(1) / mask.shape[2:].numel()
    return F.linear(pooled.to(weight.dtype), weight, bias)
