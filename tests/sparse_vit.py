"""A small ViT whose weights already follow 2:4, with images that it classifies by a wide margin.

2:4 therefore costs it no accuracy, and 1:8 or 1:64 cost it most of its accuracy. Rounding changes neither.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from mpcompile.ir.pattern import NM
from mpcompile.passes.nm_mask.selection import nm_mask

POOL = 2048  # images to choose from
CLASSES = tuple("abcdefghij")


def write_sparse_vit(folder: Path, depth: int = 1, images: int = 256) -> tuple[Path, Path]:
    """A timm model file of 4 * depth + 2 layers, with its config, and an .npz file of images, all in `folder`.

    Each split has that many images. Labels are the model's own answers.
    """
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": depth, "num_heads": 2}
    module = VisionTransformer(num_classes=len(CLASSES), **args).eval()
    rng = torch.Generator().manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (POOL, 8, 8), np.uint8)
    with torch.no_grad():
        for name, value in module.named_parameters():
            drawn = torch.randn(value.shape, generator=rng)
            value.copy_(drawn / value[0].numel() ** 0.5 if value.ndim > 1 else drawn / 5 + name.endswith("weight"))
        for layer in module.blocks.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(nm_mask(layer.weight.abs(), NM(2, 4)))
        normal = (torch.from_numpy(pixels).float()[:, None] / 255 - 0.5) / 0.5
        module.head.bias.sub_(module(normal).mean(0))  # so that no class gets all images
        logits = module(normal)
    best = logits.topk(2).values
    margin = best[:, 0] - best[:, 1]
    chosen = margin.argsort(descending=True)[: 2 * images]
    # Parity allows 1e-4 of the largest logit between runtimes, and int8 moves logits by some per cent of it.
    assert float(margin[chosen].min()) > 0.1 * float(logits.abs().max())
    chosen = chosen[torch.randperm(len(chosen), generator=rng)]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": len(CLASSES), "model_args": args}
    config["pretrained_cfg"] = {
        "input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "num_classes": len(CLASSES), "label_names": CLASSES,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {
        f"{split}_{what}": values[part.numpy()]
        for split, part in (("calibration", chosen[:images]), ("heldout", chosen[images:]))
        for what, values in (("images", pixels), ("labels", logits.argmax(1).numpy()))
    }
    np.savez(folder / "images.npz", **arrays)
    return folder / "model.safetensors", folder / "images.npz"
