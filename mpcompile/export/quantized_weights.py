"""Writes the weights of quantised layers as 8-bit initializers behind DequantizeLinear, with zero points of 0.

The exporter writes float weights, and multiplies a batch normalization into the convolution before it. A row of the
file's weight is therefore a · s · q, with the layer's scale s, its integers q (E4M3 values for fp8), and a factor a for
each output channel, which is 1 without batch normalization. The integers come from the graph's weight, the factor from
a least-squares fit of the file's row to q. If a is negative, q changes its sign, because scales are positive.

Zero is stored as zero, so the masks can be proven on the 8-bit numbers. The zero points are written although they are
0: ONNX Runtime runs a Gemm in 8 bits only with them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mpcompile.errors import BuildError
from mpcompile.export.mask_check import CONSTANT_STEPS, FileWeight, match_layers
from mpcompile.export.quantized_bias import new_initializer, quantize_bias, with_room_for_biases
from mpcompile.ir.model import LayerPlan
from mpcompile.ir.precision import Precision

METADATA_KEY = "mpcompile.quantization"
OFF_GRID = 1e-4  # of a step; a float32 product of a scale and an integer up to 127 is off by at most 2e-5 of a step
LARGEST_INT8 = 127
REFITTED = 1e-6  # a relative change of a weight that is larger is not a rounding of float32


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """An 8-bit weight of the file.

    Attributes:
        layers: qualified names of the layers that use it.
        initializer: name of the stored tensor.
        nodes: names of the nodes that multiply by it.
        op: the operator of these nodes: Conv, Gemm or MatMul.
        axis: the axis of the output channels in the initializer, along which the scales lie.
    """

    layers: tuple[str, ...]
    initializer: str
    nodes: tuple[str, ...]
    op: str
    axis: int


@dataclass(frozen=True, slots=True)
class _Grid:
    """The weight (out, in_, *taps) of one layer on its 8-bit grid: scale[o] · numbers[o]."""

    layer: str
    numbers: NDArray[np.float64]
    scale: NDArray[np.float64]
    precision: Precision

    def off(self, values: NDArray[np.float64], numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which values, in steps, differ from these numbers of the grid by more than the tolerance."""
        allowed = OFF_GRID * (np.abs(numbers) if self.precision == "fp8" else 1)
        return ~(np.abs(values - numbers) <= allowed)  # also where a value is not a number


def with_quantized_weights(
    file: onnx.ModelProto, plans: Mapping[str, LayerPlan], weights: Mapping[str, torch.Tensor], precision: Precision
) -> tuple[onnx.ModelProto, tuple[QuantizedWeight, ...]]:
    """The file with an 8-bit weight for each layer whose plan has a scale, and these weights in file order.

    A weight that several nodes use is stored once. Biases are written by quantized_bias.py.

    Args:
        file: the graph as exported, with float weights.
        plans: the plans of the layers.
        weights: the exported state dict.
        precision: int8 or fp8.

    Raises BuildError if a weight is missing in the file, or is not on its 8-bit grid.
    """
    grids = {
        name: _grid(name, weights[f"{name}.weight"], plan.scale, precision)
        for name, plan in plans.items()
        if plan.scale is not None
    }
    users: dict[str, list[str]] = {}
    found: dict[str, FileWeight] = {}
    for name, matched in match_layers(file, {name: plans[name] for name in grids}, weights).items():
        if not matched:
            raise BuildError(f"{name}: its weight was lost in the export; the ONNX file has no weight of this layer")
        for weight in matched:
            found[weight.node] = weight
            users.setdefault(weight.node, []).append(name)
    model = ir.from_proto(file)
    groups: dict[tuple[str, int], list[ir.Node]] = {}
    for node in [node for node in model.graph if node.name in found]:
        groups.setdefault((found[str(node.name)].initializer, _position(node)[1]), []).append(node)
    stored: dict[tuple[str, int], ir.Value] = {}
    rows: dict[tuple[str, int], QuantizedWeight] = {}
    for key, nodes in groups.items():
        names = [str(node.name) for node in nodes]
        layers = tuple(dict.fromkeys(layer for name in names for layer in users[name]))
        numbers, scale = _fitted(grids[layers[0]], found[names[0]].values)
        if precision == "int8":
            numbers, scale = with_room_for_biases(nodes, numbers, scale)
        axis = key[1]
        stored[key] = _dequantised(model.graph, nodes[0], numbers.T if axis else numbers, scale, axis, precision)
        for node in nodes:
            node.replace_input_with(_position(node)[0], stored[key])
            quantize_bias(model.graph, node)
        rows[key] = QuantizedWeight(layers, key[0], tuple(names), found[names[0]].op, axis)
    RemoveUnusedNodesPass()(model)
    initializers = _named_as_before(model.graph, stored)
    result: onnx.ModelProto = ir.to_proto(model)
    return result, tuple(replace(row, initializer=initializers[key]) for key, row in rows.items())


def _grid(layer: str, weight: torch.Tensor, scale: torch.Tensor, precision: Precision) -> _Grid:
    """The numbers of a layer's weight in the graph. Raises BuildError if they are not on the grid."""
    values = weight.detach().cpu().double().numpy()
    steps = scale.detach().cpu().double().numpy()
    with np.errstate(all="ignore"):  # a scale that is not positive is found below
        ratio = values / _along_rows(steps, values.ndim)
        numbers = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) if precision == "fp8" else np.rint(ratio)
        grid = _Grid(layer, numbers, steps, precision)
        wrong = grid.off(ratio, numbers) | (np.abs(numbers) > LARGEST_INT8 if precision == "int8" else False)
    if wrong.any():
        channel = int(np.argwhere(wrong)[0][0])
        raise BuildError(
            f"{layer}: {int(wrong.sum())} weights are not on their {precision} grid (the first is in output channel "
            f"{channel}); a pass after quantize changed them, so put quantize after it"
        )
    return grid


def _fitted(grid: _Grid, values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The numbers and the positive scale of a weight of the file. Raises BuildError if the weight is not on the grid.

    `values` is the weight as the file has it, (out, in_, *taps).
    """
    numbers, scale, found = grid.numbers, grid.scale, values.astype(np.float64)
    own = _along_rows(scale, numbers.ndim) * numbers
    if not (np.abs(found - own) <= REFITTED * np.abs(own)).all():
        rest = tuple(range(1, numbers.ndim))
        power = (numbers * numbers).sum(rest)
        scale = np.where(power > 0, (found * numbers).sum(rest) / np.where(power > 0, power, 1), scale)
    # A batch normalization with a weight of 0 leaves zeros of the row.
    zero = (scale == 0) | (np.abs(found).reshape(len(found), -1).max(1, initial=0) == 0)
    numbers = numbers * _along_rows(np.where(zero, 0, np.sign(scale)), numbers.ndim)
    scale = np.where(zero, grid.scale, np.abs(scale))
    wrong = grid.off(found / _along_rows(scale, numbers.ndim), numbers)
    if wrong.any():
        channel = int(np.argwhere(wrong)[0][0])
        raise BuildError(
            f"{grid.layer}: output channel {channel} of its weight in the ONNX file is not on its {grid.precision} "
            "grid; the export changed it by more than a factor for the channel"
        )
    return numbers, scale


def _along_rows(scale: NDArray[np.float64], axes: int) -> NDArray[np.float64]:
    """A number for each output channel, to be multiplied with a weight of this many axes."""
    return scale.reshape(-1, *[1] * (axes - 1))


def _position(node: ir.Node) -> tuple[int, int]:
    """The index of the input that is the weight, and the axis of the output channels as the node reads it."""
    if node.op_type == "Conv":
        return 1, 0
    if node.op_type == "Gemm":
        return 1, 0 if node.attributes.get_int("transB", 0) else 1
    return (1, 1) if _is_constant(node.inputs[1]) else (0, 0)


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, or one behind steps that only change its layout or type."""
    if value is None:
        return False
    producer = value.producer()
    if producer is None:
        return value.const_value is not None
    return producer.op_type in CONSTANT_STEPS and _is_constant(producer.inputs[0])


def _dequantised(
    graph: ir.Graph,
    node: ir.Node,
    numbers: NDArray[np.float64],
    scale: NDArray[np.float64],
    axis: int,
    precision: Precision,
) -> ir.Value:
    """The output of a new DequantizeLinear before `node`, of the numbers in the layout in which the node reads them."""
    kind = np.dtype(ml_dtypes.float8_e4m3fn) if precision == "fp8" else np.dtype(np.int8)
    name = f"{node.name}.{precision}"
    inputs = [
        new_initializer(graph, name, np.ascontiguousarray(numbers).astype(kind)),
        new_initializer(graph, f"{name}.scale", scale.astype(np.float32)),
        new_initializer(graph, f"{name}.zero_point", np.zeros(len(scale), kind)),
    ]
    step = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{node.name}_weight")
    step.outputs[0].name = f"{name}.dequantized"
    graph.insert_before(node, step)
    return step.outputs[0]


def _named_as_before(graph: ir.Graph, stored: Mapping[tuple[str, int], ir.Value]) -> dict[tuple[str, int], str]:
    """Gives each 8-bit initializer the name of the float one that it replaced, if that is gone; returns the names."""
    names = {}
    for key, dequantised in stored.items():
        step = dequantised.producer()
        assert step is not None
        tensor = step.inputs[0]
        assert tensor is not None
        if key[0] not in graph.initializers:
            tensor.name = key[0]
        names[key] = str(tensor.name)
    return names


def metadata_of(rows: Sequence[QuantizedWeight]) -> str:
    """The rows as the text of the file's metadata."""
    return json.dumps(
        {row.initializer: {"layers": row.layers, "nodes": row.nodes, "op": row.op, "axis": row.axis} for row in rows}
    )


def quantized_weights(file: onnx.ModelProto) -> tuple[QuantizedWeight, ...]:
    """The 8-bit weights of a file, from its metadata; empty for a file without any."""
    text = next((p.value for p in file.metadata_props if p.key == METADATA_KEY), "{}")
    return tuple(
        QuantizedWeight(tuple(row["layers"]), name, tuple(row["nodes"]), row["op"], row["axis"])
        for name, row in json.loads(text).items()
    )
