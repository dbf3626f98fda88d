"""Replaces the 8-bit products of a file, and what stands between them, by the native int8 operators.

The native operator of a product (int8_products.py) takes over its neighbours:

- the QuantizeLinear after it, also behind a Relu or a Gelu: its result is stored in 8 bits;
- or the addition of another tensor of the same shape, the residual;
- the LayerNormalization before a QuantizeLinear becomes LayerNormQuantize;
- an attention (attention_match.py) becomes one operator, with an 8-bit result if a QuantizeLinear follows.

Convolutions are replaced by int8_conv_rewrite.py.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mpcompile.errors import BuildError
from mpcompile.runtimes.native import int8_conv_ops, int8_ops
from mpcompile.runtimes.native.attention_match import FileAttention
from mpcompile.runtimes.native.custom_op import DOMAIN, VERSION, initializer
from mpcompile.runtimes.native.graph_reading import constant, only_reader
from mpcompile.runtimes.native.int8_conv_rewrite import replace_convolutions
from mpcompile.runtimes.native.int8_convolutions import Int8Convolution
from mpcompile.runtimes.native.int8_ops import U8Quantization
from mpcompile.runtimes.native.int8_products import Int8Product, scalar_quantization


def _quantise_after(value: ir.Value) -> tuple[ir.Value, U8Quantization] | None:
    """Returns the u8 tensor that a value is quantised to, if a QuantizeLinear is its only reader."""
    node = only_reader(value)
    if node is None or node.op_type != "QuantizeLinear":
        return None
    quantization = scalar_quantization(node)
    return None if quantization is None else (node.outputs[0], quantization)


def replace(
    file: onnx.ModelProto,
    products: Sequence[Int8Product],
    shapes: Mapping[str, tuple[int, ...]],
    attentions: Sequence[FileAttention] = (),
    norms: bool = True,
    convolutions: Sequence[Int8Convolution] = (),
) -> onnx.ModelProto:
    """Returns a new file with the native operators for these products, attentions and convolutions.

    The weight of a Gemm that transposes it is stored once more, turned; all others are read as they are. Biases
    become float32.

    Args:
        file: the file.
        products: those to replace; without products, attentions and convolutions the file itself is returned.
        shapes: of all float32 tensors, for a batch above 1; a residual is only added by a product if the shapes agree.
        attentions: those to replace.
        norms: whether LayerNormalizations before a QuantizeLinear are replaced.
        convolutions: those to replace.

    Raises BuildError if the opset is older than int8_ops.OLDEST_OPSET.
    """
    opset = next(entry.version for entry in file.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < int8_ops.OLDEST_OPSET:
        raise BuildError(f"the file has opset {opset}; the int8 operators need {int8_ops.OLDEST_OPSET} or newer")
    if not products and not attentions and not convolutions:
        return file
    model = ir.from_proto(file)
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    used: set[str] = set()
    read = {product.x: len(product.weight) for product in products}
    for attention in attentions:
        used.add(_replace_attention(graph, values, attention))
    for product in products:
        used.add(_replace_product(graph, values, product, shapes))
    if norms:
        used |= set(_replace_norms(graph, values, read))
    used |= replace_convolutions(graph, values, convolutions)
    RemoveUnusedNodesPass()(model)
    for op in sorted(used):
        function = int8_conv_ops.function if op in int8_conv_ops.OPERATORS else int8_ops.function
        fallback = ir.serde.deserialize_function(function(op, opset))
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
    after = only_reader(output)
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
        quantise = output.producer()
        assert quantise is not None
        old.append(quantise)
    stored = [
        initializer(f"{product.name}.native.scale", product.scale),
        initializer(f"{product.name}.native.bias", product.bias),
    ]
    weight = values[product.initializer]
    held = constant(weight)
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


def _replace_norms(graph: ir.Graph, values: dict[str, ir.Value], read: Mapping[str, int]) -> Iterator[str]:
    """Replaces each LayerNormalization whose only reader is a QuantizeLinear of a u8 tensor that a product reads.

    `read` has the number of channels of these u8 tensors. The native operator needs a gamma and a beta for each.
    """
    for node in list(graph):
        if node.op_type != "LayerNormalization" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        if node.attributes.get_int("axis", -1) != -1 or any(value.uses() for value in node.outputs[1:]):
            continue
        quantised = _quantise_after(node.outputs[0])
        if quantised is None or quantised[0].name not in read:
            continue
        output, y = quantised
        stored = [constant(value) for value in node.inputs[1:3]]
        if any(array is None or array.shape != (read[str(output.name)],) for array in stored):
            continue
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


def _replace_attention(graph: ir.Graph, values: dict[str, ir.Value], attention: FileAttention) -> str:
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
        "first_query": attention.first_query,
        "queries": attention.queries,
    }
    old = [last]
    if quantised is not None:
        output, y = quantised
        attributes |= {"y_scale": y.scale, "y_zero": y.zero}
        quantise = output.producer()
        assert quantise is not None
        old.append(quantise)
    biased = attention.bias is not None
    op = int8_ops.attention_name(biased, quantised is not None)
    names = [*attention.sources, *([attention.bias] if attention.bias is not None else [])]
    node = ir.node(op, [values[name] for name in names], attributes, domain=DOMAIN, name=f"{last.name}.native")
    _swap(graph, values, old, node, output)
    return op
