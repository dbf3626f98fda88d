"""How a call of a torch function is written as a node of an fx graph, and what kind of call it is.

The recorder sees `x + 1` as the method `Tensor.add`. Graph analyses know it as `operator.add`, as torch.fx writes it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import is_tensor_method_or_property

# Methods that Python's operators stand for, with the number of operands of the operator.
OPERATORS: dict[str, tuple[Callable[..., Any], int]] = {
    "add": (operator.add, 2),
    "sub": (operator.sub, 2),
    "mul": (operator.mul, 2),
    "div": (operator.truediv, 2),
    "true_divide": (operator.truediv, 2),
    "__floordiv__": (operator.floordiv, 2),
    "__mod__": (operator.mod, 2),
    "pow": (operator.pow, 2),
    "matmul": (operator.matmul, 2),
    "neg": (operator.neg, 1),
    "gt": (operator.gt, 2),
    "ge": (operator.ge, 2),
    "lt": (operator.lt, 2),
    "le": (operator.le, 2),
    "__eq__": (operator.eq, 2),
    "__ne__": (operator.ne, 2),
    "__and__": (operator.and_, 2),
    "__or__": (operator.or_, 2),
    "__xor__": (operator.xor, 2),
    "__invert__": (operator.invert, 1),
    "__getitem__": (operator.getitem, 2),
    "__setitem__": (operator.setitem, 3),
}
REVERSED: dict[str, Callable[..., Any]] = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
}
# Calls that give Python a value of a tensor: what follows may depend on the image in a way that no graph shows.
VALUE_READS = frozenset(
    """
    item tolist numpy equal allclose is_nonzero __bool__ __int__ __float__ __index__ __complex__ __contains__
    __array__ __dlpack__
    """.split()  # noqa: SIM905
)
# Calls whose result does not depend on the values of the tensor, only on its shape and type.
SHAPE_ONLY = frozenset(
    """
    zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full
    """.split()  # noqa: SIM905
)
# In-place operators whose names do not end in one underscore (`x += 1` is the method `add_`).
IN_PLACE_OPERATORS = frozenset(
    "__iand__ __ior__ __ixor__ __ilshift__ __irshift__ __ifloordiv__ __imod__ __ipow__".split()  # noqa: SIM905
)
# Functions of Python's operator module whose names end like those of in-place methods.
NOT_IN_PLACE = frozenset(["and_", "or_", "not_", "is_"])
# Calls whose result has a size that depends on the values of the tensor.
SIZED_BY_VALUES = frozenset(
    """
    nonzero argwhere masked_select unique unique_consecutive unique_dim bincount nms batched_nms _batched_nms_vanilla
    """.split()  # noqa: SIM905
)


def has_size_of_values(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the size of the result of a call depends on values: also `x[mask]`, and `where(mask)` alone."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)
    return name in SIZED_BY_VALUES or (name == "where" and len(args) == 1)


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function; "" if it has none."""
    return str(getattr(function, "__name__", ""))


def property_of(function: Callable[..., Any]) -> str | None:
    """The name of the property of a tensor that this getter reads; None if it is no getter."""
    if name_of(function) != "__get__":
        return None
    getter: Any = getattr(function, "__self__", None)
    return str(getattr(getter, "__name__", "") or name_of(getattr(getter, "fget", getter)))


def writes(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into its first argument."""
    name = name_of(function)
    return is_in_place(name) or name == "__setitem__" or kwargs.get("inplace") is True


def is_in_place(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    underscored = name.endswith("_") and not name.endswith("__") and name not in NOT_IN_PLACE
    return underscored or name in IN_PLACE_OPERATORS


def appended(graph: fx.Graph, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Appends the call to the graph, with nodes in place of tensors, as torch.fx would write it."""
    name = name_of(function)
    is_method = isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket) is False and (
        getattr(Tensor, name, None) is function or is_tensor_method_or_property(function)
    )
    if not is_method:
        return graph.call_function(function, args, kwargs)
    if name in OPERATORS and not kwargs and len(args) == OPERATORS[name][1]:
        return graph.call_function(OPERATORS[name][0], args)
    if name in REVERSED and not kwargs and len(args) == 2:
        return graph.call_function(REVERSED[name], args[::-1])
    return graph.call_method(name, args, kwargs)


def drop_unused(graph: fx.GraphModule) -> None:
    """Removes nodes whose results nothing uses; calls that write into a tensor stay."""
    modules = dict(graph.named_modules())

    def has_effects(node: fx.Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        if node.op == "call_module":
            return getattr(modules[str(node.target)], "inplace", False) is True
        name = node.target if isinstance(node.target, str) else name_of(node.target)
        return (
            is_in_place(name)
            or node.target is operator.setitem
            or node.kwargs.get("inplace") is True
            or "out" in node.kwargs
        )

    graph.graph.eliminate_dead_code(is_impure_node=has_effects)
    graph.recompile()
