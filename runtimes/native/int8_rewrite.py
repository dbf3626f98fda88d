"""Replaces the 8-bit products of a file, and what stands between them, by the native int8 operators.

A product is a MatMul or Gemm between two DequantizeLinear nodes, with the bias added after it. The native operator
takes over its neighbours:

- the QuantizeLinear after it, also behind a Relu or a Gelu: its result is stored in 8 bits;
- or the addition of another tensor of the same shape, the residual;
- the LayerNormalization before a QuantizeLinear becomes LayerNormQuantize;
- an attention (attention_match.py) becomes one operator, with an 8-bit result if a QuantizeLinear follows.

`find` returns the products, `replace` a new file with the native operators for some of them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from jaxtyping import Float32, Int8
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mpcompile.errors import BuildError
from mpcompile.runtimes.native import int8_ops
from mpcompile.runtimes.native.attention_match import Attention
from mpcompile.runtimes.native.custom_op import DOMAIN, VERSION, initializer
from mpcompile.runtimes.native.int8_ops import Quantization


@dataclass(frozen=True, slots=True)
class Int8Product:
    """A product of a u8 tensor and an s8 weight, with its bias.

    Attributes:
        name: of the node that multiplies.
        x: the u8 tensor, the result of a QuantizeLinear.
        x_quantization: its scale and zero point.
        y: the float32 result, with the bias.
        nodes: names of the tensors that the replaced nodes compute; the last is y.
        initializer: name of the stored weight.
        weight: the integers.
        scale: of each output channel.
        bias: of each output channel.
    """

    name: str
    x: str
    x_quantization: Quantization
    y: str
    nodes: tuple[str, ...]
    initializer: str
    weight: Int8[np.ndarray, "columns rows"]
    scale: Float32[np.ndarray, " rows"]
    bias: Float32[np.ndarray, " rows"]


def find(file: onnx.ModelProto) -> list[Int8Product]:
    """Returns the products of u8 activations by s8 weights, in file order."""
    return [product for node in ir.from_proto(file).graph if (product := _product(node)) is not None]


def _product(node: ir.Node) -> Int8Product | None:
    """Returns the product that a node computes, if the native operator can."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx") or not node.name:
        return None
    left, right = (_producer(value, "DequantizeLinear") for value in node.inputs[:2])
    if left is None or right is None:
        return None
    x_quantization, weight = _scalar_quantization(left), _constant(right.inputs[0])
    scale = _constant(right.inputs[1])
    u8 = left.inputs[0]
    if x_quantization is None or weight is None or scale is None or u8 is None or u8.is_initializer():
        return None
    if weight.dtype != np.int8 or weight.ndim != 2 or not _zero(right):
        return None
    axis = right.attributes.get_int("axis", 1) % 2
    if node.op_type == "Gemm":
        given = node.attributes
        if given.get_int("transA", 0) or given.get_float("alpha", 1.0) != 1 or given.get_float("beta", 1.0) != 1:
            return None
        if given.get_int("transB", 0):
            weight, axis = weight.T, 1 - axis
    rows = weight.shape[1]
    if scale.size not in (1, rows) or (scale.size > 1 and axis != 1):
        return None
    output = node.outputs[0]
    nodes: tuple[str, ...] = (str(output.name),)
    bias = np.zeros(rows, np.float32)
    if node.op_type == "Gemm":
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            stored = _dequantised(node.inputs[2])
            if stored is None or stored.size != rows:
                return None
            bias = stored.reshape(-1)
    elif (added := _bias_after(output, rows)) is not None:
        add, bias = added
        nodes = (*nodes, str(add.outputs[0].name))
    return Int8Product(
        name=node.name,
        x=str(u8.name),
        x_quantization=x_quantization,
        y=nodes[-1],
        nodes=nodes,
        initializer=str(_initializer(right.inputs[0])),
        weight=np.ascontiguousarray(weight),
        scale=np.broadcast_to(scale.astype(np.float32).reshape(-1), rows).copy(),
        bias=bias.astype(np.float32),
    )


def _bias_after(output: ir.Value, rows: int) -> tuple[ir.Node, Float32[np.ndarray, " rows"]] | None:
    """Returns the Add that is the only reader of a product and adds a constant of one value per output channel."""
    add = _only_reader(output)
    if add is None or add.op_type != "Add":
        return None
    stored = _dequantised(next(value for value in add.inputs if value is not output))
    return (add, stored) if stored is not None and stored.shape == (rows,) else None


def _dequantised(value: ir.Value | None) -> np.ndarray | None:
    """Returns a constant in float32, also if it is stored as integers behind a DequantizeLinear."""
    stored = _constant(value)
    if stored is not None:
        return stored.astype(np.float32) if stored.dtype == np.float32 else None
    node = _producer(value, "DequantizeLinear")
    integers, scale = (None, None) if node is None else (_constant(node.inputs[0]), _constant(node.inputs[1]))
    if node is None or integers is None or scale is None or not _zero(node):
        return None
    return (integers.astype(np.float64) * scale.astype(np.float64)).astype(np.float32)


def _zero(dequantise: ir.Node) -> bool:
    """Whether the zero points of a DequantizeLinear are 0 or absent."""
    if len(dequantise.inputs) < 3 or dequantise.inputs[2] is None:
        return True
    stored = _constant(dequantise.inputs[2])
    return stored is not None and not stored.any()


def _scalar_quantization(node: ir.Node) -> Quantization | None:
    """Returns scale and zero point of a QuantizeLinear or DequantizeLinear of a u8 tensor with one scale, or None."""
    scale = _constant(node.inputs[1])
    zero = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or zero is None or zero.dtype != np.uint8 or scale.size != 1 or zero.size != 1:
        return None
    return Quantization(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]))


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """Returns the array of an initializer; None for a value that is computed or given."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def _initializer(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _only_reader(value: ir.Value) -> ir.Node | None:
    """Returns the node that alone reads a value, once; None if there are others or it is an output of the graph."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    [(node, _)] = uses
    return node


def _quantise_after(value: ir.Value) -> tuple[ir.Value, Quantization] | None:
    """Returns the u8 tensor that a value is quantised to, if a QuantizeLinear is its only reader."""
    node = _only_reader(value)
    if node is None or node.op_type != "QuantizeLinear":
        return None
    quantization = _scalar_quantization(node)
    return None if quantization is None else (node.outputs[0], quantization)


def replace(
    file: onnx.ModelProto,
    products: Sequence[Int8Product],
    shapes: Mapping[str, tuple[int, ...]],
    attentions: Sequence[Attention] = (),
    norms: bool = True,
) -> onnx.ModelProto:
    """Returns a new file with the native operators for these products and attentions.

    The weight of a Gemm that transposes it is stored once more, turned; all others are read as they are. Biases
    become float32.

    Args:
        file: the file.
        products: those to replace; without products and attentions the file itself is returned.
        shapes: of all float32 tensors, for a batch above 1; a residual is only added by a product if the shapes agree.
        attentions: those to replace.
        norms: whether LayerNormalizations before a QuantizeLinear are replaced.

    Raises BuildError if the opset is older than int8_ops.OLDEST_OPSET.
    """
    opset = next(entry.version for entry in file.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < int8_ops.OLDEST_OPSET:
        raise BuildError(f"the file has opset {opset}; the int8 operators need {int8_ops.OLDEST_OPSET} or newer")
    if not products and not attentions:
        return file
    model = ir.from_proto(file)
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    used: set[str] = set()
    read = {product.x for product in products}
    for attention in attentions:
        used.add(_replace_attention(graph, values, attention))
    for product in products:
        used.add(_replace_product(graph, values, product, shapes))
    if norms:
        used |= set(_replace_norms(graph, values, read))
    RemoveUnusedNodesPass()(model)
    for op in sorted(used):
        fallback = ir.serde.deserialize_function(int8_ops.function(op, opset))
        model.functions.setdefault(fallback.identifier(), fallback)
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    return ir.to_proto(model)


def _swap(graph: ir.Graph, values: dict[str, ir.Value], old: Sequence[ir.Node], new: ir.Node, output: ir.Value) -> None:
    """Puts a node in place of others, the last of which computes `output`."""
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, [new], [output], new.outputs)
    values[str(output.name)] = new.outputs[0]


def _replace_product(
    graph: ir.Graph, values: dict[str, ir.Value], product: Int8Product, shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """Replaces a product and the nodes after it that its operator can take over; returns the operator."""
    old = [node for name in product.nodes if (node := values[name].producer()) is not None]
    output = values[product.y]
    attributes: dict[str, float | int] = {
        "x_scale": product.x_quantization.scale,
        "x_zero": product.x_quantization.zero,
    }
    activation, residual, quantised = None, None, _quantise_after(output)
    after = _only_reader(output)
    if quantised is None and after is not None:
        if (activation := _activation(after)) is not None:
            quantised = _quantise_after(after.outputs[0])
            if quantised is None:
                activation = None
            else:
                old.append(after)
        elif (residual := _residual(after, output, shapes)) is not None:
            old.append(after)
            output = after.outputs[0]
    if quantised is not None:
        output, y = quantised
        attributes |= {"y_scale": y.scale, "y_zero": y.zero}
        producer = output.producer()
        assert producer is not None
        old.append(producer)
    stored = [
        initializer(f"{product.name}.native.scale", product.scale),
        initializer(f"{product.name}.native.bias", product.bias),
    ]
    weight = values[product.initializer]
    held = _constant(weight)
    if held is None or held.shape != product.weight.shape or not np.array_equal(held, product.weight):
        weight = initializer(f"{product.name}.native.weight", product.weight)
        stored.append(weight)
    for value in stored:
        graph.register_initializer(value)
    op = int8_ops.gemm_name(activation, residual is not None, quantised is not None)
    inputs = [values[product.x], weight, stored[0], stored[1], *([residual] if residual is not None else [])]
    node = ir.node(op, inputs, attributes, domain=DOMAIN, name=product.name)
    node.metadata_props.update(old[0].metadata_props)
    _swap(graph, values, old, node, output)
    return op


def _activation(node: ir.Node) -> str | None:
    """Returns the key of int8_ops.ACTIVATIONS of a node, or None."""
    if node.op_type == "Relu":
        return "Relu"
    if node.op_type == "Gelu":
        return "GeluTanh" if node.attributes.get_string("approximate", "none") == "tanh" else "Gelu"
    return None


def _residual(add: ir.Node, product: ir.Value, shapes: Mapping[str, tuple[int, ...]]) -> ir.Value | None:
    """Returns the tensor that an Add adds to a product, if it is computed and has the same shape."""
    if add.op_type != "Add" or add.inputs[0] is add.inputs[1]:
        return None
    other = next(value for value in add.inputs if value is not product)
    if other is None or other.is_initializer():
        return None
    shape = shapes.get(str(other.name))
    return other if shape is not None and shape == shapes.get(str(product.name)) else None


def _replace_norms(graph: ir.Graph, values: dict[str, ir.Value], read: Collection[str]) -> Iterator[str]:
    """Replaces each LayerNormalization whose only reader is a QuantizeLinear of a u8 tensor that a product reads."""
    for node in list(graph):
        if node.op_type != "LayerNormalization" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        if node.attributes.get_int("axis", -1) != -1 or any(value.uses() for value in node.outputs[1:]):
            continue
        quantised = _quantise_after(node.outputs[0])
        if quantised is None or quantised[0].name not in read:
            continue
        output, y = quantised
        attributes = {
            "epsilon": node.attributes.get_float("epsilon", 1e-5),
            "y_scale": y.scale,
            "y_zero": y.zero,
        }
        new = ir.node(int8_ops.NORM, node.inputs[:3], attributes, domain=DOMAIN, name=f"{node.name}.native")
        quantise = output.producer()
        assert quantise is not None
        _swap(graph, values, [node, quantise], new, output)
        yield int8_ops.NORM


def _replace_attention(graph: ir.Graph, values: dict[str, ir.Value], attention: Attention) -> str:
    """Replaces an attention, with the QuantizeLinear after it; returns the operator."""
    output = values[attention.y]
    last = output.producer()
    assert last is not None
    quantised = _quantise_after(output)
    attributes: dict[str, float | int] = {
        "heads": attention.heads,
        "dim": attention.dim,
        "scale": attention.scale,
        "q_offset": attention.offsets[0],
        "k_offset": attention.offsets[1],
        "v_offset": attention.offsets[2],
    }
    old = [last]
    if quantised is not None:
        output, y = quantised
        attributes |= {"y_scale": y.scale, "y_zero": y.zero}
        producer = output.producer()
        assert producer is not None
        old.append(producer)
    biased = attention.bias is not None
    op = int8_ops.attention_name(biased, quantised is not None)
    names = [*attention.sources, *([attention.bias] if attention.bias is not None else [])]
    node = ir.node(op, [values[name] for name in names], attributes, domain=DOMAIN, name=f"{last.name}.native")
    _swap(graph, values, old, node, output)
    return op
