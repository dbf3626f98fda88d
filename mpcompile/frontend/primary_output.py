"""Which output of a model is the primary one: the one that agreement, certificates and distillation compare."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from mpcompile.errors import CaptureError, did_you_mean
from mpcompile.ir.output_tree import Slot, flattened, rebuilt

# The last part of the paths of primary outputs, the likeliest first: classes, then maps, then embeddings.
USUAL_NAMES = (
    "logits", "out", "pred_logits", "cls_logits", "class_queries_logits", "predicted_depth", "reconstruction",
    "image_embeds", "pooler_output", "last_hidden_state",
)  # fmt: skip
ONE_TENSOR = "logits"  # the name of an output that has none, since it is all that the model returns


@dataclass(frozen=True)
class Outputs:
    """The outputs of a run in the order of the graph, the primary one first.

    Attributes:
        tensors: names and tensors in the order of the graph.
        order: for each of them its number in the tree that the module returns.
        tree: what the module returns, with a Slot in place of each tensor that holds its number in the graph.
        notes: which output was taken, where that is a choice.
    """

    tensors: tuple[tuple[str, Tensor], ...]
    order: tuple[int, ...]
    tree: Any
    notes: tuple[str, ...]


def outputs_in_order(result: Any, kind: str, asked: str | None, taken: Collection[str] = ()) -> Outputs:
    """The outputs that a module of the class `kind` returned. Raises CaptureError.

    `asked` is the path of the primary output; None takes the one with a usual name, or the first. Paths that are equal,
    or that are in `taken` since an input has the name, get a number behind them: names are unique in an ONNX file.
    """
    tree, tensors = flattened(result)
    names = _unique([name or ONE_TENSOR for name, _ in tensors], taken)
    if not tensors:
        raise CaptureError(f"{kind} returns {type(result).__name__} without tensors; it must return at least one")
    first, notes = _primary(names, kind, asked)
    order = (first, *(index for index in range(len(tensors)) if index != first))
    slots = [Slot(order.index(index)) for index in range(len(tensors))]
    return Outputs(
        tuple((names[index], tensors[index][1]) for index in order),
        order,
        rebuilt(tree, slots),
        notes,
    )


def _unique(names: Sequence[str], taken: Collection[str]) -> list[str]:
    """The names; one that is taken already gets the first free number behind it."""
    unique: list[str] = []
    for name in names:
        used = {*taken, *unique, *names}
        free = (f"{name}_{number}" for number in count(1))
        unique.append(name if name not in {*taken, *unique} else next(one for one in free if one not in used))
    return unique


def _primary(names: Sequence[str], kind: str, asked: str | None) -> tuple[int, tuple[str, ...]]:
    """The number of the primary output, and a note if it is a choice of ours."""
    if asked is not None:
        if asked not in names:
            near = did_you_mean(asked, names)
            raise CaptureError(f"{kind} has no output {asked!r}; its outputs are {', '.join(names)}{near}")
        return names.index(asked), ()
    if len(names) == 1:
        return 0, ()
    for usual in USUAL_NAMES:
        found = [index for index, name in enumerate(names) if name.split(".")[-1] == usual]
        if found:
            return found[0], (_note(names, found[0]),)
    return 0, (_note(names, 0),)


def _note(names: Sequence[str], chosen: int) -> str:
    others = [name for index, name in enumerate(names) if index != chosen]
    listed = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    return (
        f"the model has {len(names)} outputs; accuracy, agreement and distillation are those of {names[chosen]} "
        f"(--output-name chooses another: {listed})"
    )
