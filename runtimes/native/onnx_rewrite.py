"""Where an ONNX file multiplies by proven N:M weights, and the same file with the native operator there.

Anchor: a Gemm, a MatMul with the Add behind it, or a 1×1 Conv whose weight carries a proven mask. Check: a sentence
where the operator cannot take its place. Rewrite: `replace`, for those that a measurement chose.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from jaxtyping import Float32
from onnx import helper, numpy_helper

from mpcompile.errors import BuildError
from mpcompile.export.mask_check import FileWeight, ProvenMask, file_weights
from mpcompile.ir.pattern import NM
from mpcompile.runtimes.native.custom_op import (
    CONV,
    DOMAIN,
    GEMM,
    OLDEST_OPSET,
    VERSION,
    bias_initializer,
    function,
    initializers,
    make_node,
)
from mpcompile.runtimes.native.packing import Packed, pack, unpack


@dataclass(frozen=True, slots=True)
class MaskedGemm:
    """y = x · weightᵀ + bias in a file: one node, or a MatMul and its Add."""

    layers: tuple[str, ...]  # several where they are tied
    name: str
    op: str  # NMGemm or NMConv, what may take its place
    x: str
    y: str
    nodes: tuple[str, ...]  # the outputs of the nodes that it consists of; the last is y
    initializer: str
    pattern: NM
    weight: Float32[np.ndarray, "out in_"]
    bias: Float32[np.ndarray, " out"]

    @property
    def prefix(self) -> str:
        """The name of its streams in the file. Uses of one initializer share them, unless one turns it over."""
        return f"{self.initializer}.{self.weight.shape[0]}x{self.weight.shape[1]}.nm"


@dataclass(frozen=True, slots=True)
class Refused:
    """A masked layer that the operator cannot compute, and why, as a sentence."""

    layers: tuple[str, ...]
    name: str
    reason: str


def find(file: onnx.ModelProto, masks: Iterable[ProvenMask]) -> tuple[list[MaskedGemm], list[Refused]]:
    """Every product with a proven mask, in the order of the file, and those that the operator cannot compute."""
    rows: dict[str, list[ProvenMask]] = {}
    for mask in masks:
        rows.setdefault(mask.initializer, []).append(mask)
    names = Counter(node.name for node in file.graph.node)
    weights = {weight.node: weight for weight in file_weights(file)}
    uses = _uses(file.graph)
    constants = {tensor.name: tensor for tensor in file.graph.initializer}
    products: list[MaskedGemm] = []
    refused: list[Refused] = []
    for node in file.graph.node:
        weight = weights.get(node.name)
        if weight is None or weight.op != node.op_type or weight.initializer not in rows:
            continue
        layers = tuple(dict.fromkeys(row.layer for row in rows[weight.initializer]))
        reason = "its node has no name of its own" if names[node.name] > 1 or not node.name else None
        reason = reason or _refusal(node, weight, constants, rows[weight.initializer][0].pattern)
        if reason:
            refused.append(Refused(layers, node.name, reason))
        else:
            pattern = NM.parse(rows[weight.initializer][0].pattern)
            products.append(_product(layers, node, weight, pattern, constants, uses))
    return products, refused


def _refusal(
    node: onnx.NodeProto, weight: FileWeight, constants: Mapping[str, onnx.TensorProto], pattern: str
) -> str | None:
    """Why the operator cannot take a node's place, or None."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if weight.values.dtype != np.float32:
        return f"its weight is {weight.values.dtype}; the kernel computes in float32"
    if ":" not in pattern:
        return f"its mask is {pattern}; the kernel takes N:M"
    if node.op_type == "Conv":
        taps = weight.values.shape[2:]
        if taps != (1, 1):
            return f"it is a convolution of {'×'.join(map(str, taps))} taps; the kernel takes 1×1"
        if values.get("group", 1) != 1 or any(s != 1 for s in values.get("strides", ())) or any(values.get("pads", ())):
            return "it is a convolution with groups, strides or padding"
        if values.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return "it is a convolution with padding"
    elif node.op_type == "Gemm":
        if values.get("transA", 0) or values.get("alpha", 1.0) != 1.0 or values.get("beta", 1.0) != 1.0:
            return "it is a Gemm that scales or transposes its input"
    elif node.input[0] in constants:
        return "its weight stands on the left of the product"
    bias = node.input[2] if node.op_type != "MatMul" and len(node.input) > 2 else ""
    if bias and (bias not in constants or np.prod(constants[bias].dims) != weight.values.shape[0]):
        return "its bias is not one constant an output"
    return None


def _product(
    layers: tuple[str, ...],
    node: onnx.NodeProto,
    weight: FileWeight,
    pattern: NM,
    constants: Mapping[str, onnx.TensorProto],
    uses: Mapping[str, Sequence[onnx.NodeProto | None]],
) -> MaskedGemm:
    """The product that a node is, with the Add of its bias where that follows a MatMul."""
    matrix = weight.values.reshape(weight.values.shape[:2])
    nodes: tuple[str, ...] = (node.output[0],)
    bias = None
    if node.op_type == "MatMul":
        after = uses.get(node.output[0], ())
        if len(after) == 1 and after[0] is not None and after[0].op_type == "Add":
            other = next((name for name in after[0].input if name != node.output[0]), "")
            if other in constants and tuple(constants[other].dims) == (len(matrix),):
                nodes, bias = (node.output[0], after[0].output[0]), other
    elif len(node.input) > 2 and node.input[2]:
        bias = node.input[2]
    added = np.zeros(len(matrix), np.float32) if bias is None else numpy_helper.to_array(constants[bias]).reshape(-1)
    op = CONV if node.op_type == "Conv" else GEMM
    return MaskedGemm(
        layers, node.name, op, node.input[0], nodes[-1], nodes, weight.initializer, pattern,
        np.ascontiguousarray(matrix), added,
    )  # fmt: skip


def _uses(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto | None]]:
    """Who reads each tensor; None stands for the graph's outputs and for graphs within nodes."""
    uses: dict[str, list[onnx.NodeProto | None]] = {output.name: [None] for output in graph.output}
    for node in graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
        for inner in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
            for name in _uses(inner):
                uses.setdefault(name, []).append(None)
    return uses


def packed(products: Iterable[MaskedGemm]) -> dict[str, Packed]:
    """The streams of each weight, by prefix; read back and compared. Raises BuildError where they differ."""
    made: dict[str, Packed] = {}
    for product in products:
        if product.prefix not in made:
            streams = pack(product.weight, product.pattern.of)
            if not np.array_equal(unpack(streams), product.weight, equal_nan=True):
                raise BuildError(f"{product.name}: the packed weight is not the weight; please report this")
            made[product.prefix] = streams
    return made


def replace(
    file: onnx.ModelProto, products: Sequence[MaskedGemm], streams: Mapping[str, Packed] | None = None
) -> onnx.ModelProto:
    """The file with the native operator in the place of these products; the one given is not changed.

    Names of tensors, shapes, metadata and the order of nodes stay; weights that nobody else reads go. It runs in any
    ONNX Runtime: without the library as the dense product that it was.
    """
    streams = packed(products) if streams is None else streams
    result = onnx.ModelProto()
    result.CopyFrom(file)
    ends = {product.y: product for product in products}
    gone = {name for product in products for name in product.nodes}
    named = {node.name: node for node in file.graph.node}
    nodes = []
    for node in result.graph.node:
        product = ends.get(node.output[0])
        if product is not None:
            native = make_node(
                product.op,
                product.name,
                product.x,
                product.y,
                product.prefix,
                f"{product.y}.bias",
                streams[product.prefix],
            )
            native.metadata_props.extend(named[product.name].metadata_props)
            nodes.append(native)
        elif node.output[0] not in gone:
            nodes.append(node)
    _set_nodes(result.graph, nodes)
    _drop_unread(result.graph, {name for node in file.graph.node if node.output[0] in gone for name in node.input})
    for prefix in dict.fromkeys(product.prefix for product in products):
        result.graph.initializer.extend(initializers(prefix, streams[prefix]))
    result.graph.initializer.extend(bias_initializer(f"{p.y}.bias", p.bias) for p in products)
    inner = gone - set(ends)
    shapes = [value for value in result.graph.value_info if value.name not in inner]
    del result.graph.value_info[:]
    result.graph.value_info.extend(shapes)
    opset = next(o.version for o in file.opset_import if o.domain in ("", "ai.onnx"))
    if opset < OLDEST_OPSET:
        raise BuildError(f"the file has opset {opset}; the native operator needs {OLDEST_OPSET} or newer")
    present = {f.name for f in result.functions if f.domain == DOMAIN}
    result.functions.extend(function(op, opset) for op in sorted({p.op for p in products} - present))
    if products and not any(opset.domain == DOMAIN for opset in result.opset_import):
        result.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return result


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def _drop_unread(graph: onnx.GraphProto, suspects: set[str]) -> None:
    """Removes initializers, and nodes that turn or cast them, that only the replaced nodes have read."""
    while suspects:
        uses = _uses(graph)
        unread = {name for name in suspects if name not in uses}
        dead = [n for n in graph.node if n.output and all(o in unread for o in n.output)]
        suspects = {name for node in dead for name in node.input}
        _set_nodes(graph, [n for n in graph.node if n not in dead])
        for place in reversed(range(len(graph.initializer))):
            if graph.initializer[place].name in unread:
                del graph.initializer[place]
