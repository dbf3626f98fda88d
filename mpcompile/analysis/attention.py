"""The attentions of a captured graph, and the residual stream that each is added to.

An attention is found by its operators, never by a class name. It is one of

1. `scaled_dot_product_attention(q, k, v)`;
2. `softmax(q · kᵀ)`, with or without scaling, if fused attention is switched off;
3. an `nn.MultiheadAttention` that capture could not rewrite as the first; its keys are unknown.

Its stream is the tensor of tokens (b, n, c) that it reads and that its result is added to. Shapes are those that
ShapeProp stored in `tensor_meta`.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx, nn

from mpcompile.analysis.operator_sets import ADDITIONS, MATRIX_PRODUCTS, SOFTMAXES, TRANSPOSES
from mpcompile.ir.token_merging import log_size


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention of a graph.

    Attributes:
        node: the node of the attention product: one of the three cases above.
        name: the qualified name of the module that it was traced in, or the node's name.
        tokens: the number of keys; 0 if unknown.
        keys: the node of the keys, of shape (b, h, n, d).
        stream: the residual stream (b, n, c) before the attention, None if the result is not added to the tokens (as
            in attention pooling).
        total: the residual add: the node of the sum (b, n, c) of stream and attention. None if `stream` is.
        selects: whether the sum has only some tokens of the stream, a slice, because the others are not read after it.
        unfit: why its tokens cannot be merged, as a sentence; None if they can.
    """

    node: fx.Node
    name: str
    tokens: int
    keys: fx.Node
    stream: fx.Node | None = None
    total: fx.Node | None = None
    unfit: str | None = None
    selects: bool = False


def shape_of(node: object) -> tuple[int, ...]:
    """The shape that ShapeProp recorded; () if the node's value is not a tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", ()) if isinstance(node, fx.Node) else ()
    return tuple(shape)


def attentions(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Attention]:
    """Every attention, in order of execution. The graph must have been run under ShapeProp.

    `modules` maps qualified names to modules, as `dict(graph_module.named_modules())` does.
    """
    found = []
    for node in graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            found.append(_fused_attention(node))
        elif node.op == "call_module" and isinstance(modules[str(node.target)], nn.MultiheadAttention):
            reason = "its nn.MultiheadAttention is kept whole, so its keys are unknown; the report gives the reason"
            found.append(Attention(node, _name(node), 0, node, unfit=reason))
        elif node.target in SOFTMAXES and (keys := _softmax_keys(node)) is not None:
            found.append(_with_stream(node, keys, shape_of(keys)[-2]))
    return found


def operand(node: fx.Node, position: int) -> object:
    """The first (0) or second (1) operand of a call node, passed by position or by torch's keyword; None if absent."""
    if position < len(node.args):
        return node.args[position]
    return next(
        (node.kwargs[name] for name in (("input", "self"), ("other", "mat2"))[position] if name in node.kwargs), None
    )


def _fused_attention(node: fx.Node) -> Attention:
    """The Attention of a scaled_dot_product_attention call."""
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments |= node.kwargs
    keys = arguments["key"]
    if not isinstance(keys, fx.Node) or len(shape_of(keys)) != 4:
        reason = f"its keys have the shape {shape_of(keys)}; (images, heads, tokens, width) is needed"
        return Attention(node, _name(node), 0, node, unfit=reason)
    bias = arguments.get("attn_mask")
    has_own_bias = bias is not None and getattr(bias, "target", None) is not log_size
    if has_own_bias or arguments.get("is_causal"):
        reason = "it adds a bias or mask of its own, which depends on the positions of its tokens"
        return Attention(node, _name(node), shape_of(keys)[-2], keys, unfit=reason)
    return _with_stream(node, keys, shape_of(keys)[-2])


def _softmax_keys(node: fx.Node) -> fx.Node | None:
    """The node of the keys k if this node is softmax(q · kᵀ), scaled or not; None for any other softmax."""
    product = _source_before_elementwise(operand(node, 0), MATRIX_PRODUCTS)
    if product is None or len(shape_of(product)) != 4:
        return None
    transposed = _source_before_elementwise(operand(product, 1), TRANSPOSES)
    keys = None if transposed is None else operand(transposed, 0)
    swapped = (*shape_of(keys)[:2], *reversed(shape_of(keys)[2:]))
    return keys if isinstance(keys, fx.Node) and shape_of(transposed) == swapped else None


def _source_before_elementwise(node: object, targets: Collection[object]) -> fx.Node | None:
    """The nearest node with one of these targets, going backwards through operations on one tensor that keep its shape.

    None if another operation comes first.
    """
    while isinstance(node, fx.Node) and node.target not in targets:
        # Inputs without a shape are masks that timm passes as None; log_size is the bias that token merging adds.
        inputs = [other for other in node.all_input_nodes if shape_of(other) and other.target is not log_size]
        node = inputs[0] if len(inputs) == 1 and shape_of(inputs[0]) == shape_of(node) else None
    return node if isinstance(node, fx.Node) else None


def _with_stream(node: fx.Node, keys: fx.Node, tokens: int) -> Attention:
    """The Attention with the residual stream that it is added to, or with the reason why its tokens cannot be merged.

    The residual add is the first later addition of a result of the attention to a tensor that the attention read.
    """
    batch = shape_of(next(n for n in node.graph.nodes if n.op == "placeholder"))[0]
    if shape_of(keys)[0] != batch:
        reason = f"it attends within windows of {tokens} tokens; a merged token would belong to no window"
        return Attention(node, _name(node), tokens, keys, unfit=reason)
    before = ancestors(node)
    after = {node}
    for user in _nodes_after(node):
        if not after & set(user.all_input_nodes):
            continue
        addends = [other for other in user.all_input_nodes if other not in after] if user.target in ADDITIONS else []
        after.add(user)
        for other in addends:
            whole = _sliced_tokens(other)
            if whole in before and shape_of(whole)[:2] == (batch, tokens) and len(shape_of(user)) == 3:
                return Attention(node, _name(node), tokens, keys, stream=whole, total=user, selects=True)
            if other not in before or shape_of(other) != shape_of(user):
                continue
            if len(shape_of(user)) == 3 and shape_of(user)[:2] == (batch, tokens):
                return Attention(node, _name(node), tokens, keys, stream=other, total=user)
            reason = f"it has {tokens} keys, and the stream that it is added to has the shape {shape_of(user)[1:]}"
            return Attention(node, _name(node), tokens, keys, unfit=reason)
    return Attention(node, _name(node), tokens, keys)


def _sliced_tokens(node: fx.Node) -> fx.Node | None:
    """The tokens (b, n, c) that a node takes a slice of along n, such as `x[:, :1]`; None for any other node."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    before, after = shape_of(node.args[0]), shape_of(node)
    return node.args[0] if len(before) == len(after) == 3 and before[::2] == after[::2] else None


def _nodes_after(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes after this one, in order of execution."""
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from, without the node itself."""
    visited: set[fx.Node] = set()
    stack = [node]
    while stack:
        for earlier in stack.pop().all_input_nodes:
            if earlier not in visited:
                visited.add(earlier)
                stack.append(earlier)
    return visited


def _name(node: fx.Node) -> str:
    """The qualified name of the module that a node was traced in, or the node's own name."""
    stack = list(node.meta.get("nn_module_stack", {}))
    return str(stack[-1]) if stack and stack[-1] else node.name
