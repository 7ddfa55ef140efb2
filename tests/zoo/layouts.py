"""Where channels and class tokens are, what the stages are and which map is pooled, in published architectures.

A stage "blocks.0-11 ..." stands for one of each number. A layout "" says that a value is no map: attention weights,
windows or heads among the images, tables that no image has a part in.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Places:
    """What is right for one architecture: layouts of modules' outputs, stages in order, and the map before pooling."""

    name: str  # of timm; "tv:" of torchvision, at 224×224
    layouts: dict[str, str] = field(hash=False)
    stages: tuple[str, ...]
    pooled: str | None


PLACES = (
    Places(
        "mobilevitv2_050",
        {"stem.conv": "NCHW", "stages.3.0.conv1_1x1.conv": "NCHW", "head.global_pool.pool": "NCHW"},
        (
            "stages.0 32x128x128 NCHW",
            "stages.1 64x64x64 NCHW",
            "stages.2 128x32x32 NCHW",
            "stages.3 192x16x16 NCHW",
            "final_conv 256x8x8 NCHW",
        ),
        "stages NCHW",
    ),
    Places(
        "crossvit_tiny_240",
        {
            "patch_embed.0.proj": "NCHW",
            "blocks.1.blocks.1.2.attn.norm": "NLC, 1 prefix",
            "norm.1": "NLC, 1 prefix",
            "blocks.1.blocks.1.2.attn.q_norm": "",
        },
        (
            "blocks.0.cat_1 401x96 NLC, 1 prefix",
            "blocks.1.cat_1 401x96 NLC, 1 prefix",
            "blocks.2.cat_1 401x96 NLC, 1 prefix",
            "blocks.0.cat_3 197x192 NLC, 1 prefix",
            "blocks.1.cat_3 197x192 NLC, 1 prefix",
            "blocks.2.cat_3 197x192 NLC, 1 prefix",
        ),
        None,
    ),
    Places(
        "tnt_s_legacy_patch16_224",
        {
            "pixel_embed.proj": "NCHW",
            "blocks.6.attn_in.qk": "",
            "norm": "NLC, 1 prefix",
            "blocks.5.attn_out.attn_drop": "",
        },
        ("blocks.0-11.add_4 197x384 NLC, 1 prefix",),
        None,
    ),
    Places(
        "mvitv2_tiny",
        {
            "patch_embed.proj": "NCHW",
            "stages.2.blocks.1.attn.proj": "NLC",
            "norm": "NLC",
            "stages.2.blocks.2.attn.norm_k": "",
        },
        (
            "stages.0.getitem 3136x96 NLC",
            "stages.1.getitem_4 784x192 NLC",
            "stages.2.getitem_16 196x384 NLC",
            "stages.3.getitem_4 49x768 NLC",
        ),
        "getitem_21 NLC",
    ),
    Places(
        "efficientvim_m1",
        {"patch_embed.conv.0.conv": "NCHW", "stages.1.blocks.0.mixer.act": "NCL", "norm.3": "NCHW"},
        (
            "stages.0.getitem_2 128x14x14 NCHW",
            "stages.1.getitem_2 192x7x7 NCHW",
            "stages.2.getitem_2 320x4x4 NCHW",
        ),
        None,
    ),
    Places(
        "vit_tiny_patch16_224",
        {
            "patch_embed.proj": "NCHW",
            "blocks.6.attn.qkv": "NLC, 1 prefix",
            "norm": "NLC, 1 prefix",
            "blocks.6.attn.q_norm": "",
        },
        ("blocks.0-11 197x192 NLC, 1 prefix",),
        None,
    ),
    Places(
        "vgg11_bn",
        {"features.0": "NCHW", "features.18": "NCHW", "head.global_pool.pool": "NCHW"},
        (
            "features.2 64x224x224 NCHW",
            "features.6 128x112x112 NCHW",
            "features.13 256x56x56 NCHW",
            "features.20 512x28x28 NCHW",
            "features.27 512x14x14 NCHW",
            "features.28 512x7x7 NCHW",
        ),
        "pre_logits NCHW",
    ),
    Places(
        "tv:mnasnet0_5",
        {"layers.0": "NCHW", "layers.10.1": "NCHW", "layers": "NCHW"},
        (
            "layers.7 8x112x112 NCHW",
            "layers.8 16x56x56 NCHW",
            "layers.9 24x28x28 NCHW",
            "layers.11 48x14x14 NCHW",
            "layers 1280x7x7 NCHW",
        ),
        "layers NCHW",
    ),
    Places(
        "tv:mobilenet_v3_small",
        {"features.0.0": "NCHW", "features.6": "NCHW", "avgpool": "NCHW"},
        (
            "features.0 16x112x112 NCHW",
            "features.1 16x56x56 NCHW",
            "features.3 24x28x28 NCHW",
            "features.8 48x14x14 NCHW",
            "features 576x7x7 NCHW",
        ),
        "features NCHW",
    ),
    Places(
        "tv:convnext_tiny",
        {"features.0.0": "NCHW", "features.5.2.stochastic_depth": "NCHW", "classifier.0": "NCHW"},
        (
            "features.1 96x56x56 NCHW",
            "features.3 192x28x28 NCHW",
            "features.5 384x14x14 NCHW",
            "features 768x7x7 NCHW",
        ),
        "features NCHW",
    ),
    Places(
        "tv:swin_v2_t",
        {"features.0.0": "NCHW", "features.5.2.attn.cpb_mlp.0": "", "avgpool": "NCHW"},
        (
            "features.1 56x56x96 NHWC",
            "features.3 28x28x192 NHWC",
            "features.5 14x14x384 NHWC",
            "features 7x7x768 NHWC",
        ),
        "permute NCHW",
    ),
    Places(
        "tv:vit_b_16",
        {
            "conv_proj": "NCHW",
            "encoder.layers.encoder_layer_6.ln_1": "NLC, 1 prefix",
            "encoder": "NLC, 1 prefix",
        },
        ("encoder.layers.encoder_layer_0-11 197x768 NLC, 1 prefix",),
        None,
    ),
    Places(
        "tv:densenet121",
        {"features.conv0": "NCHW", "features.denseblock3.denselayer11.conv2": "NCHW", "features": "NCHW"},
        (
            "features.relu0 64x112x112 NCHW",
            "features.denseblock1 256x56x56 NCHW",
            "features.denseblock2 512x28x28 NCHW",
            "features.denseblock3 1024x14x14 NCHW",
            "features 1024x7x7 NCHW",
        ),
        "relu NCHW",
    ),
    Places(
        "tv:squeezenet1_1",
        {"features.0": "NCHW", "features.9.squeeze": "NCHW", "classifier": "NCHW"},
        (
            "features.1 64x111x111 NCHW",
            "features.4 128x55x55 NCHW",
            "features.7 256x27x27 NCHW",
            "features 512x13x13 NCHW",
        ),
        None,
    ),
    Places(
        "tv:vgg11",
        {"features.0": "NCHW", "features.11": "NCHW", "avgpool": "NCHW"},
        (
            "features.1 64x224x224 NCHW",
            "features.4 128x112x112 NCHW",
            "features.9 256x56x56 NCHW",
            "features.14 512x28x28 NCHW",
            "features.19 512x14x14 NCHW",
            "features 512x7x7 NCHW",
        ),
        None,
    ),
    Places(
        "tv:googlenet",
        {"conv1.conv": "NCHW", "inception4c.branch3.0.conv": "NCHW", "avgpool": "NCHW"},
        (
            "conv1 64x112x112 NCHW",
            "conv3 192x56x56 NCHW",
            "inception3b 480x28x28 NCHW",
            "inception4e 832x14x14 NCHW",
            "inception5b 1024x7x7 NCHW",
        ),
        "inception5b NCHW",
    ),
    Places(
        "tv:inception_v3",
        {"Conv2d_1a_3x3.conv": "NCHW", "Mixed_6c.branch_pool.conv": "NCHW", "dropout": "NCHW"},
        (
            "Conv2d_2b_3x3 64x109x109 NCHW",
            "Conv2d_4a_3x3 192x52x52 NCHW",
            "Mixed_5d 288x25x25 NCHW",
            "Mixed_6e 768x12x12 NCHW",
            "Mixed_7c 2048x5x5 NCHW",
        ),
        "Mixed_7c NCHW",
    ),
    Places(
        "tv:maxvit_t",
        {
            "stem.0.0": "NCHW",
            "blocks.2.layers.1.layers.MBconv.layers.squeeze_excitation.scale_activation": "NCHW",
            "classifier.0": "NCHW",
        },
        (
            "stem 64x112x112 NCHW",
            "blocks.0 64x56x56 NCHW",
            "blocks.1 128x28x28 NCHW",
            "blocks.2 256x14x14 NCHW",
            "blocks.3 512x7x7 NCHW",
        ),
        "blocks.3 NCHW",
    ),
    Places(
        "tv:swin_t",
        {"features.0.0": "NCHW", "features.5.2.attn": "NHWC", "avgpool": "NCHW"},
        (
            "features.1 56x56x96 NHWC",
            "features.3 28x28x192 NHWC",
            "features.5 14x14x384 NHWC",
            "features 7x7x768 NHWC",
        ),
        "permute NCHW",
    ),
    Places(
        "tv:shufflenet_v2_x0_5",
        {"conv1.0": "NCHW", "stage3.3.branch2.7": "NCHW", "conv5": "NCHW"},
        (
            "conv1 24x112x112 NCHW",
            "maxpool 24x56x56 NCHW",
            "stage2 48x28x28 NCHW",
            "stage3 96x14x14 NCHW",
            "conv5 1024x7x7 NCHW",
        ),
        "conv5 NCHW",
    ),
    Places(
        "mobilevit_xxs",
        {
            "stem.conv": "NCHW",
            "stages.2.1.conv_fusion": "NCHW",
            "head.global_pool.pool": "NCHW",
            "stages.3.1.transformer.2.mlp.fc1": "",
        },
        (
            "stages.0 16x128x128 NCHW",
            "stages.1 24x64x64 NCHW",
            "stages.2 48x32x32 NCHW",
            "stages.3 64x16x16 NCHW",
            "final_conv 320x8x8 NCHW",
        ),
        "final_conv NCHW",
    ),
    Places(
        "cait_xxs24_224",
        {
            "patch_embed.proj": "NCHW",
            "blocks.12.attn.proj_drop": "NLC",
            "norm": "NLC, 1 prefix",
            "blocks.12.attn.proj_l": "",
        },
        ("blocks.0-23 196x192 NLC",),
        None,
    ),
    Places(
        "xcit_nano_12_p16_224",
        {
            "patch_embed.proj.0.0": "NCHW",
            "blocks.8.attn.proj": "NLC",
            "norm": "NLC, 1 prefix",
            "blocks.5.attn.attn_drop": "",
        },
        ("blocks.0-11 196x128 NLC",),
        None,
    ),
    Places(
        "levit_128s",
        {"stem.conv1.linear": "NCHW", "stages.1.blocks.1.attn": "NLC", "stages": "NLC"},
        (
            "stages.0 196x128 NLC",
            "stages.1 49x256 NLC",
            "stages.2 16x384 NLC",
        ),
        "stages NLC",
    ),
    Places(
        "coat_lite_tiny",
        {"patch_embed1.proj": "NCHW", "crpe3.conv_list.0": "NCHW", "norm4": "NLC, 1 prefix", "crpe3": ""},
        (
            "serial_blocks1.1 3137x64 NLC, 1 prefix",
            "serial_blocks2.1 785x128 NLC, 1 prefix",
            "serial_blocks3.1 197x256 NLC, 1 prefix",
            "serial_blocks4.1 50x320 NLC, 1 prefix",
        ),
        None,
    ),
    Places(
        "coat_tiny",
        {"patch_embed1.proj": "NCHW", "crpe3.conv_list.0": "NCHW", "norm4": "NLC, 1 prefix", "crpe3": ""},
        (
            "serial_blocks1.1 3137x152 NLC, 1 prefix",
            "serial_blocks2.1 785x152 NLC, 1 prefix",
        ),
        None,
    ),
    Places(
        "davit_tiny",
        {
            "stem.conv": "NCHW",
            "stages.2.blocks.0.1.attn": "NLC",
            "head.norm": "NCHW",
            "stages.2.blocks.0.0.attn.proj": "",
        },
        (
            "stages.0 96x56x56 NCHW",
            "stages.1 192x28x28 NCHW",
            "stages.2 384x14x14 NCHW",
            "stages.3 768x7x7 NCHW",
        ),
        "stages NCHW",
    ),
    Places(
        "pit_ti_distilled_224",
        {
            "patch_embed.conv": "NCHW",
            "transformers.1.blocks.4.attn.qkv": "NLC, 2 prefix",
            "norm": "NLC, 2 prefix",
            "transformers.1.blocks.4.attn.q_norm": "",
        },
        (
            "transformers.0.reshape 64x27x27 NCHW",
            "transformers.1.reshape 128x14x14 NCHW",
            "transformers.2.reshape 256x7x7 NCHW",
        ),
        None,
    ),
    Places(
        "swin_tiny_patch4_window7_224",
        {
            "patch_embed.proj": "NCHW",
            "layers.2.blocks.2.attn.qkv": "",
            "norm": "NHWC",
            "layers.2.blocks.1.attn.attn_drop": "",
        },
        (
            "layers.0 56x56x96 NHWC",
            "layers.1 28x28x192 NHWC",
            "layers.2 14x14x384 NHWC",
            "layers.3 7x7x768 NHWC",
        ),
        "norm NHWC",
    ),
    Places(
        "hiera_tiny_224",
        {"patch_embed.proj": "NCHW", "blocks.6.attn.qkv": "NLC", "blocks.11": "NLC"},
        (
            "blocks.0 3136x96 NLC",
            "blocks.2 784x192 NLC",
            "blocks.9 196x384 NLC",
            "blocks.11 49x768 NLC",
        ),
        "blocks.11 NLC",
    ),
    Places(
        "volo_d1_224",
        {
            "patch_embed.conv.0": "NCHW",
            "network.2.3.attn.proj": "NHWC",
            "aux_head": "NLC",
            "network.0.3.attn.attn_drop": "",
        },
        (
            "network.0 28x28x192 NHWC",
            "network.2 14x14x384 NHWC",
            "network.3 14x14x384 NHWC",
            "network.4 14x14x384 NHWC",
        ),
        None,
    ),
    Places(
        "deit_tiny_distilled_patch16_224",
        {
            "patch_embed.proj": "NCHW",
            "blocks.6.attn.qkv": "NLC, 2 prefix",
            "norm": "NLC, 2 prefix",
            "blocks.6.attn.q_norm": "",
        },
        ("blocks.0-11 198x192 NLC, 2 prefix",),
        None,
    ),
    Places(
        "vit_small_patch16_dinov3",
        {
            "patch_embed.proj": "NCHW",
            "blocks.6.attn.qkv": "NLC, 5 prefix",
            "norm": "NLC, 5 prefix",
            "blocks.6.attn.q_norm": "",
        },
        ("blocks.0-11 261x384 NLC, 5 prefix",),
        None,
    ),
    Places(
        "naflexvit_base_patch16_gap",
        {
            "embeds.proj": "NLC",
            "blocks.6.attn.qkv": "NLC, 4 prefix",
            "norm": "NLC, 4 prefix",
            "blocks.6.attn.q_norm": "",
        },
        ("blocks.0-11 580x768 NLC, 4 prefix",),
        None,
    ),
    Places(
        "edgenext_xx_small",
        {
            "stem.0": "NCHW",
            "stages.2.blocks.4.conv_dw": "NCHW",
            "head.norm": "NCHW",
            "stages.1.blocks.1.xca.attn_drop": "",
        },
        (
            "stages.0 24x64x64 NCHW",
            "stages.1 48x32x32 NCHW",
            "stages.2 88x16x16 NCHW",
            "stages.3 168x8x8 NCHW",
        ),
        "stages NCHW",
    ),
    Places(
        "fastvit_t8",
        {
            "stem.0.conv_scale.conv": "NCHW",
            "stages.2.blocks.0.token_mixer.mixer.act": "NCHW",
            "head.global_pool.pool": "NCHW",
        },
        (
            "stages.0 48x64x64 NCHW",
            "stages.1 96x32x32 NCHW",
            "stages.2 192x16x16 NCHW",
            "stages.3 384x8x8 NCHW",
        ),
        "final_conv NCHW",
    ),
    Places(
        "twins_svt_small",
        {"patch_embeds.0.proj": "NCHW", "blocks.2.4.attn": "NLC", "norm": "NLC", "blocks.2.4.attn.qkv": ""},
        (
            "blocks.0.1 3136x64 NLC",
            "blocks.1.1 784x128 NLC",
            "blocks.2.9 196x256 NLC",
            "blocks.3.3 49x512 NLC",
        ),
        "norm NLC",
    ),
    Places(
        "pvt_v2_b0",
        {"patch_embed.proj": "NCHW", "stages.1.blocks.1.attn": "NLC", "stages": "NCHW"},
        (
            "stages.0 32x56x56 NCHW",
            "stages.1 64x28x28 NCHW",
            "stages.2 160x14x14 NCHW",
            "stages.3 256x7x7 NCHW",
        ),
        "stages NCHW",
    ),
    Places(
        "nest_tiny",
        {
            "patch_embed.proj": "NCHW",
            "levels.2.transformer_encoder.1.attn": "NHWC",
            "global_pool.pool": "NCHW",
        },
        (
            "levels.0 96x56x56 NCHW",
            "levels.1 192x28x28 NCHW",
            "levels.2 384x14x14 NCHW",
        ),
        "permute_1 NCHW",
    ),
    Places(
        "sequencer2d_s",
        {"stem.proj": "NCHW", "stages.2.blocks.1.mlp_channels": "NHWC", "norm": "NHWC"},
        (
            "stages.0 32x32x192 NHWC",
            "stages.1 16x16x384 NHWC",
            "stages.2 16x16x384 NHWC",
            "stages.3 16x16x384 NHWC",
        ),
        "norm NHWC",
    ),
    Places(
        "mixer_s32_224",
        {"stem.proj": "NCHW", "blocks.3": "NLC", "norm": "NLC"},
        ("blocks.0-7 49x512 NLC",),
        "norm NLC",
    ),
    Places(
        "gmlp_ti16_224",
        {"stem.proj": "NCHW", "blocks.14": "NLC", "norm": "NLC"},
        ("blocks.0-29 196x128 NLC",),
        "norm NLC",
    ),
    Places(
        "efficientformer_l1",
        {"stem.conv1": "NCHW", "stages.2.blocks.2.token_mixer": "NCHW", "norm": "NLC"},
        (
            "stages.0 48x56x56 NCHW",
            "stages.1 96x28x28 NCHW",
            "stages.2 224x14x14 NCHW",
            "stages.3 49x448 NLC",
        ),
        "norm NLC",
    ),
    Places(
        "nextvit_small",
        {
            "stem.0.conv": "NCHW",
            "stages.2.blocks.2.mhca.group_conv3x3": "NCHW",
            "head.global_pool.pool": "NCHW",
        },
        (
            "stages.0 96x56x56 NCHW",
            "stages.1 256x28x28 NCHW",
            "stages.2 512x14x14 NCHW",
            "stages.3 1024x7x7 NCHW",
        ),
        "norm NCHW",
    ),
    Places(
        "maxvit_nano_rw_256",
        {
            "stem.conv1": "NCHW",
            "stages.2.blocks.0.attn_block.ls1": "NHWC",
            "head.global_pool.pool": "NCHW",
            "stages.2.blocks.0.attn_block.attn.qkv": "",
        },
        (
            "stem 64x128x128 NCHW",
            "stages.0 64x64x64 NCHW",
            "stages.1 128x32x32 NCHW",
            "stages.2 256x16x16 NCHW",
            "stages.3 512x8x8 NCHW",
        ),
        "norm NCHW",
    ),
    Places(
        "gcvit_xxtiny",
        {
            "stem.conv1": "NCHW",
            "stages.1.blocks.1.attn.proj": "",
            "head.global_pool.pool": "NCHW",
            "stages.1.blocks.1.attn.attn_drop": "",
        },
        (
            "stages.0 64x56x56 NCHW",
            "stages.1 128x28x28 NCHW",
            "stages.2 256x14x14 NCHW",
            "stages.3 512x7x7 NCHW",
        ),
        "stages NCHW",
    ),
    Places(
        "hrnet_w18_small",
        {"conv1": "NCHW", "stage4.0.branches.0.1.conv1": "NCHW", "global_pool.pool": "NCHW"},
        (
            "stage2.getitem 16x56x56 NCHW",
            "stage3.getitem 16x56x56 NCHW",
            "stage4.getitem 16x56x56 NCHW",
        ),
        "final_layer NCHW",
    ),
    Places(
        "convit_tiny",
        {
            "patch_embed.proj": "NCHW",
            "blocks.5.attn.proj_drop": "NLC",
            "norm": "NLC, 1 prefix",
            "blocks.5.attn.attn_drop": "",
        },
        (
            "blocks.0-9 196x192 NLC",
            "blocks.10-11 197x192 NLC, 1 prefix",
        ),
        None,
    ),
)
