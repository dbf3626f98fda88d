"""The ends of the products in an ONNX file: whether each reads 8 bits and returns 8 bits.

Runtimes have some 8-bit kernels only from 8 bits to 8 bits, and run a product in floating point otherwise.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx

# Operators between the DequantizeLinear of an activation and a product that keep its numbers.
LAYOUT_STEPS = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "MaxPool")


@dataclass(frozen=True, slots=True)
class Ends:
    """What a product reads and what reads its result: each None if it is 8 bits, else the operator in words."""

    reads: str | None
    returns: str | None


def ends_of(file: onnx.ModelProto, fused: Collection[str]) -> dict[str, Ends]:
    """The ends of each Conv, Gemm and MatMul node, by node name.

    The result of a product counts from behind the operators of one activation that the runtime fuses with it, `fused`,
    and the Add of a bias.
    """
    constants = {tensor.name for tensor in file.graph.initializer}
    # A bias may be stored as integers.
    steps = (node for node in file.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants)
    constants |= {node.output[0] for node in steps}
    makers = {output: node for node in file.graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in file.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in file.graph.output}
    found = {}
    for node in file.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            reads = _source(node.input[0], makers)
            found[node.name] = Ends(reads, _end(node, readers, outputs, constants, fused))
    return found


def _source(name: str, makers: Mapping[str, onnx.NodeProto]) -> str | None:
    """None if a value is behind DequantizeLinear, else what makes it."""
    maker = makers.get(name)
    while maker is not None and maker.op_type in LAYOUT_STEPS:
        name = maker.input[0]
        maker = makers.get(name)
    if maker is None:
        return f"{name}, which is not quantised"
    return None if maker.op_type == "DequantizeLinear" else f"{maker.op_type} {maker.name}"


def _end(
    node: onnx.NodeProto,
    readers: Mapping[str, list[onnx.NodeProto]],
    outputs: Collection[str],
    constants: Collection[str],
    fused: Collection[str],
) -> str | None:
    """None if QuantizeLinear alone reads the result of a node, behind fused operators; else what reads it."""
    while True:
        [result, *_] = node.output
        if result in outputs:
            return "it is an output of the model"
        following = readers.get(result, [])
        others = [reader for reader in following if reader.op_type != "QuantizeLinear"]
        if not others:
            return None if following else "nothing reads it"
        if len(following) > 1 or not _is_fused(others[0], result, constants, fused):
            return f"{others[0].op_type} {others[0].name} reads it"
        node = others[0]


def _is_fused(node: onnx.NodeProto, result: str, constants: Collection[str], fused: Collection[str]) -> bool:
    """Whether a node is fused with the product before it: a fused operator, or the Add of a bias."""
    if node.op_type == "Add":
        return any(name in constants for name in node.input if name != result)
    return node.op_type in fused
