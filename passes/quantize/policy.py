"""Which layers are quantised, and for each other layer the reason why it stays in floating point.

By default these stay: the stem, which reads the image, and output layers, as both hold few of the multiply-accumulates
and cost much accuracy; layers whose weight is not used as it is stored; and everything that is not a Linear or Conv2d
(normalizations, softmax, attention products, residual adds).
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import fx

from mpcompile.analysis.eligibility import (
    EXCLUDED,
    agreed_among_tied,
    graph_positions,
    reason_dense_by_default,
    reason_uneditable,
    require_matches,
    unsupported_modules,
    weight_nodes,
)
from mpcompile.analysis.operator_sets import WEIGHT_FUNCTIONS
from mpcompile.ir.model import Model

WITHIN_MODULE = "it is applied inside a module that the graph calls as a whole, so its input cannot be quantised"
BIAS_APART = "an operator other than linear or convolution reads its bias, which 8-bit kernels add themselves"


def quantizable(model: Model, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, str | None]:
    """For each module with a weight matrix, by qualified name: None if it is quantised, or why it is not.

    `include` and `exclude` are shell patterns over qualified names. `include` overrides the default for stems and
    output layers; `exclude` wins over `include`. Layers that share a weight are quantised together or not at all.
    Raises UsageError if a shell pattern matches no layer.
    """
    require_matches([name for name, _ in model.layers()], (*include, *exclude))
    positions = graph_positions(model)
    nodes_of, _ = weight_nodes(model.graph)
    reasons: dict[str, str | None] = dict(unsupported_modules(model))
    for name, layer in model.layers():
        excluded = next((glob for glob in exclude if fnmatchcase(name, glob)), None)
        position = positions.get(name)
        included = any(fnmatchcase(name, glob) for glob in include)
        reason = f"{EXCLUDED} {excluded!r}" if excluded else reason_uneditable(layer, position)
        if reason is None and position is not None and not included:
            reason = reason_dense_by_default(position)
        if reason is None:
            reason = next(filter(None, (_reason_of_node(node, name) for node in nodes_of[name])), None)
        reasons[name] = reason
    return agreed_among_tied(model, reasons, "stays in floating point")


def _reason_of_node(node: fx.Node, name: str) -> str | None:
    """Why a layer whose weight or bias this node reads stays in floating point; None if the node is that layer."""
    if node.op == "call_module":
        return None if node.target == name else WITHIN_MODULE
    return None if node.target in WEIGHT_FUNCTIONS else BIAS_APART
