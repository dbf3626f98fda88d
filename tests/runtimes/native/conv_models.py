"""Small ONNX files with 8-bit convolutions, as `--precision int8 --target ort` writes them, and exact results."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from int8_models import SCALE, ZERO, Graph
from numpy.typing import NDArray

from mpcompile.runtimes.native.int8_selection import inspected


@dataclass(frozen=True)
class Layer:
    """A convolution; `keep` of each 16 input channels of a tap are kept, in `sharing` neighbouring rows the same."""

    channels: int
    rows: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilations: tuple[int, int] = (1, 1)
    keep: int = 16
    sharing: int = 1
    largest: int = 31  # of the weights; above 32, lanes of 16 bits may saturate


def weight_of(layer: Layer, rng: np.random.Generator) -> NDArray[np.int8]:
    """Returns a random weight (rows, channels, height, width)."""
    shape = (layer.rows, layer.channels, *layer.kernel)
    weight = rng.integers(1, layer.largest, shape, endpoint=True) * rng.choice((-1, 1), shape)
    for start in range(0, layer.channels, 16):
        block = weight[:, start : start + 16]
        scores = rng.random((-(-layer.rows // layer.sharing), *block.shape[1:]))
        dropped = scores.argsort(1).argsort(1) >= layer.keep
        block[np.repeat(dropped, layer.sharing, 0)[: layer.rows]] = 0
    result: NDArray[np.int8] = weight.astype(np.int8)
    return result


def add_convolution(
    graph: Graph, x: str, layer: Layer, bias: bool = True, **attributes: Any
) -> tuple[str, NDArray[np.int8]]:
    """Adds a Conv of a dequantised tensor; returns its float32 result, and the weight."""
    weight = weight_of(layer, graph.rng)
    name = f"weight{len(graph.stored)}"
    scales = graph.rng.uniform(0.5, 1.0, layer.rows) / np.sqrt(np.square(weight, dtype=np.float64).sum((1, 2, 3)) + 1)
    graph.store(name, weight)
    zeros = graph.store(f"{name}.zero", np.zeros(layer.rows, np.int8))
    values = graph.op(
        "DequantizeLinear", [name, graph.store(f"{name}.scale", scales.astype(np.float32)), zeros], axis=0
    )
    inputs = [x, values]
    if bias:
        integers = graph.store(f"{name}.bias", graph.rng.integers(-(2**10), 2**10, layer.rows).astype(np.int32))
        steps = graph.store(f"{name}.bias_scale", (scales * SCALE).astype(np.float32))
        inputs.append(graph.op("DequantizeLinear", [integers, steps], axis=0))
    window = {"strides": layer.strides, "pads": layer.pads, "dilations": layer.dilations}
    return graph.op("Conv", inputs, **window | attributes), weight


def one_convolution(layer: Layer, seed: int, rectifier: str = "") -> tuple[onnx.ModelProto, NDArray[np.int8]]:
    """Returns a file x -> u8 with one convolution, and its weight."""
    graph = Graph(seed)
    product, weight = add_convolution(graph, graph.dequantize(graph.quantize("x")), layer, bias=False)
    if rectifier == "Clip":
        limits = [graph.store("least", np.float32(-0.5)), graph.store("most", np.float32(2.0))]
        product = graph.op("Clip", [product, *limits])
    elif rectifier:
        product = graph.op(rectifier, [product])
    graph.output(graph.quantize(product), onnx.TensorProto.UINT8)
    return graph.file(("n", layer.channels, "h", "w")), weight


def integers(x: NDArray[np.float32], weight: NDArray[np.int8], layer: Layer) -> NDArray[np.int64]:
    """Returns the exact sums of a convolution of u8 tensors less their zero point, in float64."""
    quantised = np.clip(np.rint(x / np.float32(SCALE)) + ZERO, 0, 255) - ZERO
    top, left, bottom, right = layer.pads
    padded = np.pad(quantised, ((0, 0), (0, 0), (top, bottom), (left, right)))
    sums = torch.nn.functional.conv2d(
        torch.from_numpy(padded.astype(np.float64)),
        torch.from_numpy(weight.astype(np.float64)),
        stride=layer.strides,
        dilation=layer.dilations,
    )
    return sums.numpy().astype(np.int64)


def with_native_convolutions(file: onnx.ModelProto, x: NDArray[np.float32]) -> onnx.ModelProto:
    """Returns the file with every convolution, and every product, on a native operator."""
    found = inspected(file, x)
    return found.rewritten(tuple(each.name for each in found.layers), attention=False)
