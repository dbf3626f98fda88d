"""timm's architectures with random weights: name -> ZooModel. At least one of nearly every family of timm.

Depths, widths and image sizes are reduced where the constructor allows it, since capture does not depend on them. A
name may be followed by a colon and an option of timm.create_model that is set to True.
"""

from functools import partial
from typing import Any

from torch import nn

from lib.zoo_model import ZooModel

QUARTER = (32, 64, 64, 128)
STAGES = (1, 1, 1, 1)
SMALL = (16, 32, 64, 64)
TRANSFORMER = {"depth": 2, "embed_dim": 96, "num_heads": 4}
# (arguments, side of the image, names). The side is given to the constructor too if the arguments have `img_size`.
GROUPS: tuple[tuple[dict[str, Any], int, str], ...] = (
    (
        {"img_size": 64, **TRANSFORMER},
        64,
        """vit_tiny_patch16_224 vit_base_patch16_224 vit_base_patch16_clip_224 vit_base_patch16_siglip_224
        vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 deit_tiny_distilled_patch16_224
        deit3_small_patch16_224 flexivit_small beit_base_patch16_224 beitv2_base_patch16_224
        vit_pe_spatial_base_patch16_512 vit_small_patch16_rope_mixed_224
        vit_small_r26_s32_224""",
    ),
    (
        {"img_size": 56, **TRANSFORMER},
        56,
        """vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 eva02_tiny_patch14_224 aimv2_large_patch14_224
        deepseek_vit_412m""",
    ),
    (TRANSFORMER, 64, "naflexvit_base_patch16_gap"),
    ({"depth": 2}, 64, "vit_base_patch16_lingbot qwen3_vit_88m gemma4_vit_167m xcit_nano_12_p16_224"),
    (
        {"img_size": 64, "depth": 2},
        64,
        "tnt_s_legacy_patch16_224 convit_tiny visformer_tiny vitamin_small_224",
    ),
    ({"img_size": 64, "depth": 2, "embed_dim": 64}, 64, "cait_xxs24_224"),
    ({"img_size": 128, **TRANSFORMER, "global_attn_indexes": (1,)}, 128, "samvit_base_patch16"),
    ({"depth": ([1, 1, 0], [1, 1, 0], [1, 1, 0])}, 240, "crossvit_tiny_240"),
    (
        {"img_size": 64},
        64,
        """volo_d1_224 mixer_s32_224 gmlp_s16_224 resmlp_12_224 gmixer_12_224 nest_tiny levit_128s
        botnet26t_256 pit_ti_224""",
    ),
    ({"img_size": 64, "embed_dim": 32}, 64, "gcvit_xxtiny"),
    (
        {"img_size": 64, "depths": STAGES, "embed_dim": 48},
        64,
        "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 swin_s3_tiny_224",
    ),
    ({"img_size": 64, "stages": STAGES, "embed_dim": 48}, 64, "hiera_tiny_224"),
    ({"stages": STAGES, "embed_dim": 48}, 64, "hieradet_small"),
    (
        {"img_size": 64, "depths": STAGES, "embed_dim": (32, 32, 64, 64)},
        64,
        "maxvit_nano_rw_256 coatnet_0_rw_224 coatnet_rmlp_nano_rw_224",
    ),
    ({"img_size": 64, "depths": STAGES}, 64, "maxxvit_rmlp_nano_rw_256"),
    ({"depths": STAGES, "embed_dims": (32, 32, 64, 64), "num_heads": (1, 2, 4, 4)}, 64, "davit_tiny"),
    ({"img_size": 64, "embed_dims": SMALL}, 64, "coat_lite_tiny"),
    ({"img_size": 64, "embed_dims": (32, 64, 64, 64)}, 64, "coat_tiny"),
    ({"img_size": 64, "depths": STAGES, "embed_dims": SMALL}, 64, "efficientformerv2_s0"),
    ({"depths": STAGES, "embed_dims": SMALL}, 224, "efficientformer_l1"),
    ({"depths": STAGES, "embed_dims": SMALL}, 64, "twins_svt_small"),
    ({"layers": STAGES, "embed_dims": SMALL}, 64, "fastvit_t8 fastvit_mci0 sequencer2d_s swiftformer_xs"),
    ({"depths": STAGES, "embed_dim": 32}, 64, "fasternet_t0"),
    (
        {"depths": STAGES, "dims": SMALL},
        64,
        "edgenext_xx_small convnext_atto convnextv2_atto inception_next_atto mambaout_femto",
    ),
    ({"dims": SMALL}, 64, "csatv2 iformer_t"),
    ({"channels": QUARTER}, 64, "cspnext_tiny resnest14d"),
    (
        {"layers": STAGES, "channels": QUARTER},
        64,
        """resnet18 resnet50 resnet50d resnetv2_50 res2net50_14w_8s res2next50 resnetblur18 ecaresnet26t
        seresnext26t_32x4d skresnet18""",
    ),
    ({"layers": STAGES}, 64, "resnetv2_50d_gn resnetv2_50d_evos legacy_seresnet18"),
    ({"layers": STAGES, "width_factor": 0.25}, 64, "tresnet_m"),
    ({"depths": STAGES, "channels": QUARTER}, 64, "nf_resnet26 nf_regnet_b0"),
    (
        {"depths": STAGES},
        64,
        """nfnet_f0 pvt_v2_b0 twins_pcpvt_small efficientvit_b0 efficientvit_l1 tiny_vit_5m_224 lcnetv2_small
        starnet_s050""",
    ),
    ({"depths": (1, 1, 1)}, 64, "efficientvim_m1"),
    ({"mlp_ratio": 0.0625}, 64, "vgg11"),
    (
        {},
        64,
        """focalnet_tiny_srf efficientvit_m0 mobilevit_xxs poolformer_s12 regnetx_002 regnety_002 efficientnet_b0
        tf_efficientnet_lite0 tf_efficientnetv2_b0 mobilenetv3_small_100 mobilenetv4_conv_small ghostnet_100 rexnet_100
        repvgg_a0 densenet121 hrnet_w18_small mvitv2_tiny repvit_m0_9
        lambda_resnet26t eca_resnet33ts gernet_s regnetz_b16 resnet50_clip convmixer_768_32 cpubone_nano cs3darknet_s
        cspresnet50 dla34 dla60_res2net dpn48b mixnet_s mobilenetv2_050 tinynet_e
        ghostnetv2_100 hardcorenas_a hgnetv2_b0 lcnet_050 lowformer_b0 caformer_s18 mobilevitv2_050
        fbnetv3_b nextvit_small rdnet_tiny repghostnet_050 resnetv2_50x1_bit selecsls42 shvit_s1 ese_vovnet19b_slim_dw
        legacy_xception xception41 mobilenetv4_hybrid_medium""",
    ),
    ({}, 96, "inception_v3 inception_v4"),
    ({}, 256, "halonet26t"),
)
# Options of create_model: feature maps instead of logits, and images of another size than the position embedding's.
OPTIONS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("resnet18:features_only", {"layers": STAGES, "channels": QUARTER}, 64),
    ("convnext_atto:features_only", {"depths": STAGES, "dims": SMALL}, 64),
    ("swin_tiny_patch4_window7_224:features_only", {"img_size": 64, "depths": STAGES, "embed_dim": 48}, 64),
    ("vit_tiny_patch16_224:features_only", {"img_size": 64, **TRANSFORMER, "depth": 4}, 64),
    ("hrnet_w18_small:features_only", {}, 64),
    ("mobilenetv3_small_100:features_only", {}, 64),
    ("regnety_002:features_only", {}, 64),
    ("vit_tiny_patch16_224:dynamic_img_size", {"img_size": 64, **TRANSFORMER}, 96),
    ("vit_small_patch14_dinov2:dynamic_img_size", {"img_size": 56, **TRANSFORMER}, 112),
    ("eva02_tiny_patch14_224:dynamic_img_size", {"img_size": 56, **TRANSFORMER}, 112),
)


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Timm's model with 10 classes; `name` may end in `:option`."""
    import timm

    arch, _, option = name.partition(":")
    options = {option: True} if option else {}
    module: nn.Module = timm.create_model(arch, num_classes=10, **arguments, **options)
    return module


def models() -> dict[str, ZooModel]:
    """Each of timm's architectures in the list, by its name."""
    rows = [(name, arguments, side) for arguments, side, names in GROUPS for name in names.split()]
    return {
        name: ZooModel(partial(_create, name, arguments), (3, side, side))
        for name, arguments, side in [*rows, *OPTIONS]
    }
