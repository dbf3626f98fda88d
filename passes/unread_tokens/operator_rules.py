"""Rules: if only some positions of an operator's output are read, which positions of its inputs does it need?

A rule takes a node and the Read of its output. It returns the Read of each input (None: all of it), such that the
operator, applied to these inputs alone, gives exactly these positions of its output. A rule is None if the operator
mixes positions along that axis, changes its inputs in place, or is unknown.

All sizes are those that ShapeProp recorded. Only the batch size is free in a captured graph, and no rule moves a Read
to or from the batch axis.
"""

import math
from collections.abc import Callable, Mapping

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from mpcompile.analysis.attention import operand, shape_of
from mpcompile.analysis.operator_sets import ELEMENTWISE_MODULES, ELEMENTWISE_NAMES
from mpcompile.frontend.multihead_attention import join_heads
from mpcompile.passes.unread_tokens.axis_read import Read

Needs = Mapping[fx.Node, Read | None]
Rule = Callable[[fx.Node, Read], Needs | None]

IN_PLACE = frozenset(["iadd", "isub", "imul", "itruediv", "imatmul", "setitem"])
REDUCTIONS = frozenset(["mean", "sum", "amax", "amin", "var"])  # their keepdim=True is no reason to refuse
# Functions that apply one Linear, norm or product to each token: what a narrowed graph saves.
PRODUCT_NAMES = frozenset(["linear", "matmul", "bmm", "scaled_dot_product_attention"])


def name_of(node: fx.Node) -> str:
    """The name of a called function or method, without distinction between the two; "" for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def changes_inputs(node: fx.Node) -> bool:
    """Whether a call may write into its inputs, such as `add_`, `operator.iadd` or any argument that is True."""
    name = name_of(node)
    in_place = name.strip("_") in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or "out" in node.kwargs or _switches_on(node)


def _switches_on(node: fx.Node) -> bool:
    """Whether an argument is True: training, inplace or is_causal. keepdim of a reduction does not count."""
    leaves = tree_leaves((node.args, dict(node.kwargs)))
    return name_of(node) not in REDUCTIONS and any(leaf is True for leaf in leaves)


def multiplies(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is a Linear layer or a product, whose time and MACs grow with the number of tokens."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.Linear)
    return name_of(node) in PRODUCT_NAMES


def needs(node: fx.Node, read: Read, modules: Mapping[str, nn.Module]) -> Needs | None:
    """The Read of each input that gives this Read of a node's output; None if there is no rule."""
    if changes_inputs(node):
        return None
    if node.op == "call_module":
        found = _of_module(node, read, modules[str(node.target)])
    elif node.target is join_heads and len(node.args) == 1:  # batch first
        found = _first(node, read.along(2)) if read.axis == 1 else None
    else:
        rule = RULES.get(name_of(node))
        found = None if rule is None else rule(node, read)
    if found is None:
        return None
    return {**dict.fromkeys(node.all_input_nodes), **found}


def _of_module(node: fx.Node, read: Read, module: nn.Module) -> Needs | None:
    """The rule of a module call."""
    rank = len(shape_of(node))
    if isinstance(module, nn.Linear):
        return _first(node, read) if read.axis < rank - 1 and type(module).forward is nn.Linear.forward else None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _first(node, read) if read.axis < rank - len(module.normalized_shape) else None
    if isinstance(module, nn.Softmax):
        return _first(node, read) if module.dim is not None and read.axis != module.dim % rank else None
    if isinstance(module, ELEMENTWISE_MODULES) and not getattr(module, "inplace", False):
        return _first(node, read)
    return None


def _first(node: fx.Node, read: Read) -> Needs | None:
    """The Read of the first operand; None if that is not a node."""
    x = operand(node, 0)
    return {x: read} if isinstance(x, fx.Node) else None


def _elementwise(node: fx.Node, read: Read) -> Needs | None:
    """Each input at the same positions; an input that is broadcast along the axis, whole."""
    out = shape_of(node)
    found: dict[fx.Node, Read | None] = {}
    for other in node.all_input_nodes:
        shape = shape_of(other)
        axis = read.axis - (len(out) - len(shape))
        if axis >= 0 and shape[axis] not in (1, out[read.axis]):
            return None
        found[other] = read.along(axis) if axis >= 0 and shape[axis] > 1 else None
    return found


def _linear(node: fx.Node, read: Read) -> Needs | None:
    return _first(node, read) if read.axis < len(shape_of(node)) - 1 else None


def _norm(node: fx.Node, read: Read) -> Needs | None:
    """layer_norm and rms_norm, over as many trailing axes as the argument `normalized_shape` has numbers."""
    over = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
    known = isinstance(over, tuple | list) and read.axis < len(shape_of(node)) - len(over)
    return _first(node, read) if known else None


def _softmax(node: fx.Node, read: Read) -> Needs | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return _first(node, read) if isinstance(dim, int) and dim % len(shape_of(node)) != read.axis else None


def _reduction(node: fx.Node, read: Read) -> Needs | None:
    """A reduction over other axes that keeps them with size 1."""
    x, rank = operand(node, 0), len(shape_of(node))
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = dims if isinstance(dims, tuple | list) else [dims]
    kept = isinstance(x, fx.Node) and len(shape_of(x)) == rank
    if not kept or not all(isinstance(dim, int) for dim in dims):
        return None
    return None if read.axis in [dim % rank for dim in dims if isinstance(dim, int)] else {x: read}  # type: ignore[dict-item]


def _matmul(node: fx.Node, read: Read) -> Needs | None:
    """Rows of the product from rows of its left factor; batch axes from both; columns have no rule."""
    left, right = operand(node, 0), operand(node, 1)
    rank = len(shape_of(node))
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if read.axis != rank - 2 or len(shape_of(left)) != rank or len(shape_of(right)) < 2:
        return None
    return {left: read, right: None}


def _attention(node: fx.Node, read: Read) -> Needs | None:
    """The same queries, with all keys and values; a mask with a row for each query, at these rows."""
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), node.args, strict=False)) | node.kwargs
    query, mask = arguments["query"], arguments.get("attn_mask")
    rank = len(shape_of(node))
    others = (arguments["key"], arguments["value"], mask)
    if read.axis != rank - 2 or arguments.get("dropout_p") or not isinstance(query, fx.Node) or query in others:
        return None
    found: dict[fx.Node, Read | None] = {query: read}
    if isinstance(mask, fx.Node):
        shape = shape_of(mask)
        by_query = len(shape) > 1 and shape[-2] > 1
        found[mask] = read.along(len(shape) - 2) if by_query else None
    return found


def _transpose(node: fx.Node, read: Read) -> Needs | None:
    x, *dims = node.args
    rank = len(shape_of(node))
    if node.kwargs or not isinstance(x, fx.Node) or len(dims) != 2:
        return None
    first, second = (dim % rank if isinstance(dim, int) else rank for dim in dims)
    if rank in (first, second):
        return None
    return {x: read.along({first: second, second: first}.get(read.axis, read.axis))}


def _permute(node: fx.Node, read: Read) -> Needs | None:
    x, *dims = node.args
    rank = len(shape_of(node))
    axes = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    if node.kwargs or not isinstance(x, fx.Node) or not all(isinstance(axis, int) for axis in axes):
        return None
    return {x: read.along(axes[read.axis] % rank)}  # type: ignore[operator, arg-type]


def _reshape(node: fx.Node, read: Read) -> Needs | None:
    """A reshape that keeps the axis: the input has an axis of the same size after as many elements."""
    x = node.args[0]
    if node.kwargs or not isinstance(x, fx.Node):
        return None
    before, after = shape_of(x), shape_of(node)
    for axis, size in enumerate(before):
        if size == after[read.axis] and math.prod(before[:axis]) == math.prod(after[: read.axis]):
            return {x: read.along(axis)}
    return None


def _sized_reshape(node: fx.Node, read: Read) -> Needs | None:
    """`_reshape` with the new shape as arguments, whose number of positions `resize` can replace."""
    return _reshape(node, read) if _sizes(node) is not None else None


def _sizes(node: fx.Node) -> list[int | fx.Node] | None:
    """The new shape among the arguments of reshape or view; None if it is not one argument for each axis."""
    _, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = list(sizes[0])
    known = [size for size in sizes if isinstance(size, int | fx.Node)]
    return known if len(known) == len(sizes) == len(shape_of(node)) else None


def resize(node: fx.Node, read: Read) -> None:
    """Replaces the number of positions among the arguments of reshape or view by that of the Read."""
    sizes = _sizes(node) if name_of(node) in ("reshape", "view") else None
    if sizes is not None and sizes[read.axis] != -1:
        sizes[read.axis] = read.count
        node.args = (node.args[0], *sizes) if node.op == "call_method" else (node.args[0], tuple(sizes))


def _squeeze(node: fx.Node, read: Read) -> Needs | None:
    """Removes one given axis of size 1."""
    x, *dims = node.args
    shape = shape_of(x)
    if len(dims) != 1 or not isinstance(dims[0], int) or shape[dims[0]] != 1:
        return None
    return _reshape(node, read)


def _cat(node: fx.Node, read: Read) -> Needs | None:
    """Concatenation along another axis."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = len(shape_of(node))
    if not isinstance(dim, int) or dim % rank == read.axis:
        return None
    return dict.fromkeys(node.all_input_nodes, read)


def _split(node: fx.Node, read: Read) -> Needs | None:
    """A chunk or split along another axis; the Read is that of every part."""
    x = node.args[0]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    known = isinstance(x, fx.Node) and isinstance(dim, int) and dim % len(shape_of(x)) != read.axis
    return {x: read} if known else None  # type: ignore[dict-item]


def _unbind(node: fx.Node, read: Read) -> Needs | None:
    """An unbind along another axis; the Read is that of every part."""
    x = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(x, fx.Node) or not isinstance(dim, int):
        return None
    return {x: read.along(read.axis + (dim % len(shape_of(x)) <= read.axis))}


RULES: Mapping[str, Rule] = {
    **dict.fromkeys((*ELEMENTWISE_NAMES, "stochastic_depth"), _elementwise),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("matmul", "bmm", "__matmul__"), _matmul),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(("reshape", "view"), _sized_reshape),
    **dict.fromkeys(("flatten", "unsqueeze"), _reshape),
    **dict.fromkeys(("chunk", "split"), _split),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "linear": _linear,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "permute": _permute,
    "squeeze": _squeeze,
    "unbind": _unbind,
}
