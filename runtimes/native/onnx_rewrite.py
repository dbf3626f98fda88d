"""Finds the products with N:M masked weights in an ONNX file, and replaces them by the native operator.

Candidates: a Gemm, a MatMul with the Add after it, or a Conv with the Add and the activation after it, whose weight has
a proven mask. `find` returns a reason for each product that the native operator cannot compute. `replace` rewrites the
products that were measured to be faster.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from jaxtyping import Float32
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mpcompile.errors import BuildError
from mpcompile.export.mask_check import FileWeight, ProvenMask, file_weights
from mpcompile.ir.pattern import NM
from mpcompile.runtimes.native import conv_match, conv_op
from mpcompile.runtimes.native.conv_op import Convolution, columns_of
from mpcompile.runtimes.native.custom_op import (
    DOMAIN,
    GEMM,
    OLDEST_OPSET,
    VERSION,
    function,
    initializer,
    make_node,
    stream_initializers,
)
from mpcompile.runtimes.native.packing import Packed, pack, unpack


@dataclass(frozen=True, slots=True)
class MaskedGemm:
    """A product y = x · weightᵀ + bias of a file: one node, or several that one native operator replaces."""

    layers: tuple[str, ...]  # several if their weights are tied
    name: str  # of the node that multiplies
    op: str  # the native operator that can replace it
    x: str
    y: str
    nodes: tuple[str, ...]  # the outputs of its nodes; the last is y
    initializer: str
    pattern: NM
    weight: Float32[np.ndarray, "out columns"]  # columns by tap, then by input channel
    bias: Float32[np.ndarray, " out"]
    convolution: Convolution | None = None  # None for a GEMM

    @property
    def prefix(self) -> str:
        """The name of its packed streams. Products with the same weight share them, unless one transposes it."""
        return f"{self.initializer}.{self.weight.shape[0]}x{self.weight.shape[1]}.nm"


@dataclass(frozen=True, slots=True)
class Refused:
    """A product with a masked weight that the native operator cannot compute, and the reason as a sentence."""

    layers: tuple[str, ...]
    name: str
    reason: str


def find(file: onnx.ModelProto, masks: Iterable[ProvenMask]) -> tuple[list[MaskedGemm], list[Refused]]:
    """Returns the products whose weight has a proven mask, in file order, and those that the kernel cannot compute."""
    by_initializer: dict[str, list[ProvenMask]] = {}
    for mask in masks:
        by_initializer.setdefault(mask.initializer, []).append(mask)
    name_counts = Counter(node.name for node in file.graph.node)
    weights = {weight.node: weight for weight in file_weights(file)}
    claimed: set[ir.Node] = set()  # the Adds that an earlier convolution computes
    products: list[MaskedGemm] = []
    refused: list[Refused] = []
    for node in ir.from_proto(file).graph:
        name = node.name or ""
        weight = weights.get(name)
        if weight is None or weight.op != node.op_type or weight.initializer not in by_initializer:
            continue
        rows = by_initializer[weight.initializer]
        layers = tuple(dict.fromkeys(row.layer for row in rows))
        reason = "its node has no name of its own" if name_counts[name] > 1 or not name else None
        reason = reason or _refusal(node, weight, rows[0])
        if reason:
            refused.append(Refused(layers, name, reason))
        else:
            products.append(_product(layers, node, weight, rows[0], claimed))
    return products, refused


def _refusal(node: ir.Node, weight: FileWeight, mask: ProvenMask) -> str | None:
    """Returns why the native operator cannot replace a node, or None."""
    given = node.attributes
    if weight.values.dtype != np.float32:
        return f"its weight is {weight.values.dtype}; the kernel computes in float32"
    if mask.nm is None:
        return f"its mask is {mask.pattern}; the kernel takes N:M"
    if node.op_type == "Conv":
        if why := conv_match.refusal(node, weight.values.shape):
            return why
    elif node.op_type == "Gemm":
        if given.get_int("transA", 0) or given.get_float("alpha", 1.0) != 1 or given.get_float("beta", 1.0) != 1:
            return "it is a Gemm that scales or transposes its input"
    elif _constant(node.inputs[0]) is not None:
        return "its weight is the left operand of the product"
    bias = _bias_input(node)
    if bias is not None and ((stored := _constant(bias)) is None or stored.size != weight.values.shape[0]):
        return "its bias is not a constant with one value per output"
    return None


def _bias_input(node: ir.Node) -> ir.Value | None:
    """Returns the bias that a Gemm or a Conv reads, if it has one."""
    return node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Returns the tensor of an initializer; None for a value that is computed or given."""
    return value.const_value if value is not None and value.is_initializer() else None


def _product(
    layers: tuple[str, ...], node: ir.Node, weight: FileWeight, mask: ProvenMask, claimed: set[ir.Node]
) -> MaskedGemm:
    """Returns the product that a node computes, with the nodes after it that the native operator computes too.

    That of a MatMul includes the Add after it as its bias; that of a Conv its residual Add and its activation.
    """
    assert mask.nm is not None  # _refusal checks it
    x, output, bias = node.inputs[0], node.outputs[0], _bias_input(node)
    nodes: tuple[str, ...] = (str(output.name),)
    convolution = None
    if node.op_type == "Conv":
        convolution, more = conv_match.matched(node, weight.values.shape, claimed)
        nodes += more
    elif node.op_type == "MatMul" and len(output.uses()) == 1 and not output.is_graph_output():
        [add] = output.consumers()
        if add.op_type == "Add" and add.graph is node.graph:
            added = next(value for value in add.inputs if value is not output)
            stored = _constant(added)
            if stored is not None and tuple(stored.shape) == (len(weight.values),):
                nodes, bias = (*nodes, str(add.outputs[0].name)), added
    stored = _constant(bias)
    return MaskedGemm(
        layers=layers,
        name=str(node.name),
        op=GEMM if convolution is None else convolution.op,
        x=str(x.name if x is not None else ""),
        y=nodes[-1],
        nodes=nodes,
        initializer=weight.initializer,
        pattern=mask.nm,
        weight=columns_of(weight.values),
        bias=np.zeros(len(weight.values), np.float32) if stored is None else stored.numpy().reshape(-1),
        convolution=convolution,
    )


def packed(products: Iterable[MaskedGemm]) -> dict[str, Packed]:
    """Returns the packed weights by prefix. Raises BuildError if unpacking one does not give the weight again."""
    by_prefix: dict[str, Packed] = {}
    for product in products:
        if product.prefix not in by_prefix:
            streams = pack(product.weight, product.pattern.of)
            if not np.array_equal(unpack(streams), product.weight, equal_nan=True):
                raise BuildError(f"{product.name}: the packed weight differs from the weight; please report this")
            by_prefix[product.prefix] = streams
    return by_prefix


def replace(
    file: onnx.ModelProto, products: Sequence[MaskedGemm], streams: Mapping[str, Packed] | None = None
) -> onnx.ModelProto:
    """Returns a new file with the native operator in place of these products; without products, the file itself.

    Tensor names, shapes, metadata and the order of nodes stay. Weights that only the replaced products read are
    removed. The file runs in any ONNX Runtime: without the kernel's library, the operator's fallback runs dense.
    `streams` are the packed weights by prefix; by default they are packed here. Raises BuildError if the file's opset
    is older than OLDEST_OPSET.
    """
    opset = next(entry.version for entry in file.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OLDEST_OPSET:
        raise BuildError(f"the file has opset {opset}; the native operator needs {OLDEST_OPSET} or newer")
    if not products:
        return file
    model = ir.from_proto(file)
    graph = model.graph
    streams = packed(products) if streams is None else streams
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    stored = {p: stream_initializers(p, streams[p]) for p in dict.fromkeys(product.prefix for product in products)}
    biases = [initializer(f"{product.y}.bias", product.bias.astype(np.float32)) for product in products]
    for value in (*(stream for group in stored.values() for stream in group), *biases):
        graph.register_initializer(value)
    for product, bias in zip(products, biases, strict=True):
        old = [node for output in product.nodes if (node := values[output].producer()) is not None]
        packed_weight = streams[product.prefix]
        done = product.convolution
        native = make_node(
            product.op,
            product.name,
            values[product.x],
            stored[product.prefix],
            bias,
            packed_weight,
            {} if done is None else done.attributes(),
            None if done is None or done.residual is None else values[done.residual],
        )
        native.metadata_props.update(old[0].metadata_props)
        outputs = [values[product.y]]
        ir.convenience.replace_nodes_and_values(graph, old[-1], old, [native], outputs, native.outputs)
        values[product.y] = native.outputs[0]
    RemoveUnusedNodesPass()(model)
    for op in sorted({product.op for product in products}):
        made = conv_op.function(op, opset) if op in conv_op.OPERATORS else function(op, opset)
        fallback = ir.serde.deserialize_function(made)
        model.functions.setdefault(fallback.identifier(), fallback)
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    return ir.to_proto(model)
