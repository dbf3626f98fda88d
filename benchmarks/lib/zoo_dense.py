"""transformers' detection, segmentation, depth and image-to-image models with random weights: name -> ZooModel.

A name is that of the model's class. A configuration inside a configuration is made when the model is built.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.zoo_configs import DEEP, DINO, LABELS, PYRAMID, RESNET, STAGES, SWIN, SWIN_4_STAGES, VIT, config, model
from lib.zoo_model import ZooModel

DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 8,
    "num_labels": 5,
}
LAST = partial(config, "ResNet", **RESNET, out_features=["stage4"])
ALL = partial(config, "ResNet", **RESNET, out_features=STAGES)
RT_DETR = {
    "backbone_config": partial(config, "RTDetrResNet", **RESNET, out_features=STAGES[1:]),
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [32, 32, 64],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 8,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_labels": 5,
    "num_denoising": 0,
}
SWIN_BACKBONE = partial(config, "Swin", **SWIN_4_STAGES, out_features=STAGES)
MASK2FORMER = {
    "backbone_config": SWIN_BACKBONE,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "dim_feedforward": 64,
    "num_queries": 8,
    "num_labels": 5,
}
NECK = {"neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16}
DPT = {**VIT, **DEEP, **NECK, "is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3]}
MOBILEVIT = {"image_size": 64, "hidden_sizes": [16, 32, 32], "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 64]}
# Model class -> arguments of its configuration.
MODELS: dict[str, dict[str, Any]] = {
    "YolosForObjectDetection": {**VIT, "image_size": [64, 64], "num_labels": 5, "num_detection_tokens": 8},
    "DetrForObjectDetection": {**DETR, "backbone_config": LAST},
    "DetrForSegmentation": {
        **DETR,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "backbone_config": ALL,
    },
    "TableTransformerForObjectDetection": {**DETR, "backbone_config": LAST},
    "ConditionalDetrForObjectDetection": {**DETR, "backbone_config": LAST},
    "DabDetrForObjectDetection": {**DETR, "hidden_size": 32, "backbone_config": LAST},
    "DeformableDetrForObjectDetection": {
        **DETR,
        "backbone_config": partial(config, "ResNet", **RESNET, out_features=STAGES[1:]),
    },
    "RTDetrForObjectDetection": RT_DETR,
    "RTDetrV2ForObjectDetection": RT_DETR,
    "DFineForObjectDetection": RT_DETR,
    "LwDetrForObjectDetection": {
        "backbone_config": partial(
            config, "LwDetrViT", **DINO, window_block_indices=[0], num_windows=4, out_indices=[1, 2]
        ),
        "d_model": 32,
        "projector_scale_factors": [1.0],
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "num_queries": 8,
        "group_detr": 1,
        "decoder_layers": 1,
        "decoder_ffn_dim": 64,
        "num_labels": 5,
    },
    "MaskFormerForInstanceSegmentation": {
        "backbone_config": SWIN_BACKBONE,
        "decoder_config": partial(config, "Detr", **DETR),
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
        "num_labels": 5,
    },
    "Mask2FormerForUniversalSegmentation": {**MASK2FORMER, "feature_size": 32, "mask_feature_size": 32},
    "EomtForUniversalSegmentation": {
        **VIT,
        "num_hidden_layers": 3,
        "num_labels": 5,
        "num_queries": 8,
        "num_blocks": 1,
        "num_upscale_blocks": 1,
    },
    "SegformerForSemanticSegmentation": {**PYRAMID, **LABELS, "decoder_hidden_size": 32},
    "UperNetForSemanticSegmentation": {
        **LABELS,
        "backbone_config": SWIN_BACKBONE,
        "hidden_size": 32,
        "auxiliary_channels": 16,
    },
    "MobileNetV2ForSemanticSegmentation": {**LABELS, "depth_multiplier": 0.5, "image_size": 64},
    "MobileViTForSemanticSegmentation": {**LABELS, **MOBILEVIT, "aspp_out_channels": 32},
    "DPTForSemanticSegmentation": {**DPT, **LABELS},
    "DPTForDepthEstimation": DPT,
    "DepthAnythingForDepthEstimation": {
        **NECK,
        "backbone_config": partial(config, "Dinov2", **DINO | DEEP, out_features=STAGES, reshape_hidden_states=False),
        "reassemble_hidden_size": 32,
        "head_hidden_size": 8,
        "patch_size": 16,
    },
    "ZoeDepthForDepthEstimation": {
        **NECK,
        "backbone_config": partial(
            config,
            "Beit",
            **VIT | DEEP,
            out_features=STAGES,
            reshape_hidden_states=False,
            use_relative_position_bias=True,
        ),
        "bottleneck_features": 16,
        "backbone_hidden_size": 32,
        "num_relative_features": 8,
        "bin_embedding_dim": 16,
    },
    "GLPNForDepthEstimation": {**PYRAMID, "decoder_hidden_size": 32},
    "SuperPointForKeypointDetection": {
        "encoder_hidden_sizes": [16, 16, 32, 32],
        "decoder_hidden_size": 32,
        "descriptor_decoder_dim": 32,
    },
    "VitPoseForPoseEstimation": {
        "backbone_config": partial(config, "VitPoseBackbone", **VIT | {"image_size": [64, 64], "patch_size": [16, 16]}),
        "num_labels": 5,
    },
    "Swin2SRForImageSuperResolution": {**SWIN, "patch_size": 1, "window_size": 8, "upscale": 2},
}


def _with_task(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """OneFormer's inputs: the image and the tokens of the task's name."""
    return {
        "pixel_values": torch.randn(count, 3, 64, 64, generator=generator),
        "task_inputs": torch.randint(0, 100, (count, 8), generator=generator),
    }


def models() -> dict[str, ZooModel]:
    """Each detection, segmentation, depth and image-to-image model in the list, by the name of its class."""
    found = {name: model(name, arguments) for name, arguments in MODELS.items()}
    matting = {
        "backbone_config": partial(config, "VitDet", **DINO, num_channels=4, out_features=["stage2"]),
        "hidden_size": 32,
        "convstream_hidden_sizes": [8, 16, 32],
        "fusion_hidden_sizes": [32, 16, 16, 8],
    }
    found["VitMatteForImageMatting"] = model("VitMatteForImageMatting", matting, size=(4, 64, 64))
    oneformer = {
        **MASK2FORMER,
        "conv_dim": 32,
        "mask_dim": 32,
        "is_training": False,
        "task_seq_len": 8,
        "text_encoder_width": 32,
        "text_encoder_num_layers": 1,
        "query_dec_layers": 1,
    }
    found["OneFormerForUniversalSegmentation"] = model(
        "OneFormerForUniversalSegmentation", oneformer, inputs=_with_task
    )
    return found
