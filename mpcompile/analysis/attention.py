"""Where a captured graph attends, and the stream of tokens that attention is added to.

Found by what the graph does, never by the name of a class. An attention is one of

1. `scaled_dot_product_attention(q, k, v)`;
2. `softmax(q · kᵀ)`, perhaps scaled, where fused attention is switched off;
3. an `nn.MultiheadAttention` that capture could not write out as the first, of which nothing more is known.

Its stream is the tensor of tokens (b, n, c) that it reads and that its result is added to. Shapes are those that
ShapeProp left in `tensor_meta`.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from mpcompile.ir.token_merging import log_size

ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"})
SOFTMAXES = frozenset({F.softmax, torch.softmax, "softmax"})
TRANSPOSES = frozenset({torch.transpose, "transpose", "mT", "swapaxes"})


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention of a graph.

    `keys` is the node of shape (b, h, n, d). `total` is the sum (b, n, c) of the stream and what attention adds to it,
    and `stream` that stream before; both None where the result is not added to the tokens, as in a pooling. `unfit`
    says why other tokens in their place are none of its.
    """

    node: fx.Node
    name: str
    tokens: int
    keys: fx.Node
    stream: fx.Node | None = None
    total: fx.Node | None = None
    unfit: str | None = None


def shape_of(node: object) -> tuple[int, ...]:
    """The shape that ShapeProp saw, () where the node is no tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", ()) if isinstance(node, fx.Node) else ()
    return tuple(shape)


def attentions(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Attention]:
    """Every attention, in order of execution. The graph must have been run under ShapeProp."""
    found = []
    for node in graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            found.append(_fused(node))
        elif node.op == "call_module" and isinstance(modules[str(node.target)], nn.MultiheadAttention):
            why = "its nn.MultiheadAttention has masks, other keys than queries, or tokens before images"
            found.append(Attention(node, _name(node), 0, node, unfit=why))
        elif node.target in SOFTMAXES and (keys := _softmax_keys(node)) is not None:
            found.append(_placed(node, keys, shape_of(keys)[-2]))
    return found


def operand(node: fx.Node, place: int) -> object:
    """A tensor that a call is given, by place or, of torch's functions, by name; None where it has none there."""
    if place < len(node.args):
        return node.args[place]
    return next(
        (node.kwargs[name] for name in (("input", "self"), ("other", "mat2"))[place] if name in node.kwargs), None
    )


def _fused(node: fx.Node) -> Attention:
    """A call of scaled_dot_product_attention."""
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments |= node.kwargs
    keys = arguments["key"]
    if not isinstance(keys, fx.Node) or len(shape_of(keys)) != 4:
        why = f"its keys have the shape {shape_of(keys)}, and (images, heads, tokens, width) is needed"
        return Attention(node, _name(node), 0, node, unfit=why)
    bias = arguments.get("attn_mask")
    own = bias is not None and getattr(bias, "target", None) is not log_size
    if own or arguments.get("is_causal"):
        why = "it adds a bias or mask of its own, which holds for its tokens in their places"
        return Attention(node, _name(node), shape_of(keys)[-2], keys, unfit=why)
    return _placed(node, keys, shape_of(keys)[-2])


def _softmax_keys(node: fx.Node) -> fx.Node | None:
    """The keys where the node is softmax(q · kᵀ), perhaps scaled; None where it is another softmax."""
    product = _behind_scaling(operand(node, 0), PRODUCTS)
    if product is None or len(shape_of(product)) != 4:
        return None
    transposed = _behind_scaling(operand(product, 1), TRANSPOSES)
    keys = None if transposed is None else operand(transposed, 0)
    swapped = (*shape_of(keys)[:2], *reversed(shape_of(keys)[2:]))
    return keys if isinstance(keys, fx.Node) and shape_of(transposed) == swapped else None


def _behind_scaling(node: object, targets: Collection[object]) -> fx.Node | None:
    """The first of these targets on the way back through what changes one tensor number by number."""
    while isinstance(node, fx.Node) and node.target not in targets:
        # timm passes None where it has no mask; sizes are what token merging adds.
        inputs = [other for other in node.all_input_nodes if shape_of(other) and other.target is not log_size]
        node = inputs[0] if len(inputs) == 1 and shape_of(inputs[0]) == shape_of(node) else None
    return node if isinstance(node, fx.Node) else None


def _placed(node: fx.Node, keys: fx.Node, tokens: int) -> Attention:
    """The attention with the stream that it is added to, or why there is none."""
    batch = shape_of(next(n for n in node.graph.nodes if n.op == "placeholder"))[0]
    if shape_of(keys)[0] != batch:
        why = f"it attends within windows of {tokens} tokens, and a merged token would have no window"
        return Attention(node, _name(node), tokens, keys, unfit=why)
    before = ancestors(node)
    after = {node}
    for user in _from(node):
        if not after & set(user.all_input_nodes):
            continue
        added = [other for other in user.all_input_nodes if other not in after] if user.target in ADDITIONS else []
        after.add(user)
        for other in added:
            if other not in before or shape_of(other) != shape_of(user):
                continue
            if len(shape_of(user)) == 3 and shape_of(user)[:2] == (batch, tokens):
                return Attention(node, _name(node), tokens, keys, stream=other, total=user)
            why = f"its keys are {tokens} tokens and the stream it adds to is {shape_of(user)[1:]}"
            return Attention(node, _name(node), tokens, keys, unfit=why)
    return Attention(node, _name(node), tokens, keys)


def _from(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes after one, in order of execution."""
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All that a node is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for earlier in waiting.pop().all_input_nodes:
            if earlier not in found:
                found.add(earlier)
                waiting.append(earlier)
    return found


def _name(node: fx.Node) -> str:
    """The qualified name of the module that a node was traced in, or the node's own."""
    stack = list(node.meta.get("nn_module_stack", {}))
    return str(stack[-1]) if stack and stack[-1] else node.name
