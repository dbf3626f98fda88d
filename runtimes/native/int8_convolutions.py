"""Finds the 8-bit convolutions of a file: a Conv between DequantizeLinear nodes whose result becomes u8.

Rectifiers before the QuantizeLinear belong to the convolution. So does the addition of another u8 tensor, the residual,
and what comes after that: QuantizeLinear, DequantizeLinear, Add, a rectifier, QuantizeLinear. If both operands of the
Add are convolutions, the later one adds the other.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
from jaxtyping import Float32, Int8

from mpcompile.runtimes.native.graph_reading import constant, number, only_reader, producer
from mpcompile.runtimes.native.int8_ops import U8Quantization
from mpcompile.runtimes.native.int8_products import dequantised, scalar_quantization, symmetric

MOST_COLUMNS = 1 << 16  # weights of an output channel; the operator's 32-bit sums cannot overflow
GROUPED = "the native int8 kernel has no convolution with groups: this one has {}, and runs on ONNX Runtime's kernels"
OTHER_INPUT = "its input is not a u8 tensor with one scale, which the native int8 convolution reads"
OTHER_WEIGHT = "its weight is not stored in s8 with one scale per output channel and zero points of 0"
TOO_LARGE = "the native int8 kernel takes at most 65,536 weights per output channel"
OTHER_SHAPE = "the native int8 kernel has convolutions over two axes with pads as numbers"
OTHER_BIAS = "its bias is not a constant of one number per output channel"
OTHER_OUTPUT = "its output is not quantised to u8, and the native int8 convolution returns u8"


@dataclass(frozen=True, slots=True)
class Residual:
    """A u8 tensor that is added to a convolution, which is quantised with `branch` before."""

    x: str
    quantization: U8Quantization
    branch: U8Quantization


@dataclass(frozen=True, slots=True)
class Int8Convolution:
    """A convolution of a u8 tensor and an s8 weight, with what follows it up to a u8 tensor.

    Attributes:
        name: of the Conv.
        x: the u8 tensor that it reads.
        source: the same in float32.
        x_quantization: its scale and zero point.
        product: the float32 result of the Conv.
        y: the u8 result.
        y_quantization: its scale and zero point.
        limits: the least and the largest integer of y.
        nodes: names of the tensors that the replaced nodes compute; the last is y.
        initializer: name of the stored weight.
        weight: the integers.
        scale: of each output channel.
        bias: of each output channel.
        strides: vertical, horizontal.
        pads: top, left, bottom, right.
        dilations: vertical, horizontal.
        residual: what is added, or None.
    """

    name: str
    x: str
    source: str
    x_quantization: U8Quantization
    product: str
    y: str
    y_quantization: U8Quantization
    limits: tuple[int, int]
    nodes: tuple[str, ...]
    initializer: str
    weight: Int8[np.ndarray, "rows channels height width"]
    scale: Float32[np.ndarray, " rows"]
    bias: Float32[np.ndarray, " rows"]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    residual: Residual | None = None

    @property
    def window(self) -> tuple[tuple[int, ...], ...]:
        """Strides, pads and dilations."""
        return self.strides, self.pads, self.dilations


@dataclass(frozen=True, slots=True)
class _End:
    """The u8 tensor that a value becomes, the limits of its integers, and the tensors computed on the way to it."""

    y: ir.Value
    quantization: U8Quantization
    limits: tuple[int, int]
    nodes: tuple[str, ...]


def find(
    file: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Int8Convolution], Mapping[str, str]]:
    """Returns the convolutions in file order, and why each other Conv with a name is not one.

    `shapes` are those of the operands of additions; a residual is only added by a convolution if the shapes agree.
    """
    graph = ir.from_proto(file).graph
    names = Counter(node.name for node in graph)
    plain: dict[str, Int8Convolution] = {}
    adding: dict[str, Int8Convolution] = {}  # by the u8 result of the addition; the last one that can add
    refused: dict[str, str] = {}
    for node in graph:
        if node.op_type != "Conv" or not node.name or names[node.name] > 1:
            continue
        try:
            plain[node.name] = _convolution(node)
        except _Refused as refusal:
            refused[node.name] = str(refusal)
            continue
        with_residual = _with_residual(plain[node.name], node, shapes)
        if with_residual is not None:
            adding[with_residual.y] = with_residual
    return list((plain | {convolution.name: convolution for convolution in adding.values()}).values()), refused


class _Refused(Exception):
    """Why a Conv is not one that the native operator computes."""


def _convolution(node: ir.Node) -> Int8Convolution:
    """Returns the convolution that a node computes, without the addition after it. Raises _Refused."""
    group = node.attributes.get_int("group", 1)
    if group != 1:
        raise _Refused(GROUPED.format(group))
    left, right = (producer(value, "DequantizeLinear") for value in node.inputs[:2])
    x_quantization = None if left is None else scalar_quantization(left)
    u8 = None if left is None else left.inputs[0]
    if left is None or x_quantization is None or u8 is None or u8.is_initializer():
        raise _Refused(OTHER_INPUT)
    weight_value, scale = (None, None) if right is None else (right.inputs[0], constant(right.inputs[1]))
    weight = constant(weight_value)
    if right is None or weight_value is None or weight is None or weight.dtype != np.int8 or scale is None:
        raise _Refused(OTHER_WEIGHT)
    rows, whole = len(weight), scale.size == 1
    if scale.dtype != np.float32 or not symmetric(right) or right.attributes.get_int("block_size", 0) != 0:
        raise _Refused(OTHER_WEIGHT)
    if not whole and (scale.shape != (rows,) or right.attributes.get_int("axis", 1) != 0):
        raise _Refused(OTHER_WEIGHT)
    padding = node.attributes.get_string("auto_pad", "NOTSET")
    if weight.ndim != 4 or padding != "NOTSET":
        raise _Refused(OTHER_SHAPE)
    if weight[0].size > MOST_COLUMNS:
        raise _Refused(TOO_LARGE)
    bias = np.zeros(rows, np.float32)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        stored = dequantised(node.inputs[2])
        if stored is None or stored.shape != (rows,):
            raise _Refused(OTHER_BIAS)
        bias = stored.astype(np.float32)
    output = node.outputs[0]
    end = _end(output)
    if end is None:
        raise _Refused(OTHER_OUTPUT)
    return Int8Convolution(
        name=str(node.name),
        x=str(u8.name),
        source=str(left.outputs[0].name),
        x_quantization=x_quantization,
        product=str(output.name),
        y=str(end.y.name),
        y_quantization=end.quantization,
        limits=end.limits,
        nodes=(str(output.name), *end.nodes),
        initializer=str(weight_value.name),
        weight=weight,
        scale=np.broadcast_to(scale.reshape(-1), rows).copy(),
        bias=bias,
        strides=tuple(node.attributes.get_ints("strides", (1, 1))),
        pads=tuple(node.attributes.get_ints("pads", (0, 0, 0, 0))),
        dilations=tuple(node.attributes.get_ints("dilations", (1, 1))),
    )


def _end(value: ir.Value) -> _End | None:
    """Returns the u8 tensor that a value becomes through rectifiers and a QuantizeLinear, or None."""
    limits: list[tuple[float, float]] = []
    nodes: list[str] = []
    while (reader := only_reader(value)) is not None:
        value = reader.outputs[0]
        nodes.append(str(value.name))
        if reader.op_type == "QuantizeLinear":
            quantization = scalar_quantization(reader)
            return (
                None if quantization is None else _End(value, quantization, _integers(limits, quantization), (*nodes,))
            )
        rectifier = _rectifier(reader)
        if rectifier is None:
            return None
        limits.append(rectifier)
    return None


def _rectifier(node: ir.Node) -> tuple[float, float] | None:
    """Returns the limits of a Relu, or of a Clip with constant limits; None for other nodes."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    given = [*node.inputs[1:], None, None][:2]
    limits = [number(value) for value in given]
    if any(limit is None and value is not None for limit, value in zip(limits, given, strict=True)):
        return None
    low, high = -np.inf if limits[0] is None else limits[0], np.inf if limits[1] is None else limits[1]
    return (low, high) if low <= high else None


def _integers(limits: list[tuple[float, float]], quantization: U8Quantization) -> tuple[int, int]:
    """Returns the integers between which a tensor lies that was clipped between these numbers, one pair at a time."""
    low, high = 0, 255
    for pair in limits:
        least, most = (
            int(np.clip(np.rint(np.float32(limit) / np.float32(quantization.scale)) + quantization.zero, 0, 255))
            for limit in pair
        )
        low, high = min(max(low, least), most), min(max(high, least), most)
    return low, high


def _with_residual(
    convolution: Int8Convolution, node: ir.Node, shapes: Mapping[str, tuple[int, ...]]
) -> Int8Convolution | None:
    """Returns the convolution with the addition after it, or None if the operator does not compute that."""
    [y] = [value for value in _values(node) if value.name == convolution.y]
    dequantise = only_reader(y)
    if dequantise is None or dequantise.op_type != "DequantizeLinear" or convolution.limits != (0, 255):
        return None
    product = dequantise.outputs[0]
    add = only_reader(product)
    if add is None or add.op_type != "Add" or scalar_quantization(dequantise) != convolution.y_quantization:
        return None
    other = next((value for value in add.inputs if value is not product), None)
    source = producer(other, "DequantizeLinear")
    u8, end = None if source is None else source.inputs[0], _end(add.outputs[0])
    quantization = None if source is None else scalar_quantization(source)
    if other is None or u8 is None or u8.is_initializer() or quantization is None or end is None:
        return None
    own = shapes.get(str(product.name))
    if own is None or shapes.get(str(other.name)) != own:
        return None
    return replace(
        convolution,
        y=str(end.y.name),
        y_quantization=end.quantization,
        limits=end.limits,
        nodes=(*convolution.nodes, str(product.name), str(add.outputs[0].name), *end.nodes),
        residual=Residual(str(u8.name), quantization, convolution.y_quantization),
    )


def _values(node: ir.Node) -> Iterator[ir.Value]:
    """Yields the values on the way from a node, as long as each has one reader."""
    value: ir.Value | None = node.outputs[0]
    while value is not None:
        yield value
        reader = only_reader(value)
        value = None if reader is None else reader.outputs[0]
