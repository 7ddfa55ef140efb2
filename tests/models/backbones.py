"""One small backbone of every timm model file and of every torchvision classification family.

Each entry keeps the structure that makes its architecture what it is and shrinks the rest (width, depth,
image), so that building it and one training step mostly take a fraction of a second on one core. All of them
classify into `NUM_CLASSES` classes: a `(batch, NUM_CLASSES)` tensor in training and in evaluation.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.byobnet import ByoBlockCfg, interleave_blocks
from timm.models.cspnet import CspStagesCfg, CspStemCfg
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

NUM_CLASSES = 5


@dataclass(frozen=True)
class Backbone:
    """A backbone as data: where it comes from and what makes it small."""

    name: str  # library/model: an entry point of timm, or a builder or class of torchvision.models
    family: str  # the model file, without its package
    input_size: tuple[int, int, int]  # (channels, height, width)
    kwargs: tuple[tuple[str, Any], ...] = field(default=(), hash=False)

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]

    @property
    def model(self) -> str:
        return self.name.partition("/")[2]

    @property
    def missing(self) -> str | None:
        """Why this installation cannot build it, or None."""
        if self.library == "timm":
            found, version = timm.is_model(self.model), timm.__version__
        else:
            found, version = hasattr(torchvision.models, self.model), torchvision.__version__
        return None if found else f"{self.library} {version} has no {self.model}"

    def build(self, *, warm: bool = False) -> nn.Module:
        """A new model, the same one each time; the global random state is left alone.

        Both libraries start some classifiers, residual branches and layer scales at or near zero, so that a
        fresh model may pass no gradient to most of its weights and predict nearly the same for every image.
        `warm` undoes that, as a little training would: nothing stays near zero, and the running statistics
        of BatchNorm are those of `inputs()`.
        """
        kwargs = copy.deepcopy(dict(self.kwargs))  # some constructors write into their arguments
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.library == "timm":
                model = timm.create_model(self.model, pretrained=False, num_classes=NUM_CLASSES, **kwargs)
            else:
                model = getattr(torchvision.models, self.model)(num_classes=NUM_CLASSES, **kwargs)
            if warm:
                _warm(model, self.inputs())
        return model

    def inputs(self, batch: int = 4) -> Tensor:
        """A batch of images, the same one each time."""
        return torch.randn(batch, *self.input_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _warm(model: nn.Module, images: Tensor) -> None:
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            parameter.normal_(std=0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the last batch alone
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _timm(family: str, model: str, size: int, **kwargs: Any) -> Backbone:
    return Backbone(f"timm/{model}", family, (3, size, size), tuple(kwargs.items()))


def _torchvision(family: str, model: str, size: int, **kwargs: Any) -> Backbone:
    return Backbone(f"torchvision/{model}", family, (3, size, size), tuple(kwargs.items()))


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_PYRAMID = (16, 32, 48, 64)
_HEADS = {"embed_dims": _PYRAMID, "num_heads": (1, 2, 3, 4)}
_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}

BACKBONES: tuple[Backbone, ...] = (
    _timm("beit", "beit_base_patch16_224", 32, **_VIT),
    _timm(
        "byoanet",
        "botnet26t_256",
        64,
        img_size=64,
        stem_chs=16,
        blocks=(
            ByoBlockCfg(type="bottle", d=1, c=32, s=1, gs=0, br=0.25),
            ByoBlockCfg(type="bottle", d=1, c=64, s=2, gs=0, br=0.25),
            interleave_blocks(types=("bottle", "self_attn"), d=2, c=96, s=2, gs=0, br=0.25),
            ByoBlockCfg(type="self_attn", d=2, c=128, s=2, gs=0, br=0.25),
        ),
    ),
    _timm("byobnet", "test_byobnet", 64),
    _timm("cait", "cait_xxs24_224", 32, **_VIT),
    _timm(
        "coat", "coat_tiny", 64, img_size=64, embed_dims=(32,) * 4, serial_depths=(1,) * 4, parallel_depth=2
    ),
    _timm("convit", "convit_tiny", 32, img_size=32, patch_size=8, embed_dim=12, depth=3, local_up_to_layer=2),
    _timm("convmixer", "convmixer_768_32", 28),
    _timm("convnext", "test_convnext", 64),
    _timm("cpubone", "cpubone_nano", 64, width_list=[8, 16, 24, 32, 48], head_widths=(64, 80)),
    _timm(
        "crossvit",
        "crossvit_tiny_240",
        48,
        img_size=48,
        img_scale=(1.0, 2 / 3),
        patch_size=(6, 8),
        embed_dim=(24, 48),
        depth=((1, 2, 0), (1, 2, 0)),
        mlp_ratio=(4, 4, 1),
    ),
    _timm(
        "csatv2", "csatv2", 128, dims=(16, 24, 32, 48), depths=(1, 1, 2, 2), transformer_depths=(0, 0, 1, 1)
    ),
    _timm(
        "cspnet",
        "cs3darknet_focus_s",
        64,
        stem=CspStemCfg(out_chs=16, kernel_size=6, stride=2, padding=2, pool=""),
        stages=CspStagesCfg(
            depth=(1, 2, 2, 1),
            out_chs=_PYRAMID,
            stride=2,
            bottle_ratio=1.0,
            block_ratio=0.5,
            stage_type="cs3",
        ),
    ),
    _timm("cspnext", "cspnext_tiny", 64),
    _timm("davit", "davit_tiny", 64, depths=(1, 1, 2, 1), window_size=4, **_HEADS),
    _timm(
        "deepseek_vit", "deepseek_vit_412m", 48, img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=3
    ),
    _timm("deit", "deit_tiny_distilled_patch16_224", 32, **_VIT),
    _timm("densenet", "densenet121", 64, growth_rate=8, block_config=(2, 2, 2, 2)),
    _timm("dla", "dla46x_c", 64),
    _timm("dpn", "dpn48b", 64, k_sec=(1, 2, 2, 1)),
    _timm("edgenext", "edgenext_xx_small", 64, depths=(1, 2, 2, 2), dims=(16, 32, 48, 64)),
    # its attention is written for the 7x7 map of a 224x224 image
    _timm("efficientformer", "efficientformer_l1", 224, depths=(1, 1, 2, 2), embed_dims=_PYRAMID),
    _timm(
        "efficientformer_v2",
        "efficientformerv2_s0",
        64,
        img_size=64,
        depths=(1, 1, 3, 3),
        embed_dims=_PYRAMID,
        mlp_ratios=(4, 4, (4, 3, 4), (4, 3, 4)),
    ),
    _timm("efficientnet", "test_efficientnet", 64),
    _timm("efficientvim", "efficientvim_m1", 128, embed_dim=(32, 48, 64)),
    _timm(
        "efficientvit_mit",
        "efficientvit_b0",
        64,
        widths=(8, 16, 24, 32, 48),
        depths=(1, 1, 1, 2, 2),
        head_widths=(64, 80),
    ),
    _timm("efficientvit_msra", "efficientvit_m0", 128, img_size=128, embed_dim=(32, 48, 64), depth=(1, 2, 2)),
    _timm("eva", "eva02_tiny_patch14_224", 32, **_VIT),
    _timm("fasternet", "fasternet_t0", 64, embed_dim=16, depths=(1, 2, 2, 1), feature_dim=64),
    _timm("fastvit", "fastvit_t8", 64, layers=(1, 1, 2, 2), embed_dims=(16, 32, 64, 128)),
    _timm("focalnet", "focalnet_tiny_srf", 64),
    _timm("gcvit", "gcvit_xxtiny", 64, img_size=64, embed_dim=16),
    _timm(
        "gemma4_vit",
        "gemma4_vit_167m",
        48,
        img_size=48,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        head_dim=16,
        intermediate_size=96,
        position_embedding_size=16,
    ),
    _timm("ghostnet", "ghostnet_050", 64),
    _timm("hardcorenas", "hardcorenas_a", 64),
    _timm("hgnet", "hgnetv2_b0", 64, head_hidden_size=64),
    _timm("hiera", "hiera_tiny_224", 64, img_size=(64, 64), embed_dim=24, stages=(1, 2, 2, 1)),
    _timm("hieradet_sam2", "sam2_hiera_tiny", 64, embed_dim=24, stages=(1, 2, 2, 1), global_att_blocks=(4,)),
    _timm("hrnet", "hrnet_w18_small", 64),
    _timm("iformer", "iformer_t", 64, dims=_PYRAMID, depths=(1, 1, 4, 3), attn_groups=(0, 0, 1, 1)),
    _timm("inception_next", "inception_next_atto", 64, dims=_PYRAMID, depths=(1, 1, 2, 2)),
    _timm("inception_resnet_v2", "inception_resnet_v2", 112),
    _timm("inception_v3", "inception_v3", 112),
    _timm("inception_v4", "inception_v4", 112),
    _timm("lcnetv2", "lcnetv2_small", 64, scale=0.25, head_hidden_size=64),
    _timm(
        "levit", "levit_128s", 128, img_size=128, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(2, 2, 2)
    ),
    _timm(
        "lowformer",
        "lowformer_b0",
        64,
        width_list=[8, 16, 24, 32, 48],
        depth_list=[0, 1, 1, 2, 2],
        head_widths=(64, 80),
    ),
    _timm("mambaout", "test_mambaout", 64),
    _timm(
        "maxxvit",
        "maxvit_pico_rw_256",
        64,
        img_size=64,
        embed_dim=(32, 64, 96, 128),
        depths=(1, 1, 2, 1),
        stem_width=(8, 16),
    ),
    _timm("metaformer", "poolformerv2_s12", 64),
    _timm("mlp_mixer", "mixer_s32_224", 64, img_size=64),
    _timm("mobilenetv3", "mobilenetv3_small_050", 64),
    _timm("mobilenetv5", "mobilenetv5_base", 64, channel_multiplier=0.125, num_features=128),
    _timm("mobilevit", "mobilevit_xxs", 64),
    _timm("mvitv2", "mvitv2_tiny", 64, img_size=64),
    _timm("naflexvit", "naflexvit_base_patch16_gap", 32, patch_size=8, embed_dim=48, depth=2, num_heads=3),
    # its feature_info goes on naming the widths of the full model
    _timm("nasnet", "nasnetalarge", 64, stem_size=16, num_features=384),
    _timm("nest", "nest_tiny", 64, img_size=64),
    _timm("nextvit", "nextvit_small", 64, stem_chs=(16, 16, 16), depths=(1, 2, 5, 2)),
    _timm("nfnet", "test_nfnet", 64),
    _timm("pit", "pit_ti_224", 64, img_size=64, base_dims=(12, 12, 12), depth=(2, 2, 2)),
    _timm("pnasnet", "pnasnet5large", 48),
    _timm("pvt_v2", "pvt_v2_b0", 64, depths=(1, 2, 2, 1), **_HEADS),
    _timm("qwen3_vit", "qwen3_vit_88m", 32, **_VIT),
    _timm(
        "rdnet",
        "rdnet_tiny",
        64,
        num_init_features=16,
        growth_rates=[16, 24, 32, 32, 32, 32, 48],
        num_blocks_list=[1, 1, 2, 1, 1, 1, 2],
    ),
    _timm("regnet", "regnety_002", 64),
    _timm("repghost", "repghostnet_050", 64),
    _timm("repvit", "repvit_m0_9", 64, embed_dim=_PYRAMID, depth=(1, 1, 2, 2)),
    _timm("res2net", "res2net50_26w_4s", 64, layers=(1, 2, 1, 1), channels=_PYRAMID),
    _timm("resnest", "resnest14d", 64, stem_width=8, channels=_PYRAMID),
    _timm("resnet", "resnet18", 64, channels=_PYRAMID),
    _timm("resnetv2", "resnetv2_18", 64, stem_chs=16, channels=_PYRAMID),
    _timm("rexnet", "rexnet_100", 64, width_mult=0.5),
    _timm("selecsls", "selecsls42", 128),
    _timm("senet", "legacy_seresnet18", 64, layers=(1, 1, 1, 1)),
    _timm(
        "sequencer",
        "sequencer2d_s",
        56,
        img_size=56,
        layers=(1, 1, 2, 1),
        embed_dims=(24, 48, 48, 48),
        hidden_sizes=(6, 12, 12, 12),
    ),
    _timm("shvit", "shvit_s1", 128, embed_dim=(32, 48, 64), depth=(1, 2, 2), partial_dim=(8, 10, 16)),
    _timm("sknet", "skresnet18", 64, channels=_PYRAMID),
    _timm("starnet", "starnet_s050", 64),
    _timm("swiftformer", "swiftformer_xs", 64, layers=[1, 1, 2, 2], embed_dims=list(_PYRAMID)),
    _timm("swin_transformer", "swin_tiny_patch4_window7_224", 64, **_SWIN),
    _timm("swin_transformer_v2", "swinv2_tiny_window8_256", 64, **_SWIN),
    _timm("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 64, **_SWIN),
    _timm("tiny_vit", "tiny_vit_5m_224", 64, depths=(1, 2, 2, 1), window_sizes=(4, 4, 4, 2), **_HEADS),
    _timm(
        "tnt", "tnt_s_patch16_224", 32, img_size=32, embed_dim=48, inner_dim=12, depth=2, num_heads_outer=3
    ),
    _timm("tresnet", "tresnet_m", 64, layers=[1, 1, 2, 1], width_factor=0.25),
    _timm("twins", "twins_svt_small", 64, img_size=64, depths=(2, 2, 2, 2), wss=(4, 4, 4, 2), **_HEADS),
    _timm("vgg", "vgg11", 64, mlp_ratio=0.0625),
    _timm("visformer", "visformer_tiny", 64, img_size=64, init_channels=8, embed_dim=48, depth=(2, 2, 2)),
    _timm("vision_transformer", "test_vit", 64, img_size=64),
    _timm("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 64, img_size=64, embed_dim=48, depth=2),
    _timm("vision_transformer_relpos", "vit_relpos_small_patch16_224", 32, **_VIT),
    _timm(
        "vision_transformer_sam",
        "samvit_base_patch16_224",
        64,
        img_size=64,
        embed_dim=48,
        depth=4,
        num_heads=3,
        global_attn_indexes=[1, 3],
        window_size=2,
    ),
    _timm(
        "vitamin",
        "vitamin_small_224",
        64,
        img_size=64,
        embed_dim=48,
        depth=2,
        num_heads=3,
        embed_cfg=VitCfg(
            embed_dim=(16, 32, 48),
            depths=(1, 2, 1),
            stem_width=16,
            conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
            head_type="1d",
        ),
    ),
    _timm("volo", "volo_d1_224", 64, img_size=64),
    _timm("vovnet", "ese_vovnet19b_slim_dw", 64),
    _timm("xception", "legacy_xception", 64),
    _timm(
        "xception_aligned",
        "xception41p",
        64,
        block_cfg=[
            {"in_chs": 64, "out_chs": 32, "stride": 2},
            {"in_chs": 32, "out_chs": 48, "stride": 2},
            {"in_chs": 48, "out_chs": 48, "stride": 1},
            {"in_chs": 48, "out_chs": (48, 64, 64), "stride": 2},
            {"in_chs": 64, "out_chs": (64, 64, 96), "no_skip": True, "stride": 1},
        ],
    ),
    _timm("xcit", "xcit_nano_12_p8_224", 32, img_size=32, embed_dim=48, depth=2),
    _torchvision("alexnet", "alexnet", 128),
    _torchvision("convnext", "convnext_tiny", 64),
    _torchvision("densenet", "DenseNet", 64, growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16),
    _torchvision("efficientnet", "efficientnet_b0", 64),
    _torchvision("googlenet", "googlenet", 64, aux_logits=False, init_weights=False),
    _torchvision("inception", "inception_v3", 112, aux_logits=False, init_weights=False),
    _torchvision(
        "maxvit",
        "MaxVit",
        64,
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 48, 64],
        block_layers=[1, 1, 1, 1],
        head_dim=16,
        stochastic_depth_prob=0.1,
    ),
    _torchvision("mnasnet", "mnasnet0_5", 64),
    _torchvision("mobilenetv2", "mobilenet_v2", 64, width_mult=0.5),
    _torchvision("mobilenetv3", "mobilenet_v3_small", 64),
    _torchvision("regnet", "regnet_y_400mf", 64),
    _torchvision("resnet", "resnet18", 64),
    _torchvision("shufflenetv2", "shufflenet_v2_x0_5", 64),
    _torchvision("squeezenet", "squeezenet1_1", 64),
    _torchvision("swin_transformer", "swin_t", 64),
    _torchvision("swin_transformer", "swin_v2_t", 64),
    _torchvision("vgg", "vgg11", 64),
    _torchvision("vgg", "vgg11_bn", 64, init_weights=False),
    _torchvision(
        "vision_transformer",
        "VisionTransformer",
        32,
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=3,
        hidden_dim=48,
        mlp_dim=96,
    ),
)

# What cannot be used: "library/family" -> why. Empty: every family classifies and trains.
EXCLUDED: dict[str, str] = {}


def available(representative: Collection[str] | None = None) -> list[Any]:
    """The backbones as pytest parameters; one that the installed library lacks is skipped and says so.

    Of the names in `representative`, where given, each is part of every test run, and the rest is left to the sweep.
    """
    return [
        pytest.param(
            backbone,
            id=backbone.name,
            marks=[
                *([pytest.mark.skip(reason=backbone.missing)] if backbone.missing else []),
                *([] if representative is None or backbone.name in representative else [pytest.mark.sweep]),
            ],
        )
        for backbone in BACKBONES
    ]
