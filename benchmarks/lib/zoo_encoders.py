"""transformers' image classifiers, backbones and vision encoders with random weights: name -> ZooModel.

A name is that of the model's class. Widths, depths and sizes are small; widths are multiples of 4, so that layers can
take 2:4.
"""

from typing import Any

import torch
from torch import Tensor

from lib.zoo_configs import CONVNEXT, DINO, LABELS, PYRAMID, RESNET, STAGES, SWIN, SWIN_4_STAGES, VIT, WIDTH, model
from lib.zoo_model import ZooModel

TWO_STAGES = {"out_features": ["stage1", "stage2"]}
MOBILENET = {"depth_multiplier": 0.5, "image_size": 64}
LEVIT = {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]}
HGNET = {
    "embedding_size": 16,
    "stem_channels": [3, 16, 16],
    "hidden_sizes": [32, 32, 64, 64],
    "stage_in_channels": [16, 32, 32, 64],
    "stage_mid_channels": [16, 16, 32, 32],
    "stage_out_channels": [32, 32, 64, 64],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}
# Model class -> arguments of its configuration.
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": VIT,
    "DeiTForImageClassification": VIT,
    "DeiTForImageClassificationWithTeacher": VIT,
    "BeitForImageClassification": {**VIT, "use_relative_position_bias": True},
    "Data2VecVisionForImageClassification": {**VIT, "use_shared_relative_position_bias": True},
    "Dinov2ForImageClassification": DINO,
    "Dinov2WithRegistersForImageClassification": DINO,
    "ViTMSNForImageClassification": VIT,
    "IJepaForImageClassification": VIT,
    "CLIPForImageClassification": {"vision_config": VIT},
    "SiglipForImageClassification": {"vision_config": VIT},
    "MetaClip2ForImageClassification": {"vision_config": VIT},
    "SwinForImageClassification": SWIN,
    "Swinv2ForImageClassification": SWIN,
    "DonutSwinForImageClassification": SWIN,
    "ConvNextForImageClassification": CONVNEXT,
    "ConvNextV2ForImageClassification": CONVNEXT,
    "ResNetForImageClassification": RESNET,
    "RegNetForImageClassification": {**RESNET, "groups_width": 8},
    "BitForImageClassification": {**RESNET, "num_groups": 4},
    "MobileNetV1ForImageClassification": MOBILENET,
    "MobileNetV2ForImageClassification": MOBILENET,
    "MobileViTForImageClassification": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 64],
    },
    "MobileViTV2ForImageClassification": {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
    "EfficientNetForImageClassification": {
        "image_size": 64,
        "width_coefficient": 0.5,
        "depth_coefficient": 0.3,
        "hidden_dim": 640,
    },
    "LevitForImageClassification": LEVIT,
    "LevitForImageClassificationWithTeacher": LEVIT,
    "PvtForImageClassification": {**PYRAMID, "image_size": 64},
    "PvtV2ForImageClassification": {**PYRAMID, "image_size": 64},
    "CvtForImageClassification": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "PoolFormerForImageClassification": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "FocalNetForImageClassification": {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]},
    "HieraForImageClassification": {
        "image_size": [64, 64],
        "embed_dim": 16,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
    },
    "SwiftFormerForImageClassification": {
        "image_size": 64,
        "depths": [1, 1, 1, 1],
        "embed_dims": [16, 32, 32, 64],
    },
    "TextNetForImageClassification": {"image_size": [64, 64]},
    "PPLCNetForImageClassification": {"scale": 0.5},
    "HGNetV2ForImageClassification": HGNET,
    "SegformerForImageClassification": PYRAMID,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "BeitBackbone": {**VIT, **TWO_STAGES},
    "SwinBackbone": {**SWIN, **TWO_STAGES},
    "MaskFormerSwinBackbone": {**SWIN_4_STAGES, "out_features": STAGES},
    "ConvNextBackbone": {**CONVNEXT, "out_features": STAGES},
    "PvtV2Backbone": {**PYRAMID, "out_features": STAGES, "image_size": 64, "linear_attention": True},
    "VitDetBackbone": {
        **DINO,
        "window_size": 2,
        "window_block_indices": [0],
        "use_relative_position_embeddings": True,
    },
    "VitPoseBackbone": {**VIT, "image_size": [64, 64], "patch_size": [16, 16]},
    "DINOv3ViTModel": VIT,
    "DINOv3ConvNextModel": CONVNEXT,
    "PixioModel": VIT,
    "CLIPVisionModel": VIT,
    "CLIPVisionModelWithProjection": {**VIT, "projection_dim": 32},
    "SiglipVisionModel": VIT,
    "AltCLIPVisionModel": VIT,
    "ChineseCLIPVisionModel": VIT,
    "MetaClip2VisionModel": VIT,
    "BlipVisionModel": VIT,
    "Blip2VisionModel": VIT,
    "GitVisionModel": VIT,
    "OwlViTVisionModel": VIT,
    "MLCDVisionModel": VIT,
    "FlavaImageModel": VIT,
    "Idefics3VisionTransformer": VIT,
    "PixtralVisionModel": VIT,
    "InternVLVisionModel": {**VIT, "image_size": [64, 64], "patch_size": [16, 16]},
    "GroupViTVisionModel": {
        **VIT,
        "num_hidden_layers": 4,
        "depths": [2, 1, 1],
        "num_group_tokens": [8, 4, 0],
        "num_output_groups": [8, 4, 0],
    },
    "Aimv2VisionModel": VIT,
    "SamVisionModel": {**VIT, "output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64},
    "MgpstrForSceneTextRecognition": {
        **DINO,
        "image_size": [64, 64],
        "patch_size": [4, 4],
        "num_character_labels": 10,
        "num_bpe_labels": 16,
        "num_wordpiece_labels": 16,
    },
}
VIDEO: dict[str, dict[str, Any]] = {
    "VideoMAEForVideoClassification": {**VIT, **LABELS, "num_frames": 4},
    "VivitForVideoClassification": {**VIT, **LABELS, "num_frames": 4, "tubelet_size": [2, 16, 16]},
    "TimesformerForVideoClassification": {**VIT, **LABELS, "num_frames": 4},
}


def _patches(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """SigLIP2's inputs: 16 patches of each image, which of them are not padding, and the grids' shapes."""
    return {
        "pixel_values": torch.randn(count, 16, 3 * 16 * 16, generator=generator),
        "pixel_attention_mask": torch.ones(count, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]).expand(count, -1).contiguous(),
    }


def _with_noise(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The image, and the noise that orders ViT-MAE's patches; without it, `forward` draws random numbers."""
    return {
        "pixel_values": torch.randn(count, 3, 64, 64, generator=generator),
        "noise": torch.rand(count, 16, generator=generator),
    }


def models() -> dict[str, ZooModel]:
    """Each classifier, backbone and encoder in the list, by the name of its class."""
    found = {name: model(name, {**arguments, **LABELS}) for name, arguments in CLASSIFIERS.items()}
    found |= {name: model(name, arguments) for name, arguments in BACKBONES.items()}
    found |= {name: model(name, arguments, size=(4, 3, 64, 64)) for name, arguments in VIDEO.items()}
    found["Dinov2Backbone"] = model("Dinov2Backbone", {**DINO, **TWO_STAGES}, size=(3, 96, 96))
    siglip2 = {**WIDTH, "patch_size": 16, "num_patches": 16}
    found["Siglip2VisionModel"] = model("Siglip2VisionModel", siglip2, inputs=_patches)
    found["ViTMAEModel"] = model("ViTMAEModel", VIT, inputs=_with_noise)
    return found
