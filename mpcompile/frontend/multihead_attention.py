"""Decomposes nn.MultiheadAttention in a graph into projections, attention and output layer.

Tracing keeps the module whole, and in evaluation mode it runs one fused kernel. That hides the keys, which token
merging needs, and the product of the output layer, which the refit and the MAC count need. Parameters keep their place
and name.
"""

import operator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn


def decompose_attention(graph: fx.GraphModule) -> None:
    """Decomposes each nn.MultiheadAttention that is unmasked self-attention; other calls stay whole."""
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.MultiheadAttention) and _is_plain(node, module):
            _decompose(node, module)
    graph.recompile()


def _is_plain(node: fx.Node, module: nn.MultiheadAttention) -> bool:
    """Whether a call is unmasked self-attention whose attention weights are not used."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    one_tensor = given["query"] is given.get("key") is given.get("value")
    masked = any(given.get(name) is not None for name in ("key_padding_mask", "attn_mask")) or given.get("is_causal")
    packed = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
    outputs_alone = all(
        user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users
    )
    return one_tensor and not masked and packed and module.batch_first and outputs_alone


def _decompose(node: fx.Node, module: nn.MultiheadAttention) -> None:
    """Replaces one call by projection, heads, attention and output layer."""
    name, graph = str(node.target), node.graph
    x = node.args[0] if node.args else node.kwargs["query"]
    with graph.inserting_before(node):
        weight = graph.get_attr(f"{name}.in_proj_weight")
        bias = None if module.in_proj_bias is None else graph.get_attr(f"{name}.in_proj_bias")
        heads = graph.call_function(split_packed_heads, (x, weight, bias, module.num_heads))
        query, key, value = (graph.call_function(operator.getitem, (heads, index)) for index in range(3))
        attended = graph.call_function(F.scaled_dot_product_attention, (query, key, value))
        joined = graph.call_function(join_heads, (attended,))
        result = graph.call_module(f"{name}.out_proj", (joined,))
    for new in (weight, heads, query, key, value, attended, joined, result):
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    for user in list(node.users):
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


def split_packed_heads(
    x: Float[Tensor, "b n c"], weight: Float[Tensor, "c3 c"], bias: Float[Tensor, " c3"] | None, heads: int
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
    """Queries, keys and values, each (b, h, n, d): tokens x times the packed weight (3c, c) plus bias (3c,).

    `heads` is the number of heads h; d = c / h.
    """
    batch, tokens, width = x.shape
    packed = F.linear(x, weight, bias).reshape(batch, tokens, 3, heads, width // heads)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def join_heads(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
    """Concatenates heads: (b, h, n, d) -> (b, n, h·d)."""
    return x.transpose(1, 2).flatten(2)
