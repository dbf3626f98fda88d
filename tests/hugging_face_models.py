"""Tiny models of transformers with random weights, written to folders by save_pretrained."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mpcompile.frontend.hugging_face import missing

needs_transformers = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LABELS = {0: "tree", 1: "cat", 2: "dog", 3: "boat"}  # not in sorted order
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", SMALL | IMAGE),
    "ViTModel": ("ViTConfig", SMALL | IMAGE),
    "DeiTForImageClassification": ("DeiTConfig", SMALL | IMAGE),
    "Dinov2ForImageClassification": ("Dinov2Config", SMALL | IMAGE),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNextV2ForImageClassification": (
        "ConvNextV2Config", {"image_size": 32, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {
            "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 32, "image_size": 32,
        },
    ),
    "CLIPVisionModel": ("CLIPVisionConfig", SMALL | IMAGE),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", SMALL | IMAGE | {"projection_dim": 16}),
    "SiglipVisionModel": ("SiglipVisionConfig", SMALL | IMAGE),
    "ResNetForImageClassification": (
        "ResNetConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    ),
}  # fmt: skip


def hugging_face(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of a class in CONFIGS, in evaluation mode; classifiers have the classes of LABELS."""
    import torch
    import transformers

    config_class, values = CONFIGS[name]
    labels = (
        {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}} if "For" in name else {}
    )
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**values, **labels, **changes})
    module: nn.Module = getattr(transformers, name)(config)
    return module.eval()


def saved(folder: Path, module: Any, size: int | None = 32, **options: Any) -> Path:
    """The folder in which save_pretrained wrote a model, with a preprocessor_config.json for images of `size`."""
    import transformers

    module.save_pretrained(folder, **options)
    if size is not None:
        processor = transformers.ViTImageProcessor(size={"height": size, "width": size}, image_std=[0.25] * 3)
        processor.save_pretrained(folder)
    return folder
