"""Networks of other libraries: of volumes (MONAI), dense (segmentation_models_pytorch), image towers (open_clip).

And those of transformers for clips, whose frames come before their channels.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tools.readme import own_methods
from torch import Tensor, nn

import fxgraft
from fxgraft.extend import take_logits

pytestmark = pytest.mark.sweep
CLASSES = 5
METHODS: dict[str, dict[str, Any]] = {
    "rsc": {"batch_share": 1.0},
    "crossnorm": {"p": 1.0, "active": None},
    "selfnorm": {},
    "taps": {"layers": -1},
    "gam": {"layers": -1},
}


def monai(name: str, *args: Any, **options: Any) -> nn.Module:
    return getattr(pytest.importorskip("monai.networks.nets"), name)(*args, **options)


def swin_unetr() -> nn.Module:
    """Build one without its check of the input's size, which hands a shape to NumPy: that cannot be traced."""
    model = monai("SwinUNETR", 1, CLASSES, feature_size=12, depths=(1, 1, 1, 1))
    model._check_input_size = lambda spatial_shape: None
    return model


def smp(name: str, encoder: str) -> nn.Module:
    library = pytest.importorskip("segmentation_models_pytorch")
    return getattr(library, name)(encoder, encoder_weights=None, classes=CLASSES)


def tower(kind: str) -> nn.Module:
    pytest.importorskip("open_clip")
    if kind == "ViT":
        vision = importlib.import_module("open_clip.transformer").VisionTransformer
        own: Any = vision(32, 8, 32, 2, 2, 2.0, output_dim=16)
    elif kind == "ModifiedResNet":
        own = importlib.import_module("open_clip.modified_resnet").ModifiedResNet((1, 1, 1, 1), 16, 4, 64, 8)
    else:
        own = importlib.import_module("open_clip.timm_model").TimmModel(
            "test_resnet", 16, pool="avg", proj="linear"
        )
    return nn.Sequential(own, nn.Linear(16, CLASSES))


def video(name: str, **options: Any) -> nn.Module:
    """Build a network of transformers for clips (B, T, C, H, W)."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        image_size=32,
        num_frames=4,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        num_labels=CLASSES,
        **options,
    )
    return getattr(transformers, f"{name}ForVideoClassification")(config)


VOLUME = (1, 16, 32, 32)
FRAMES = (4, 3, 32, 32)
LOGITS = {"num_classes": CLASSES, "post_activation": None}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "monai/DenseNet": (
        lambda: monai("DenseNet", 3, 1, CLASSES, init_features=8, growth_rate=4, block_config=(2, 2)),
        VOLUME,
    ),
    "monai/resnet": (
        lambda: monai(
            "ResNet",
            "basic",
            [1] * 4,
            [4, 8, 12, 16],
            n_input_channels=1,
            num_classes=CLASSES,
            conv1_t_stride=2,
        ),
        (1, 32, 64, 64),
    ),
    "monai/SEResNet50": (
        lambda: monai("SEResNet50", (1, 1, 1, 1), spatial_dims=3, in_channels=1, num_classes=CLASSES),
        (1, 32, 32, 32),
    ),
    "monai/ViT": (
        lambda: monai("ViT", 1, (16, 16, 16), (8, 8, 8), 24, 48, 2, 2, classification=True, **LOGITS),
        (1, 16, 16, 16),
    ),
    "monai/UNet": (
        lambda: monai("UNet", 3, 1, CLASSES, channels=(8, 16, 24), strides=(2, 2), num_res_units=1),
        VOLUME,
    ),
    "monai/SwinUNETR": (lambda: swin_unetr(), (1, 64, 64, 64)),
    **{
        f"smp/{name}, {encoder}": ((lambda n, e: lambda: smp(n, e))(name, encoder), (3, 64, 64))
        for name in ("Unet", "FPN", "DeepLabV3Plus")
        for encoder in ("resnet18", "mobilenet_v2", "efficientnet-b0")
    },
    "open_clip/ViT": (lambda: tower("ViT"), (3, 32, 32)),
    "open_clip/ModifiedResNet": (lambda: tower("ModifiedResNet"), (3, 64, 64)),
    "open_clip/TimmModel": (lambda: tower("TimmModel"), (3, 64, 64)),
    "transformers/VideoMAE": (lambda: video("VideoMAE", patch_size=8), FRAMES),
    "transformers/Vivit": (lambda: video("Vivit", tubelet_size=[2, 8, 8]), FRAMES),
    "transformers/Timesformer": (lambda: video("Timesformer", patch_size=8), FRAMES),
}


@pytest.mark.filterwarnings("ignore")  # of the libraries themselves
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_libraries(name: str) -> None:
    """A training step with finite gradients, evaluation to the bit, and removal, with every method."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = build().eval()
    if name == "monai/UNet":
        model.num_classes = (
            CLASSES  # its logits are a sum of a convolution and of an activation, as features are
        )
    x = torch.randn(2, *size)
    expected, before = take_logits(model(x)), copy.deepcopy(model.state_dict())
    y = torch.zeros(2, *expected.shape[2:], dtype=torch.long)
    kinds = [type(each) for each in model.modules()]
    for method, options in METHODS.items():
        dense = {"task": "dense"} if method == "gam" and expected.ndim > 2 else {}
        fxgraft.patch(model, method, input_size=size, **options, **dense)
        if own_methods()[method].train_only or method in ("taps", "gam"):
            assert torch.equal(take_logits(model.eval()(x)), expected), method
        model.train()
        with fxgraft.targets(y):
            out = model(x)
        fxgraft.loss(model, out, y).backward()
        assert_finite(model)
        fxgraft.unpatch(model)
        model.zero_grad()
        model.load_state_dict(before)
        assert [type(each) for each in model.modules()] == kinds
        assert torch.equal(take_logits(model.eval()(x)), expected), method


@pytest.mark.filterwarnings("ignore")
def test_a_line_that_cannot_be_traced_is_named() -> None:
    """What SwinUNETR's own check does with a shape; methods inside of its blocks go on none the less."""
    model = monai("SwinUNETR", 1, CLASSES, feature_size=12, depths=(1, 1, 1, 1))
    size = (1, 64, 64, 64)
    with pytest.raises(fxgraft.TraceError, match=r"(?s)np\.array\(spatial_shape\).*a module of its own"):
        fxgraft.patch(model, "rsc", input_size=size)
    with pytest.raises(
        fxgraft.StructureError, match=r"shape \(2, 5, 64, 64, 64\), and not one tensor of logits"
    ):
        fxgraft.patch(model, "mixmo", input_size=size)
    fxgraft.patch(model, "selfnorm", input_size=size)


def assert_finite(model: nn.Module) -> None:
    gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(each.isfinite().all()) for each in gradients)
