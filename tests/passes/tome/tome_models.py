"""Models that the tests of token merging share."""

from dataclasses import replace
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.pipeline.pass_manager import PassManager

# Arguments with which an architecture is small and keeps what it is here for.
NARROW: dict[str, Any] = {"embed_dim": 48, "num_heads": 3}


TORCHVISION: dict[str, Any] = {
    "torchvision:VisionTransformer": {
        "image_size": 224, "patch_size": 32, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96,
    },
    "torchvision:SwinTransformer": {
        "patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": [7, 7],
    },
}  # fmt: skip


def captured(arch: str, **options: Any) -> Model:
    """A captured timm model with random weights, or one of torchvision's, small, where the name says so."""
    torch.manual_seed(0)
    if arch in TORCHVISION:
        module = getattr(torchvision.models, arch.partition(":")[2])(**TORCHVISION[arch])
        for head in [m for n, m in module.named_modules() if n.startswith("heads") and isinstance(m, nn.Linear)]:
            nn.init.normal_(head.weight)  # it starts with zeros, and then every image has the same outputs
    else:
        module = timm.create_model(arch, **options)
    source = source_of(module, name=arch, arch=arch, sha256="")
    if "img_size" in options:
        source = replace(source, size=(3, options["img_size"], options["img_size"]))
    return capture(module, source)


def run(model: Model, *passes: object, data: Data | None = None) -> Model:
    result, _ = PassManager(passes).run(model, data or Data())  # type: ignore[arg-type]
    return result
