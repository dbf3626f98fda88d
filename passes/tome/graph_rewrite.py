"""Writes token merging into a graph, and checks that the model permits it.

The rewrite inserts a merge after the residual add of an attention, adds the log sizes of the tokens to the logits of
every later attention, and weights every mean over tokens by their sizes.

Merging is valid if the model treats its tokens as a weighted set from the first merge on:

1. their order does not matter (no positions inside attention, no windows, no grid);
2. two equal tokens of size 1 give the same outputs as one of size 2 (sizes reach every attention and every pooling).

Both are checked by running the model on its example, with a reordering or a repetition in place of the first merge.
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.analysis.attention import Attention, attentions, shape_of
from mpcompile.analysis.operator_sets import MEANS
from mpcompile.errors import PassError
from mpcompile.ir.batch import primary
from mpcompile.ir.model import Model
from mpcompile.ir.parity import relative_difference
from mpcompile.ir.token_merging import log_size, mean_by_size, merge_tokens, merges_tokens, unit_sizes

# Relative difference: float32 sums over a few hundred tokens in another order, in each of about ten blocks, stay below
# it; a position or a window changes outputs by several per cent.
LAW_TOLERANCE = 1e-3

# (tokens, sizes, keys, r, protected) -> (tokens, sizes), as merge_tokens.
Merge = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def mergeable_attentions(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Attention]:
    """The attentions after which tokens can merge, in order.

    An attention that only reads the tokens, such as attention pooling, is not one of them. Of parallel attentions with
    the same residual add, the last counts. Raises PassError with the reason if tokens cannot merge.
    """
    if merges_tokens(graph):
        raise PassError("this graph merges tokens already; give the whole schedule to one tome pass")
    found = attentions(graph, modules)
    unfit = next((attention for attention in found if attention.unfit), None)
    if unfit:
        raise PassError(f"tokens cannot be merged around {unfit.name}: {unfit.unfit}; leave tome out")
    mergeable = list({attention.total: attention for attention in found if attention.total}.values())
    if not mergeable:
        raise PassError(
            "the graph has no self-attention that is added to its tokens (scaled_dot_product_attention "
            "or softmax(q·kᵀ)), so there are no tokens to merge; leave tome out"
        )
    first = mergeable[0]
    other = next((attention for attention in found if attention.tokens != first.tokens), None)
    if other:
        raise PassError(
            f"{first.name} attends to {first.tokens} tokens and {other.name} to {other.tokens}; merging needs a "
            "model that keeps its tokens to the end; leave tome out"
        )
    return mergeable


def protected_tokens(model: Model, first: Attention) -> int:
    """The number of leading tokens that do not depend on the image at the input of the first attention.

    Those are class, distillation and register tokens. Raises PassError if such a token is not at the front.
    """
    assert first.stream is not None
    image = model.example[:1]
    with torch.no_grad():
        tokens = fx.GraphModule(model.graph, _prefix(first.stream))(torch.cat([image, 1 - image.flip(-1)]))
    same = (tokens[0] == tokens[1]).all(-1)
    count = int(same.long().cumprod(0).sum())
    if int(same.sum()) != count:
        raise PassError(
            f"of the {len(same)} tokens at {first.name}, {int(same.sum())} do not depend on the image and only {count} "
            "of them stand in front; only tokens in front can be protected from merging"
        )
    return count


def _prefix(last: fx.Node) -> fx.Graph:
    """A copy of the graph up to this node, which becomes its output."""
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in last.graph.nodes:
        values[node] = copied.node_copy(node, values.__getitem__)
        if node is last:
            break
    copied.output(values[last])
    return copied


def require_weighted_set(model: Model, mergeable: Sequence[Attention], protected: int) -> None:
    """Raises PassError unless the model treats its tokens as a weighted set after the first attention."""
    tokens = mergeable[0].tokens
    backwards = torch.cat([torch.arange(protected), torch.arange(tokens - 1, protected - 1, -1)])

    def as_is(x: Tensor, size: Tensor, keys: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
        return x, size

    def reordered(x: Tensor, size: Tensor, keys: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
        return x[:, backwards.to(x.device)], size

    def doubled(x: Tensor, size: Tensor, keys: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
        return x, torch.cat([size[:, :-1], 2 * size[:, -1:]], 1)

    def repeated(x: Tensor, size: Tensor, keys: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
        return torch.cat([x, x[:, -1:]], 1), torch.cat([size, size[:, -1:]], 1)

    def outputs(merge: Merge) -> Tensor:
        schedule = [1] + [0] * (len(mergeable) - 1)
        with torch.no_grad():
            # Not called directly: a GraphModule prints a traceback if its call fails.
            result = fx.Interpreter(with_merging(model.graph, schedule, protected, merge)).run(*model.example_inputs)
        return primary(result)

    laws = (
        (as_is, reordered, "the outputs depend on the order of tokens (positions inside attention, windows, a grid)"),
        (doubled, repeated, "a token of size 2 does not count as 2 tokens (an attention or a mean ignores sizes)"),
    )
    for one, other, broken in laws:
        try:
            difference = relative_difference(outputs(one).numpy(force=True), outputs(other).numpy(force=True))
        except Exception as error:
            raise PassError(
                f"after {mergeable[0].name} the graph does not run on another number of tokens "
                f"({(str(error).splitlines() or [type(error).__name__])[0]}); leave tome out"
            ) from error
        if not difference <= LAW_TOLERANCE:
            raise PassError(
                f"after {mergeable[0].name} {broken}: two forms that should agree differ by {difference:.1e} of the "
                "outputs' size, so merged tokens would compute something else; leave tome out"
            )


def with_merging(
    graph: fx.GraphModule, schedule: Sequence[int], protected: int, merge: Merge = merge_tokens
) -> fx.GraphModule:
    """A graph with the same modules that merges `schedule[i]` tokens after the i-th of `mergeable_attentions`."""
    return fx.GraphModule(graph, nodes_with_merging(graph, schedule, protected, merge), graph._get_name())


def nodes_with_merging(
    graph: fx.GraphModule, schedule: Sequence[int], protected: int, merge: Merge = merge_tokens
) -> fx.Graph:
    """The nodes of `with_merging`. The given graph is not changed; without merges it is an unchanged copy."""
    nodes = copy.deepcopy(graph.graph)
    if not any(schedule):
        return nodes
    modules = dict(graph.named_modules())
    after = zip(mergeable_attentions(nodes, modules), schedule, strict=True)
    merges = {attention.total: r for attention, r in after if not attention.selects}
    attention_at = {attention.node: attention for attention in attentions(nodes, modules)}
    tokens = next(iter(attention_at.values())).tokens
    keys: dict[fx.Node, fx.Node] = {}  # residual add -> keys of the last attention added to it
    size: fx.Node | None = None
    bias: fx.Node | None = None
    for node in list(nodes.nodes):
        if node in attention_at:
            attention = attention_at[node]
            if attention.total is not None:
                keys[attention.total] = attention.keys
            if size is not None:
                bias = bias or _call_after(size, log_size, size)
                _add_bias(attention, bias)
        elif size is not None and _is_token_mean(node, tokens, protected):
            _weight_by_size(node, size)
        r = merges.get(node, 0)
        if r:
            size, bias = _merge_after(node, size, keys[node], r, protected, merge), None
    return nodes


def _merge_after(total: fx.Node, size: fx.Node | None, keys: fx.Node, r: int, protected: int, merge: Merge) -> fx.Node:
    """Inserts a merge between a residual add and its readers. Returns the node of the sizes after it."""
    size = size or _call_after(total, unit_sizes, total)
    both = _call_after(max(total, size), merge, total, size, keys, r, protected)
    both.meta["nn_module_stack"] = total.meta.get("nn_module_stack", {})
    tokens, sizes = _call_after(both, operator.getitem, both, 0), _call_after(both, operator.getitem, both, 1)
    total.replace_all_uses_with(tokens, delete_user_cb=lambda user: user not in (both, size))
    return sizes


def _add_bias(attention: Attention, bias: fx.Node) -> None:
    """Adds the bias log(size) to the logits of an attention."""
    node = attention.node
    if node.target is F.scaled_dot_product_attention:
        if len(node.args) > 3:
            node.args = (*node.args[:3], bias, *node.args[4:])
        else:
            node.kwargs = {**node.kwargs, "attn_mask": bias}
        return
    with node.graph.inserting_before(node):
        logits = node.graph.call_function(torch.add, (node.args[0], bias))
    node.args = (logits, *node.args[1:])


def _is_token_mean(node: fx.Node, tokens: int, protected: int) -> bool:
    """Whether a node is the mean over all tokens, or over all tokens that are not protected."""
    if node.target not in MEANS or not node.args or len(shape_of(node.args[0])) != 3:
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    over = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return over in (1, -2) and shape_of(node.args[0])[1] in (tokens, tokens - protected)


def _weight_by_size(node: fx.Node, size: fx.Node) -> None:
    """Replaces a mean over tokens by the mean weighted by their sizes."""
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    node.replace_all_uses_with(_call_after(node, mean_by_size, node.args[0], size, keepdim))
    node.graph.erase_node(node)


def _call_after(node: fx.Node, function: Callable[..., object], *args: fx.node.Argument) -> fx.Node:
    """Inserts a call after a node."""
    with node.graph.inserting_after(node):
        return node.graph.call_function(function, args)
