"""Which layers belong to attention, read off the graph.

A layer does where an attention product (scaled_dot_product_attention, or a softmax) lies between it and the next layer
before or after it: the projections to query, key and value, and the projection of what attention returns.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import fx, nn

from mpcompile.analysis.eligibility import weight_sites
from mpcompile.ir.model import Model

FUNCTIONS = frozenset({F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.nn.functional.softmax})


def attention_layers(model: Model) -> frozenset[str]:
    """The qualified names of the Linear and Conv2d layers that feed attention or take its result.

    The graph must carry the shapes that capturing and the pass manager record.
    """
    modules = dict(model.graph.named_modules())
    sites, _ = weight_sites(model.graph)
    applied = {node for nodes in sites.values() for node in nodes}

    def attends(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(modules[str(node.target)], nn.Softmax | nn.MultiheadAttention)
        return node.target in FUNCTIONS or (node.op == "call_method" and node.target == "softmax")

    def meets_attention(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
        """Whether a walk that stops at layers comes to an attention product."""
        waiting, seen = [*step(start)], {start}
        while waiting:
            node = waiting.pop()
            if node in seen or "tensor_meta" not in node.meta:  # a shape also connects nodes, and carries no data
                continue
            seen.add(node)
            if attends(node):
                return True
            if node not in applied:
                waiting.extend(step(node))
        return False

    return frozenset(
        name
        for name, nodes in sites.items()
        if any(
            attends(node)
            or meets_attention(node, lambda n: n.users)
            or meets_attention(node, lambda n: n.all_input_nodes)
            for node in nodes
        )
    )
