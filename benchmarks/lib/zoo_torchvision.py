"""The architectures of torchvision with random weights: name -> ZooModel.

Detectors are listed by their backbone (`:backbone`, a feature pyramid), as a user compresses them, and a few whole.
"""

from functools import partial
from typing import Any

from torch import nn

from lib.zoo_model import ZooModel

# Arguments of torchvision's constructors (not of its model functions, whose widths and depths are fixed), side of the
# image, and the module of the constructor.
CONSTRUCTED: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit_b_16": (
        "vision_transformer.VisionTransformer",
        {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128},
        64,
    ),
    "swin_t": (
        "swin_transformer.SwinTransformer",
        {"patch_size": [4, 4], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]},
        64,
    ),
    "maxvit_t": (
        "maxvit.MaxVit",
        {
            "input_size": (64, 64),
            "stem_channels": 16,
            "partition_size": 4,
            "block_channels": [16, 32],
            "block_layers": [1, 1],
            "head_dim": 8,
            "stochastic_depth_prob": 0.0,
        },
        64,
    ),
}
CLASSIFIERS = """
swin_v2_t convnext_tiny resnet18 resnext50_32x4d regnet_x_400mf regnet_y_400mf efficientnet_b0 efficientnet_v2_s
mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1 googlenet
densenet121 inception_v3 alexnet vgg11_bn
"""
VIDEO = "r3d_18 mc3_18 r2plus1d_18 swin3d_t"
SEGMENTATION = """
lraspp_mobilenet_v3_large fcn_resnet50 deeplabv3_mobilenet_v3_large deeplabv3_resnet50
"""
BACKBONES = """
retinanet_resnet50_fpn fcos_resnet50_fpn fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_fpn
maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn ssdlite320_mobilenet_v3_large ssd300_vgg16
"""
DETECTORS = "ssdlite320_mobilenet_v3_large retinanet_resnet50_fpn fasterrcnn_mobilenet_v3_large_320_fpn"
WIDE_CLASSIFIERS = ("alexnet", "vgg11_bn")  # two hidden layers of 4096
SIDES = {"inception_v3": 96, "ssdlite320_mobilenet_v3_large": 320, "ssd300_vgg16": 300}


def _named(name: str, **arguments: Any) -> nn.Module:
    """A model by its name in torchvision, without pretrained weights."""
    from torchvision.models import get_model

    module: nn.Module = get_model(name, weights=None, **arguments)
    return module


def _constructed(path: str, arguments: dict[str, Any]) -> nn.Module:
    """A model by its class, `module.Class` of torchvision.models."""
    from importlib import import_module

    module, _, name = path.rpartition(".")
    made: nn.Module = getattr(import_module(f"torchvision.models.{module}"), name)(num_classes=10, **arguments)
    return made


def _classifier(name: str) -> nn.Module:
    auxiliary = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    module = _named(name, num_classes=10, **auxiliary)
    if name in WIDE_CLASSIFIERS:
        _narrow(module.get_submodule("classifier"))
    return module


def _narrow(classifier: nn.Module) -> None:
    """Makes the hidden layers of a classifier 64 wide."""
    linear = [name for name, part in classifier.named_children() if isinstance(part, nn.Linear)]
    first = classifier.get_submodule(linear[0])
    assert isinstance(first, nn.Linear)
    widths = [first.in_features, *[64] * (len(linear) - 1), 10]
    for name, inputs, outputs in zip(linear, widths[:-1], widths[1:], strict=True):
        classifier.set_submodule(name, nn.Linear(inputs, outputs))


def _dense(name: str) -> nn.Module:
    """A segmentation or detection model without the weights that it would download for its backbone."""
    return _named(name, weights_backbone=None, num_classes=5)


def _detector(name: str) -> nn.Module:
    """A whole detector; most resize the image themselves, by default to 800 pixels."""
    sizes = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 128}
    return _named(name, weights_backbone=None, num_classes=5, **sizes)


def _backbone(name: str) -> nn.Module:
    module: nn.Module = _dense(name).get_submodule("backbone")
    return module


def models() -> dict[str, ZooModel]:
    """Each of torchvision's architectures in the list, by its name."""
    found = {
        name: ZooModel(partial(_constructed, path, arguments), (3, side, side))
        for name, (path, arguments, side) in CONSTRUCTED.items()
    }
    for name in CLASSIFIERS.split():
        found[name] = ZooModel(partial(_classifier, name), (3, SIDES.get(name, 64), SIDES.get(name, 64)))
    for name in VIDEO.split():
        found[f"video.{name}"] = ZooModel(partial(_named, name, num_classes=10), (3, 4, 64, 64))
    for name in SEGMENTATION.split():
        found[f"segmentation.{name}"] = ZooModel(partial(_dense, name))
    for name in BACKBONES.split():
        side = SIDES.get(name, 128)
        found[f"detection.{name}:backbone"] = ZooModel(partial(_backbone, name), (3, side, side))
    for name in DETECTORS.split():
        side = SIDES.get(name, 128)
        found[f"detection.{name}"] = ZooModel(partial(_detector, name), (3, side, side))
    return found
