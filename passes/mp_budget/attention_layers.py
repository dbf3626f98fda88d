"""Finds the layers of attention in the graph: the projections to query, key and value, and the output projection.

A layer belongs to attention if an attention product (scaled_dot_product_attention or a softmax) lies between it and the
next layer, before or after it.
"""

from collections.abc import Callable, Iterable

from torch import fx, nn

from mpcompile.analysis.eligibility import weight_nodes
from mpcompile.analysis.operator_sets import ATTENTION_FUNCTIONS
from mpcompile.ir.model import Model


def attention_layers(model: Model) -> frozenset[str]:
    """The qualified names of the Linear and Conv2d layers directly before or after an attention product.

    The graph must have the shapes that capture and the pass manager record (`tensor_meta`).
    """
    modules = dict(model.graph.named_modules())
    nodes_of, _ = weight_nodes(model.graph)
    applied = {node for nodes in nodes_of.values() for node in nodes}

    def attends(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(modules[str(node.target)], nn.Softmax | nn.MultiheadAttention)
        return node.target in ATTENTION_FUNCTIONS or (node.op == "call_method" and node.target == "softmax")

    def meets_attention(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
        """Whether a walk along the graph reaches an attention product before the next layer."""
        waiting, seen = [*step(start)], {start}
        while waiting:
            node = waiting.pop()
            if node in seen or "tensor_meta" not in node.meta:  # a shape connects nodes, too, but is not data
                continue
            seen.add(node)
            if attends(node):
                return True
            if node not in applied:
                waiting.extend(step(node))
        return False

    return frozenset(
        name
        for name, nodes in nodes_of.items()
        if any(
            attends(node)
            or meets_attention(node, lambda n: n.users)
            or meets_attention(node, lambda n: n.all_input_nodes)
            for node in nodes
        )
    )
