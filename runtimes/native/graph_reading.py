"""Reads a graph of onnx_ir: constants, the nodes that compute values, and their only readers."""

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Returns the array of an initializer; None for a value that is computed, or that a caller may give."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value.numpy()


def number(value: ir.Value | None) -> float | None:
    """Returns the number of a floating point constant of one element, or None."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype.kind == "f" else None


def producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """Returns the node that computes a value, if it is one of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """Returns the node that alone reads a value, once.

    None if there are others, if the value is an output of the graph, or if the reader is in a branch or loop body.
    """
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    [(node, _)] = uses
    source = value.producer()
    return node if source is None or node.graph is source.graph else None
