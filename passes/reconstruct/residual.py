"""Residual adds: which layer feeds one, and how its output can compensate the error of the skip branch.

A residual add computes, from a layer's output y and an earlier value s (the skip branch),

    z = a ⊙ P(y) + b + s,

with a factor a per channel and a permutation of axes P. If earlier layers were pruned, the skip branch is s′ ≠ s. A
layer fitted to y alone passes that error on to every later block. Fitted, on its pruned inputs, to

    y + P⁻¹((s − s′) / a),

it restores z as well as its inputs allow. The second term is the residual error at the layer. How much of it to fit is
chosen by cross-validation over parts of the calibration images (passes/reconstruct/least_squares.py), since on few
images a part of it is chance. Only factors that do not depend on the image are supported: batch normalization with
stored statistics, the learned scale of a branch, and operations that are the identity outside of training.
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
from mpcompile.ir.quantization import Quantizer

# Functions that are the identity if `training` is False: name -> position of `training` among the arguments.
IDENTITY_CALLS = {"dropout": 2, "stochastic_depth": 3}
# Relative to the largest factor. A channel with a smaller one barely changes the sum: its residual error is set to 0.
SMALLEST_FACTOR = 1e-3

Inverse = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """A residual add after a layer.

    Attributes:
        skip: the node that computes the skip branch s.
        inverses: the inverse of each operation between the layer and the add, last operation first.
    """

    skip: fx.Node
    inverses: tuple[Inverse, ...]

    def error_at_layer(self, dense_skip: Tensor, pruned_skip: Tensor) -> Tensor:
        """The residual error P⁻¹((s − s′) / a), in the shape of the layer's output."""
        error = dense_skip - pruned_skip
        for inverse in self.inverses:
            error = inverse(error)
        return error


def residual_add_after(model: Model, node: fx.Node) -> ResidualAdd | None:
    """The residual add that the layer at `node` feeds, or None.

    Every node between the layer and the add must have one user and an inverse that does not depend on the image. The
    skip branch must have the shape of the sum, and be computed before the layer.
    """
    order = {other: index for index, other in enumerate(model.graph.graph.nodes)}
    at, inverses = node, list[Inverse]()
    while len(at.users) == 1:
        [user] = at.users
        if user.target in ADDITIONS:
            skip = _other_operand(user, at)
            if skip is not None and _shape(skip) != _shape(user):
                return None
            while skip is not None and order[skip] > order[node] and _is_identity(model, skip):
                [skip] = skip.all_input_nodes
            if skip is None or order[skip] >= order[node]:
                return None
            return ResidualAdd(skip, tuple(reversed(inverses)))
        if not _is_identity(model, user):
            inverse = _inverse_of_norm(model, user) or _inverse_of_scale(model, user, at) or _inverse_permutation(user)
            if inverse is None:
                return None
            inverses.append(inverse)
        at = user
    return None


def _shape(node: fx.Node) -> object:
    """The shape of the node's value on the last example, or None if it was not recorded."""
    return getattr(node.meta.get("tensor_meta"), "shape", None)


def _other_operand(user: fx.Node, at: fx.Node) -> fx.Node | None:
    """The operand that is not `at`, if the node is a sum or product of two different nodes; else None."""
    others = [i for i in user.all_input_nodes if i is not at]
    return others[0] if len(others) == 1 and len(user.args) == 2 and not user.kwargs else None


def _is_identity(model: Model, node: fx.Node) -> bool:
    """Whether a node is the identity in evaluation mode, up to rounding by a quantizer."""
    if node.op == "call_module":
        return isinstance(model.graph.get_submodule(str(node.target)), (*EVAL_IDENTITY_MODULES, Quantizer))
    position = IDENTITY_CALLS.get(getattr(node.target, "__name__", ""))
    return position is not None and [node.kwargs.get("training"), *node.args[position : position + 1]][-1] is False


def _inverse_of_norm(model: Model, node: fx.Node) -> Inverse | None:
    """Divides by the scale of a batch normalization with stored statistics and no activation (timm's may have one)."""
    module = model.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.BatchNorm2d) or module.running_var is None or module.training:
        return None
    if not all(isinstance(part, nn.Identity) for part in module.children()):
        return None
    scale = (module.running_var + module.eps).rsqrt()
    factor = scale if module.weight is None else module.weight.detach() * scale
    return _division(factor[:, None, None])


def _inverse_of_scale(model: Model, node: fx.Node, at: fx.Node) -> Inverse | None:
    """Divides by the parameter that the node multiplies by; None if the node is no such product."""
    other = _other_operand(node, at) if node.target in MULTIPLICATIONS else None
    factor = None if other is None else _parameter(model, other)
    return None if factor is None else _division(factor)


def _parameter(model: Model, node: fx.Node) -> Tensor | None:
    """The parameter or buffer that a node fetches or reshapes, or None."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(model.graph.get_submodule(owner), name)
        return value.detach() if isinstance(value, Tensor) else None
    source, *shape = node.args or (None,)
    if node.target not in ("reshape", "view") or not isinstance(source, fx.Node):
        return None
    sizes = [size for size in shape if isinstance(size, int)]
    value = _parameter(model, source) if len(sizes) == len(shape) else None
    return None if value is None else value.reshape(sizes)


def _inverse_permutation(node: fx.Node) -> Inverse | None:
    """Moves axes back; None if the node does not permute axes by constants."""
    if node.target not in AXIS_PERMUTATIONS or node.kwargs:
        return None
    _, *rest = node.args
    axes = [*rest[0]] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    dims = [dim for dim in axes if isinstance(dim, int)]
    if len(dims) != len(axes):
        return None
    if node.target in AXIS_TRANSPOSES:
        return lambda error: error.transpose(dims[0], dims[1])
    back = sorted(range(len(dims)), key=lambda axis: dims[axis] % len(dims))
    return lambda error: error.permute(back)


def _division(factor: Tensor) -> Inverse:
    """Divides by `factor`; the quotient is 0 for channels whose factor is below SMALLEST_FACTOR."""
    used = factor.abs() > SMALLEST_FACTOR * factor.abs().amax()
    return lambda error: torch.where(used, error / torch.where(used, factor, 1), 0)
