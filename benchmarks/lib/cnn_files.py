"""Untrained CNNs in int8 as the pass `quantize` places the quantizers, with masks by magnitude, for timings.

The pass fits weights for minutes; here they are rounded to nearest, and activations range from their minimum to their
maximum on two images. Where 16-bit lanes saturate, a row's scale is the least at which its lanes fit, as in the pass.
"""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from lib.nearest_int8 import rounded
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model, Source
from mpcompile.ir.pattern import NM
from mpcompile.ir.quantization import Quantizer
from mpcompile.ir.weight_groups import flat
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.passes.quantize.placement import insert, sites
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.runtimes.native import int8_rewrite
from mpcompile.runtimes.native.int8_selection import inspected

CIFAR = "cifar_resnet20"
SIZES = {CIFAR: 32, "resnet50": 224, "efficientnet_lite0": 224}


class _Block(nn.Module):
    """A residual block of two 3×3 convolutions; a 1×1 convolution of stride 2 where the number of channels doubles."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = out // channels
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if stride == 1 else nn.Sequential(nn.Conv2d(channels, out, 1, 2), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()  # type: ignore[no-any-return]


def _cifar_resnet() -> nn.Module:
    """Returns the ResNet-20 for images of 32 pixels, with 16, 32 and 64 channels."""
    channels = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [_Block(a, b) for a, b in pairwise(channels)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def untrained_cnn(name: str) -> Model:
    """Returns a CNN with random weights, captured: CIFAR, or one of timm."""
    torch.manual_seed(0)
    model = (_cifar_resnet() if name == CIFAR else timm.create_model(name, pretrained=False)).eval()
    for norm in model.modules():
        # timm starts the last one of each residual block at 0: a kernel would skip all weights of the layer before it.
        if isinstance(norm, nn.BatchNorm2d) and not norm.weight.any():
            nn.init.ones_(norm.weight)
    return capture(model, Source(name, "", name), torch.randn(1, 3, SIZES[name], SIZES[name]))


@dataclass(frozen=True)
class Quantised:
    """A quantised model, and the sparse layers in it: all quantised ones without groups."""

    model: Model
    masked: tuple[str, ...]


@torch.no_grad()
def in_int8(model: Model, pattern: NM | None, images: torch.Tensor, saturating: bool) -> Quantised:
    """Returns the model in int8, with the layers masked by magnitude whose number of channels the pattern divides."""
    layers = [name for name, reason in quantizable(model).items() if reason is None]
    graph = copy.deepcopy(model.graph)
    result, masked = replace(model, graph=graph), []
    names = insert(graph, sites(result, layers, "convolutions"), "u8")
    scales = {}
    for name in layers:
        weight = result.layer(name).weight
        if pattern is not None and weight.shape[1] % pattern.of == 0 and len(weight) % pattern.rows == 0:
            weight.mul_(nm_mask(weight.abs(), pattern))
            masked.append(name)
        # (rows, taps · channels), in the order of the kernel's columns
        integers, steps = rounded(np.ascontiguousarray(flat(weight).numpy().T), saturating)
        scales[name] = torch.from_numpy(steps)
        rows = torch.from_numpy(integers.T.astype(np.float32)) * scales[name][:, None]
        weight.copy_(rows.reshape(len(weight), *weight.shape[2:], weight.shape[1]).movedim(-1, 1))
    ranges: dict[str, tuple[float, float]] = {}
    hooks = [
        graph.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: ranges.update({name: (float(given[0].min()), float(given[0].max()))})
        )
        for name in names
    ]
    graph(images)
    for hook in hooks:
        hook.remove()
    for name, (low, high) in ranges.items():
        quantizer = graph.get_submodule(name)
        assert isinstance(quantizer, Quantizer)
        quantizer.set_range(low, high)
    result = result.with_plan({name: replace(model.plan_of(name), scale=scale) for name, scale in scales.items()})
    return Quantised(result, tuple(masked))


def standard_file(quantised: Quantised, path: Path) -> onnx.ModelProto:
    """Writes a quantised model to a file, as `--precision int8 --target ort` does, and returns it."""
    return onnx.load(lower(quantised.model, path, precision="int8").onnx)


def native_file(standard: onnx.ModelProto, images: NDArray[np.float32]) -> tuple[onnx.ModelProto, int]:
    """Returns the file with every native int8 operator that it can have, and the number of convolutions among them."""
    found = inspected(standard, images)
    made = int8_rewrite.replace(standard, found.products, found.shapes, convolutions=found.convolutions)
    return made, len(found.convolutions)
