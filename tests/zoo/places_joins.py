"""Where the residual joins of networks are, decided by reading their sources: the reference for the rules.

A join is written as the name of the module whose forward adds, "#" for numbers, with how many there are. "depthwise"
and "part" are kinds of their own; see `fxgraft.graph.structure.joins`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Joins:
    """The joins of one architecture.

    Attributes:
        why: the reason, by the code of the blocks.
        blocks: how many joins there are by the name of their owner.
        depthwise: those on depthwise convolutions alone.
        part: those on a part of a block's channels.
    """

    why: str
    blocks: dict[str, int] = field(default_factory=dict)
    depthwise: dict[str, int] = field(default_factory=dict)
    part: dict[str, int] = field(default_factory=dict)

    def counted(self) -> dict[tuple[str, str], int]:
        """List the joins by name and kind."""
        kinds = {"block": self.blocks, "depthwise": self.depthwise, "part": self.part}
        return {(name, kind): n for kind, names in kinds.items() for name, n in names.items()}


FEW: dict[str, Joins] = {
    "hiera_tiny_224": Joins(
        "attention and MLP; where a block pools, so does its shortcut, by view().amax()", {"blocks.#": 24}
    ),
    "poolformerv2_s12": Joins(
        "res_scale(x) + pooling of x, and res_scale(x) + MLP", {"stages.#.blocks.#": 24}
    ),
    "hgnet_tiny": Joins("one of the blocks has a shortcut", {"stages.#.blocks.#": 1}),
    "iformer_t": Joins(
        "ConvBlock, SHMA and FFN are each a Residual; RepCPE is one on a depthwise convolution",
        {"stages.#.blocks.#.mixer": 21},
        {"stages.#.blocks.#.cpe": 5},
    ),
    "tv/resnet18": Joins("one sum in each of eight blocks", {"layer#.#": 8}),
}
"""Checked with every run of the tests: small ones, and one for each rule."""

REST: dict[str, Joins] = {
    "starnet_s1": Joins("one sum in each block, around a product of two convolutions", {"stages.#.#": 15}),
    "rexnet_100": Joins("the block adds on its first channels and concatenates the rest", {"features.#": 11}),
    "mobileone_s0": Joins(
        "identity norm + parallel convolutions, then the activation: one join in each block with an identity",
        {"stages.#.#": 35},
    ),
    "ghostnetv3_050": Joins(
        "the shortcut of each bottleneck; the parallel convolutions inside are parts of one layer",
        {"blocks.#.#": 16},
    ),
    "csatv2": Joins(
        "the blocks' own sums; those of spatial attention, on maps of one channel, make a gate, and the position "
        "encodings lie in front of attention, in its branch",
        {"stages.#.#": 22},
    ),
    "davit_tiny": Joins(
        "attention and MLP of each block, and a convolutional position encoding in front of each",
        {"stages.#.blocks.#.#": 24},
        {"stages.#.blocks.#.#.cpe#": 24},
    ),
    "twins_pcpvt_small": Joins(
        "attention and MLP, and a position encoding in each stage", {"blocks.#.#": 32}, {"pos_block.#": 4}
    ),
    "twins_svt_small": Joins("the same", {"blocks.#.#": 36}, {"pos_block.#": 4}),
    "coat_tiny": Joins(
        "attention and MLP of serial blocks, and of three scales in parallel ones; four shared position encodings",
        {"serial_blocks#.#": 16, "parallel_blocks.#": 36},
        {"cpe#": 4},
    ),
    "pnasnet5large": Joins("a cell concatenates sums of parallel operations: none is the cell's value"),
    "nasnetalarge": Joins("the same"),
    "poolformer_s12": Joins("x + pooling of its norm, x + MLP", {"stages.#.blocks.#": 24}),
    "convformer_s18": Joins("token mixer and MLP", {"stages.#.blocks.#": 36}),
    "dpn48b": Joins(
        "the residual channels are added, the dense ones concatenated: together the block's value",
        {"features.conv#_#": 16},
    ),
    "repvit_m1": Joins(
        "the channel mixers of 20 blocks, of 3 blocks in front of downsampling, and behind it; the token mixers are "
        "two depthwise convolutions and an identity in front of one norm",
        {"stages.#.blocks.#": 20, "stages.#.downsample.pre_block": 3, "stages.#.downsample": 3},
        {"stages.#.blocks.#.token_mixer": 20, "stages.#.downsample.pre_block.token_mixer": 3},
    ),
    "rdnet_tiny": Joins("dense blocks"),
    "repghostnet_050": Joins(
        "the bottlenecks; the sums in ghost modules are parts of one layer", {"blocks.#.#": 16}
    ),
    "repvgg_a0": Joins("blocks with an identity branch", {"stages.#.#": 17}),
    "fastvit_t8": Joins(
        "RepMixer is x + scale * (mixer(x) - norm(x)), depthwise; then the MLP; MobileOne blocks with an identity in "
        "stem and downsampling",
        {"stages.#.blocks.#": 10, "stem.#": 1, "stages.#.downsample.proj.#": 3},
        {"stages.#.blocks.#.token_mixer": 10},
    ),
    "res2net50_14w_8s": Joins(
        "the bottlenecks; what is added inside is another part of the channels", {"layer#.#": 16}
    ),
    "resnest14d": Joins("the bottlenecks", {"layer#.#": 4}),
    "skresnet18": Joins("the blocks; selective kernels sum parallel convolutions", {"layer#.#": 8}),
    "swiftformer_xs": Joins(
        "encoders, local representations, attention and MLP; proj(query * key) + query stays in attention",
        {"stages.#.blocks.#": 20, "stages.#.blocks.#.local_representation": 4},
    ),
    "mvitv2_tiny": Joins(
        "attention with a pooled or projected shortcut, and MLP; q is added in attention",
        {"stages.#.blocks.#": 20},
    ),
    "mvitv2_small_cls": Joins(
        "the same, where the shortcut pools all but the class token", {"stages.#.blocks.#": 32}
    ),
    "efficientvit_m0": Joins(
        "each of dw0, ffn0, mixer, dw1, ffn1 is a residual, and two in each downsampling; the cascade adds outputs of "
        "heads to inputs of others",
        {"stages.#.blocks.#.ffn#": 12, "stages.#.blocks.#.mixer": 6, "stages.#.downsample.res#.#": 4},
        {"stages.#.blocks.#.dw#": 12, "stages.#.downsample.res#.#": 4},
    ),
    "shvit_s1": Joins(
        "depthwise convolution, mixer and MLP are each a residual",
        {"stages.#.blocks.#.ffn": 11, "stages.#.blocks.#.mixer": 9, "stages.#.downsample.#": 4},
        {"stages.#.blocks.#.conv": 11, "stages.#.downsample.#": 4},
    ),
    "efficientvim_m1": Joins(
        "x + a * (f(x) - x) with two depthwise convolutions, a mixer and an MLP",
        {"stages.#.blocks.#": 12},
        {"stages.#.blocks.#": 12, "stages.#.downsample": 4},
    ),
    "gcvit_xxtiny": Joins(
        "attention and MLP; MBConv blocks in stem, downsampling and the global queries",
        {
            "stages.#.blocks.#": 24,
            "stem.down.conv_block": 1,
            "stages.#.downsample.conv_block": 3,
            "stages.#.global_block.blocks.conv#": 7,
        },
    ),
    "dla34": Joins(
        "the basic blocks, whose shortcut is an argument; roots concatenate",
        {"level#.tree#": 4, "level#.tree#.tree#": 8},
    ),
    "hrnet_w18_small": Joins(
        "bottlenecks and basic blocks; what is fused comes from other streams",
        {"layer#.#": 1, "stage#.#.branches.#.#": 18, "incre_modules.#.#": 4},
    ),
    "xcit_nano_12_p16_224": Joins(
        "attention, local interaction and MLP; two class attention blocks",
        {"blocks.#": 36, "cls_attn_blocks.#": 4},
    ),
    "edgenext_xx_small": Joins(
        "convolutional blocks; split attention twice: inside, and the block's own", {"stages.#.blocks.#": 15}
    ),
    "nextvit_small": Joins(
        "mixer and MLP; transformer blocks have attention and a convolutional mixer side by side, concatenated",
        {"stages.#.blocks.#": 40},
        part={"stages.#.blocks.#": 4},
    ),
    "inception_next_atto": Joins("one in each block", {"stages.#.blocks.#": 12}),
    "focalnet_tiny_srf": Joins("modulation and MLP; contexts are summed inside", {"layers.#.blocks.#": 24}),
    "mambaout_femto": Joins("one in each gated block", {"stages.#.blocks.#": 18}),
    "volo_d1_224": Joins("attention and MLP, and two class blocks", {"network.#.#": 36, "post_network.#": 4}),
    "levit_128s": Joins(
        "attention and MLP, and an MLP behind downsampling",
        {"stages.#.blocks.#": 18, "stages.#.downsample": 2},
    ),
    "tresnet_m": Joins("basic blocks and bottlenecks", {"body.layer#.#": 21}),
    "gernet_s": Joins("basic blocks and bottlenecks", {"stages.#.#": 14}),
    "cspresnet50": Joins("the bottlenecks in one of two concatenated halves", {"stages.#.blocks.#": 13}),
    "ese_vovnet39b": Joins("the two blocks that are not the first of their stages", {"stages.#.blocks.#": 2}),
    "efficientnet_b0": Joins("inverted residuals of one stride and width", {"blocks.#.#": 9}),
    "convmixer_768_32": Joins(
        "depthwise convolution, activation and norm beside a shortcut", {"blocks.#.#": 32}
    ),
    "convnext_atto": Joins("one in each block", {"stages.#.blocks.#": 12}),
    "tnt_s_patch16_224": Joins("pixels: attention and MLP; patches: the same", {"blocks.#": 48}),
    "vit_tiny_patch16_224": Joins("attention and MLP", {"blocks.#": 24}),
    "swin_tiny_patch4_window7_224": Joins("attention and MLP", {"layers.#.blocks.#": 24}),
    "lcnetv2_small": Joins(
        "one block has a shortcut; depthwise convolutions are parallel", {"stages.#.#": 1}
    ),
    "ghostnetv2_100": Joins("the bottlenecks", {"blocks.#.#": 16}),
    "legacy_xception": Joins("blocks with a plain or projected shortcut", {"block#": 12}),
    "resnetv2_50": Joins("pre-activated bottlenecks", {"stages.#.blocks.#": 16}),
    "vit_small_patch16_18x2_224": Joins(
        "two attentions, stacked and summed, beside one shortcut, then two MLPs", {"blocks.#": 36}
    ),
    "vit_base_patch16_xp_224": Joins("attention and MLP side by side: one in each block", {"blocks.#": 12}),
    "vit_relpos_small_patch16_rpn_224": Joins(
        "attention and MLP, norms at the ends of both", {"blocks.#": 24}
    ),
    "vitamin_small_224": Joins(
        "convolutional blocks in the embedding, whose shortcuts may pool and project; attention and MLP",
        {"patch_embed.backbone.stages.#.#": 6, "blocks.#": 28},
    ),
    "sam2_hiera_tiny": Joins("attention with a projected and pooled shortcut, and MLP", {"blocks.#": 24}),
    "efficientformerv2_s0": Joins(
        "attention in four blocks and an MLP in all; what downsampling adds to attention is a projected shortcut",
        {"stages.#.blocks.#": 18, "stages.#.downsample": 1},
    ),
    "halonet26t": Joins("the bottlenecks; relative positions are added to scores", {"stages.#.#": 8}),
    "densenet121": Joins("dense layers"),
    "tv/convnext_tiny": Joins("one in each block", {"features.#.#": 18}),
    "tv/vit_b_16": Joins("attention and MLP", {"encoder.layers.encoder_layer_#": 24}),
    "tv/mobilenet_v3_small": Joins("inverted residuals of one stride and width", {"features.#": 6}),
    "tv/swin_t": Joins("attention and MLP", {"features.#.#": 24}),
    "tv/mnasnet0_5": Joins("inverted residuals of one stride and width", {"layers.#.#": 10}),
    "tv/googlenet": Joins("inception blocks concatenate"),
}
