"""Replaces the 8-bit convolutions of a file, and what follows them, by the native operators with the channels last.

Each operator gets a Transpose before and after it. Two Transposes that meet cancel out, so tensors between native
convolutions stay with the channels last.

A MaxPool before a QuantizeLinear is computed after it, on bytes: quantisation is monotone, so the result is the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mpcompile.runtimes.native.custom_op import DOMAIN, initializer
from mpcompile.runtimes.native.graph_reading import constant, only_reader, producer
from mpcompile.runtimes.native.int8_conv_ops import CONV, CONV_ADD, POOL, TO_FIRST, TO_LAST
from mpcompile.runtimes.native.int8_convolutions import Int8Convolution


def replace_convolutions(
    graph: ir.Graph, values: dict[str, ir.Value], convolutions: Sequence[Int8Convolution]
) -> set[str]:
    """Replaces the convolutions in place, `values` being those of the graph by name; returns the operators used."""
    pooled = [_quantise_before_pooling(graph, values, name) for name in {c.x: None for c in convolutions}]
    used = {POOL} if any(pooled) else set()
    used |= {_replace(graph, values, convolution) for convolution in convolutions}
    _cancel(graph)
    return used


def attributes(convolution: Int8Convolution) -> dict[str, Any]:
    """Returns the attributes of the native operator."""
    tensors = {"x": convolution.x_quantization, "y": convolution.y_quantization}
    if convolution.residual is not None:
        tensors |= {"branch": convolution.residual.branch, "residual": convolution.residual.quantization}
    low, high = convolution.limits
    return {
        "strides": convolution.strides,
        "pads": convolution.pads,
        "dilations": convolution.dilations,
        "low": low,
        "high": high,
        **{f"{name}_scale": of.scale for name, of in tensors.items()},
        **{f"{name}_zero": of.zero for name, of in tensors.items()},
    }


def _replace(graph: ir.Graph, values: dict[str, ir.Value], convolution: Int8Convolution) -> str:
    """Replaces one convolution, and returns the operator."""
    prefix, output = f"{convolution.name}.native", values[convolution.y]
    old = [node for name in convolution.nodes if (node := values[name].producer()) is not None]
    stored = [
        initializer(f"{prefix}.scale", convolution.scale),
        initializer(f"{prefix}.bias", convolution.bias),
    ]
    weight = values[convolution.initializer]
    held = constant(weight)
    assert held is not None
    assert np.array_equal(held, convolution.weight)
    for value in stored:
        graph.register_initializer(value)
    read = [convolution.x] if convolution.residual is None else [convolution.x, convolution.residual.x]
    before = [
        ir.node("Transpose", [values[name]], {"perm": TO_LAST}, name=f"{prefix}.{i}.last")
        for i, name in enumerate(read)
    ]
    x, *residual = (node.outputs[0] for node in before)
    op = CONV_ADD if residual else CONV
    native = ir.node(op, [x, weight, *stored, *residual], attributes(convolution), domain=DOMAIN, name=convolution.name)
    native.metadata_props.update(old[0].metadata_props)
    after = ir.node("Transpose", native.outputs, {"perm": TO_FIRST}, name=f"{prefix}.first")
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, [*before, native, after], [output], after.outputs)
    values[convolution.y] = after.outputs[0]
    return op


def _quantise_before_pooling(graph: ir.Graph, values: dict[str, ir.Value], u8: str) -> bool:
    """Swaps the QuantizeLinear that computes a tensor with the MaxPool before it; returns whether it did."""
    quantise = producer(values[u8], "QuantizeLinear")
    pool = None if quantise is None else producer(quantise.inputs[0], "MaxPool")
    if quantise is None or pool is None or len(pool.outputs) > 1 or only_reader(pool.outputs[0]) is None:
        return False
    given = pool.attributes
    window = given.get_ints("kernel_shape", ())
    if len(window) != 2 or given.get_int("ceil_mode", 0) != 0 or given.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    attributes = {
        "kernel_shape": window,
        "strides": given.get_ints("strides", (1, 1)),
        "pads": given.get_ints("pads", (0, 0, 0, 0)),
        "dilations": given.get_ints("dilations", (1, 1)),
    }
    quantised = ir.node(
        "QuantizeLinear", [pool.inputs[0], *quantise.inputs[1:]], quantise.attributes, name=f"{quantise.name}.native"
    )
    before = ir.node("Transpose", quantised.outputs, {"perm": TO_LAST}, name=f"{pool.name}.native.last")
    native = ir.node(POOL, before.outputs, attributes, domain=DOMAIN, name=f"{pool.name}.native")
    after = ir.node("Transpose", native.outputs, {"perm": TO_FIRST}, name=f"{pool.name}.native.first")
    ir.convenience.replace_nodes_and_values(
        graph, quantise, [pool, quantise], [quantised, before, native, after], [quantise.outputs[0]], after.outputs
    )
    values[u8] = after.outputs[0]
    return True


def _cancel(graph: ir.Graph) -> None:
    """Joins Transposes to channels last that read the same tensor, and removes those that undo the one before."""
    last: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != TO_LAST:
            continue
        [x], [y] = node.inputs, node.outputs
        if x is None or y.is_graph_output():
            continue
        first = x.producer()
        if first is not None and first.op_type == "Transpose" and first.attributes["perm"].as_ints() == TO_FIRST:
            source = first.inputs[0]
            assert source is not None
        else:
            source = last.setdefault(x, y)
        if source is not y:
            ir.convenience.replace_all_uses_with(y, source)
            graph.remove(node, safe=True)
