"""Where a layer's output is added to another value, and how it makes up for what that value has lost.

A residual sum adds what becomes of a layer's output y to a value s of an earlier place:

    z = a ⊙ P(y) + b + s,

with a factor a for each channel and a permutation of axes P. Where earlier layers were pruned s′ is not s any more,
and a layer that is fitted to y alone hands the difference on to every block after it. Fitted from the inputs that it
now gets to

    y + P⁻¹((s − s′) / a),

it brings the sum back to z as well as those inputs allow. How much of the difference it is asked for is found from
parts of the images (passes/reconstruct/least_squares.py), since what few images show of it may be chance. Only factors
that do not depend on the image are followed: batch normalisation with its stored statistics, the learned scale of a
branch, and what changes nothing outside of training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from mpcompile.analysis.operator_sets import (
    ADDITIONS,
    AXIS_PERMUTATIONS,
    AXIS_TRANSPOSES,
    EVAL_IDENTITY_MODULES,
    MULTIPLICATIONS,
)
from mpcompile.ir.model import Model

UNCHANGED_CALLS = {"dropout": 2, "stochastic_depth": 3}  # functions by name, and where `training` stands, to be False
SMALLEST = 1e-3  # of the largest factor: channels below it hardly reach the sum, and nothing is asked of them

Undo = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """The node that gives s, and what takes a change of the sum to one of the layer's outputs, last operation first."""

    other: fx.Node
    undo: tuple[Undo, ...]

    def missing(self, was: Tensor, now: Tensor) -> Tensor:
        """P⁻¹((s − s′) / a), of the shape of the layer's outputs."""
        lost = was - now
        for step in self.undo:
            lost = step(lost)
        return lost


def join_after(model: Model, node: fx.Node) -> ResidualAdd | None:
    """The sum that alone reads a layer's output, where the value that it is added to is known before the layer runs."""
    place = {other: index for index, other in enumerate(model.graph.graph.nodes)}
    at, undo = node, list[Undo]()
    while len(at.users) == 1:
        [user] = at.users
        if user.target in ADDITIONS:
            other = _other(user, at)
            if other is not None and _shape(other) != _shape(user):
                return None
            while other is not None and place[other] > place[node] and _unchanged(model, other):
                [other] = other.all_input_nodes
            return (
                ResidualAdd(other, tuple(reversed(undo))) if other is not None and place[other] < place[node] else None
            )
        if not _unchanged(model, user):
            step = _normalised(model, user) or _scaled(model, user, at) or _permuted(user)
            if step is None:
                return None
            undo.append(step)
        at = user
    return None


def _shape(node: fx.Node) -> object:
    """The shape on the last example, where that is known."""
    return getattr(node.meta.get("tensor_meta"), "shape", None)


def _other(user: fx.Node, at: fx.Node) -> fx.Node | None:
    """The second operand of a sum or product of two values of the graph."""
    others = [i for i in user.all_input_nodes if i is not at]
    return others[0] if len(others) == 1 and len(user.args) == 2 and not user.kwargs else None


def _unchanged(model: Model, node: fx.Node) -> bool:
    """Whether a node gives what it gets."""
    if node.op == "call_module":
        return isinstance(model.graph.get_submodule(str(node.target)), EVAL_IDENTITY_MODULES)
    at = UNCHANGED_CALLS.get(getattr(node.target, "__name__", ""))
    return at is not None and [node.kwargs.get("training"), *node.args[at : at + 1]][-1] is False


def _normalised(model: Model, node: fx.Node) -> Undo | None:
    """Undoes the scale of a batch normalisation with stored statistics and no activation (timm's may have one)."""
    module = model.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.BatchNorm2d) or module.running_var is None or module.training:
        return None
    if not all(isinstance(part, nn.Identity) for part in module.children()):
        return None
    scale = (module.running_var + module.eps).rsqrt()
    factor = scale if module.weight is None else module.weight.detach() * scale
    return _division(factor[:, None, None])


def _scaled(model: Model, node: fx.Node, at: fx.Node) -> Undo | None:
    """Undoes a product with a parameter."""
    other = _other(node, at) if node.target in MULTIPLICATIONS else None
    factor = None if other is None else _parameter(model, other)
    return None if factor is None else _division(factor)


def _parameter(model: Model, node: fx.Node) -> Tensor | None:
    """A parameter or buffer, or one in another shape."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        found = getattr(model.graph.get_submodule(owner), name)
        return found.detach() if isinstance(found, Tensor) else None
    source, *shape = node.args or (None,)
    if node.target not in ("reshape", "view") or not isinstance(source, fx.Node):
        return None
    sizes = [size for size in shape if isinstance(size, int)]
    found = _parameter(model, source) if len(sizes) == len(shape) else None
    return None if found is None else found.reshape(sizes)


def _permuted(node: fx.Node) -> Undo | None:
    """Undoes a permutation of axes."""
    if node.target not in AXIS_PERMUTATIONS or node.kwargs:
        return None
    _, *rest = node.args
    axes = [*rest[0]] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    dims = [dim for dim in axes if isinstance(dim, int)]
    if len(dims) != len(axes):
        return None
    if node.target in AXIS_TRANSPOSES:
        return lambda lost: lost.transpose(dims[0], dims[1])
    back = sorted(range(len(dims)), key=lambda axis: dims[axis] % len(dims))
    return lambda lost: lost.permute(back)


def _division(factor: Tensor) -> Undo:
    """Undoes a product; where the factor is next to nothing, nothing is asked for."""
    used = factor.abs() > SMALLEST * factor.abs().amax()
    return lambda lost: torch.where(used, lost / torch.where(used, factor, 1), 0)
