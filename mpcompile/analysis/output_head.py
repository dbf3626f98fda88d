"""Finds out what a model's outputs are, logits or probabilities, and which decision is made from them."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, fx, nn

from mpcompile.analysis.operator_sets import (
    ADDITIONS,
    DATA_MOVEMENT_MODULES,
    DATA_MOVEMENT_NAMES,
    EVAL_IDENTITY_MODULES,
    MATRIX_PRODUCTS,
    SOFTMAX_FUNCTIONS,
    WEIGHT_FUNCTIONS,
)
from mpcompile.errors import UsageError
from mpcompile.ir.batch import arguments
from mpcompile.ir.head import Head, HeadChoice
from mpcompile.ir.model import Model
from mpcompile.ir.parity import is_constant

CONVERSION_NAMES = frozenset(["float", "double", "to", "type", "contiguous", "clone", "detach", "dropout"])
PROBABILITY_NAMES = frozenset(["sigmoid", "sigmoid_", "hardsigmoid", "softmax"])
PROBABILITY_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
UNBOUNDED = ADDITIONS | MATRIX_PRODUCTS | WEIGHT_FUNCTIONS
UNBOUNDED_MODULES = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
SUM_TOLERANCE = 1e-3  # of probabilities that sum to 1: float32 sums of 1,000 values differ by about 1e-5


def with_head(model: Model, choice: str, inputs: tuple[Tensor, ...] | None) -> tuple[Model, tuple[str, ...]]:
    """The model with its head, and notes on what was assumed and what is unusual about its outputs.

    Args:
        model: the captured model.
        choice: the head that the recipe asks for (`HeadChoice.parse`).
        inputs: the inputs of a batch, the images first, to look at outputs; None for the model's example.

    Raises UsageError if the head does not fit the outputs.
    """
    outputs = model(arguments(model.example_inputs if inputs is None else inputs, model.example.dtype)).double()
    last = gives_probabilities(model.graph)
    bounded = bool(((outputs >= 0) & (outputs <= 1)).all())
    probabilities = bounded if last is None else last
    try:
        asked = HeadChoice.parse(choice)
        several = outputs.shape[1] > 1 and asked.kind in ("auto", "softmax")  # outputs for one decision
        if outputs.ndim > 2 or (several and not last and not _sum_to_one(outputs)):
            probabilities = bool(last)
        head = asked.resolved(outputs.shape[1], probabilities)
    except ValueError as error:
        raise UsageError(str(error)) from error
    notes = []
    if head.kind != "softmax":
        notes.append(_rule(head, probabilities, last is None))
    if bounded and head.kind == "softmax" and outputs.ndim == 2:
        notes += _bounded(outputs, last)
    if is_constant(outputs.numpy(force=True)):
        notes.append(
            f"this model returns the same outputs for each of {len(outputs)} "
            f"{'noise inputs' if inputs is None else 'calibration images'}, so a comparison of outputs proves little; "
            "check the file and the preprocessing"
        )
    return replace(model, head=head), tuple(notes)


def gives_probabilities(graph: fx.GraphModule) -> bool | None:
    """Whether the last operation of a graph is a sigmoid or a softmax; None if values in [0, 1] are not ruled out."""
    node = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    node = node[0] if isinstance(node, tuple | list) else node  # the primary output of several
    while isinstance(node, fx.Node):
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            if isinstance(module, PROBABILITY_MODULES):
                return True
            if isinstance(module, UNBOUNDED_MODULES):
                return False
            if not isinstance(module, (*EVAL_IDENTITY_MODULES, *DATA_MOVEMENT_MODULES)):
                return None
        elif node.op in ("call_function", "call_method"):
            if node.target in SOFTMAX_FUNCTIONS or _name(node.target) in PROBABILITY_NAMES:
                return True
            if node.target in UNBOUNDED:
                return False
            if _name(node.target) not in DATA_MOVEMENT_NAMES | CONVERSION_NAMES:
                return None
        else:
            return None
        node = node.args[0] if node.args else None
    return None


def _name(target: str | Callable[..., object]) -> str:
    """The name of a method or of a function."""
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _rule(head: Head, probabilities: bool, by_values: bool) -> str:
    """The note that names the decision of a head other than softmax."""
    of_what = "probability" if probabilities else "logit"
    why = ", as all outputs on the examined images lie between 0 and 1" if probabilities and by_values else ""
    subject = {
        "sigmoid": f"the model has one output, a {of_what}{why}: the decision is whether it exceeds {head.threshold:g}",
        "multilabel": f"each output is the {of_what} of one label{why}: the decision is which exceed "
        f"{head.threshold:g}, and a prediction is right, or the same, if all labels are",
        "ordinal": f"the outputs are {of_what} values of ranks{why}: the decision is how many exceed "
        f"{head.threshold:g}",
    }
    return f"{subject[head.kind]} (--head sets another rule)"


def _bounded(outputs: Tensor, last: bool | None) -> list[str]:
    """Notes on outputs (images, outputs) within [0, 1]."""
    if _sum_to_one(outputs):
        return [
            "the outputs are probabilities, not logits: they lie between 0 and 1 and sum to 1; logit shifts and "
            "margins are those of probabilities"
        ]
    if last:
        return [
            f"the model ends in a sigmoid over {outputs.shape[1]} outputs and one class is taken for each image, the "
            "largest output; if an image may have several labels, give --head multilabel"
        ]
    return []


def _sum_to_one(outputs: Tensor) -> bool:
    """Whether the outputs of each image, (images, outputs, …), sum to 1."""
    return bool(((outputs.sum(1) - 1).abs() < SUM_TOLERANCE).all())
