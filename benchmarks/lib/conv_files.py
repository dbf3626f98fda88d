"""Untrained CNNs and single convolutions with masks by magnitude, as float32 ONNX files for timings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from lib.untrained_cnns import pixels_of, untrained
from mpcompile.export.mask_check import FileWeight, ProvenMask, file_weights
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.pattern import NM
from mpcompile.ir.source import Source
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.runtimes.native.conv_op import Convolution, Window, columns_of
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm

STEM_CHANNELS = 3  # the first layer stays dense


def dense_file(name: str, batch: int, folder: Path) -> onnx.ModelProto:
    """Returns the ONNX file of a CNN with random weights."""
    size = pixels_of(name)
    model = capture(untrained(name), Source(name, "", name), torch.randn(1, 3, size, size))
    return onnx.load(lower(model, folder / f"{name}_{batch}_free.onnx", batch=batch).onnx)


def masked(file: onnx.ModelProto, pattern: NM) -> tuple[onnx.ModelProto, list[ProvenMask]]:
    """Returns the file with every weight without groups masked by magnitude that the pattern divides, and the masks."""
    result = onnx.ModelProto()
    result.CopyFrom(file)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    grouped = {n.name for n in file.graph.node if any(a.name == "group" and a.i != 1 for a in n.attribute)}
    proven = []
    for weight in file_weights(file):
        rows, channels = weight.values.shape[:2]
        divides = channels % pattern.of == 0 and rows % pattern.rows == 0
        if weight.node in grouped or not divides or channels == STEM_CHANNELS or weight.values.ndim == 3:
            continue
        kept = nm_mask(torch.from_numpy(np.abs(weight.values)), pattern).numpy()
        values = np.where(kept, weight.values, np.float32(0))
        values = values if weight.axis == 1 else np.ascontiguousarray(values.T)
        stored[weight.initializer].CopyFrom(numpy_helper.from_array(values, weight.initializer))
        proven.append(_proof(weight, pattern, int(kept.size - kept.sum())))
    return result, proven


def _proof(weight: FileWeight, pattern: NM, zeros: int) -> ProvenMask:
    """Returns the mask as `verify_masks` does."""
    text, size = str(pattern), weight.values.size
    return ProvenMask(
        weight.node, weight.initializer, (weight.node,), weight.op, weight.axis, text, pattern.of, zeros, size
    )


@dataclass(frozen=True)
class Layer:
    """A single convolution with a rectifier; it is padded so that stride 1 keeps the size."""

    channels: int
    rows: int
    kernel: int
    pixels: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.channels} → {self.rows}, {self.kernel}×{self.kernel}{stride}, {self.pixels} px"

    def x(self, batch: int) -> tuple[int, int, int, int]:
        """Returns the shape of its input."""
        return batch, self.channels, self.pixels, self.pixels

    def product(self, pattern: NM) -> MaskedGemm:
        """Returns the convolution with random weights, masked by magnitude."""
        rng = np.random.default_rng(0)
        shape = (self.rows, self.channels, self.kernel, self.kernel)
        weight: NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32)
        weight *= nm_mask(torch.from_numpy(np.abs(weight)), pattern).numpy()
        pads = (self.kernel // 2,) * 4
        window = Window((self.kernel, self.kernel), (self.stride, self.stride), (pads[0], pads[1], pads[2], pads[3]))
        done, bias = Convolution(window, "Relu"), np.zeros(self.rows, np.float32)
        return MaskedGemm(("layer",), "node", done.op, "x", "y", ("y",), "w", pattern, columns_of(weight), bias, done)


# Those of ResNet-50, and the pointwise ones of ConvNeXt-T as convolutions.
LAYERS: Sequence[Layer] = (
    Layer(64, 64, 1, 56), Layer(64, 64, 3, 56), Layer(64, 256, 1, 56), Layer(256, 64, 1, 56),
    Layer(128, 128, 3, 56, 2), Layer(128, 128, 3, 28), Layer(128, 512, 1, 28), Layer(512, 128, 1, 28),
    Layer(256, 256, 3, 14), Layer(256, 1024, 1, 14), Layer(1024, 256, 1, 14), Layer(512, 512, 3, 7),
    Layer(512, 2048, 1, 7), Layer(2048, 512, 1, 7),
    Layer(96, 384, 1, 56), Layer(384, 96, 1, 56), Layer(384, 1536, 1, 14), Layer(1536, 384, 1, 14),
)  # fmt: skip
