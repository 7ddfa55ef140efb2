"""Diversification block and gradient-boosting loss as in their paper."""

from __future__ import annotations

from typing import Any

from fxgraft.extend import Preset, Training, presets_by_name

BLOCK: dict[str, Any] = {"alpha": 0.1, "p_peak": 0.5, "p_patch": 0.5, "patch": 3}
TRAINING = Training(
    network="ResNet-50, pretrained on ImageNet",
    data="fine-grained data sets, 448 px",
    note="on ImageNet block and loss were compared with the baseline from epoch 50 on",
)

PRESETS = presets_by_name(
    Preset(name="block", options=BLOCK, source="paper, AAAI 2020: the block alone (86.3)", training=TRAINING),
    Preset(
        name="paper",
        options={**BLOCK, "loss": "gradient_boosting", "loss_k": 15},
        source="paper, AAAI 2020: block and loss together (87.7)",
        training=TRAINING,
    ),
)
