"""Head: how a model's outputs become a decision, if they do, and how far they may move before it can change.

| kind | trained with | decision | margin |
|---|---|---|---|
| softmax | cross-entropy | the largest output | half of the largest output minus the second |
| sigmoid | binary cross-entropy, one output | whether the output exceeds the threshold | its distance to it |
| multilabel | binary cross-entropy, each output | which outputs exceed the threshold | the smallest distance |
| ordinal | a threshold for each rank (CORAL, CORN) | how many outputs exceed it | the smallest distance |
| values | any loss: maps, boxes, embeddings, depth | none | none |

The threshold is in the unit of the outputs: 0 for logits and 0.5 for probabilities, unless another one is asked for.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from numpy.typing import NDArray

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

Kind = Literal["softmax", "sigmoid", "multilabel", "ordinal", "values"]
KINDS: tuple[str, ...] = get_args(Kind)
Array = TypeVar("Array", "Tensor", NDArray[Any])


@dataclass(frozen=True, slots=True)
class Head:
    """The decision rule of a model's outputs (images, outputs).

    `threshold` is not used by softmax and values. `probabilities` says that outputs are probabilities and not logits.
    """

    kind: Kind = "softmax"
    threshold: float = 0.0
    probabilities: bool = False

    @property
    def decides(self) -> bool:
        """Whether outputs become a decision; if not, neither `decisions` nor a margin exist."""
        return self.kind != "values"

    def decisions(self, outputs: Array) -> Array:
        """The decision for each image: a class, 0 or 1, or a rank, (images,); for multilabel 0 or 1, (images, outputs).

        Outputs with more axes, such as maps, have a decision at each position. Raises ValueError for values.
        """
        if not self.decides:
            raise ValueError("outputs that are values have no decision")
        if self.kind == "softmax":
            classes: Array = outputs.argmax(1)
            return classes
        above: Array = outputs > self.threshold
        decided: Array = above[:, 0] * 1 if self.kind == "sigmoid" else above * 1
        return decided.sum(1) if self.kind == "ordinal" else decided

    def same(self, outputs: Array, others: Array) -> Array:
        """Whether the decisions of two models are the same, (images,). For multilabel, all outputs have to agree."""
        return self._equal(self.decisions(outputs), self.decisions(others))

    def right(self, outputs: Array, labels: Array) -> Array:
        """Whether the decisions are the labels, (images,). For multilabel, labels (images, outputs) have to agree."""
        return self._equal(self.decisions(outputs), labels)

    def _equal(self, ours: Array, others: Array) -> Array:
        equal: Any = ours == others
        result: Array = equal.all(1) if self.kind == "multilabel" else equal
        return result

    def margin(self, outputs: "Tensor") -> "Tensor":
        """For each image, a change of every output by less than this keeps the decision; (images,), float64."""
        if self.kind == "softmax":
            top = outputs.double().topk(2, dim=1).values
            return (top[:, 0] - top[:, 1]) / 2
        return (outputs.double() - self.threshold).abs().amin(1)

    def classes(self, outputs: int) -> int:
        """The number of different labels that one image can have: for multilabel the outputs, for values 0."""
        return {"sigmoid": 2, "ordinal": outputs + 1, "values": 0}.get(self.kind, outputs)

    def __str__(self) -> str:
        return {
            "softmax": "the largest output",
            "sigmoid": f"the output above {self.threshold:g}",
            "multilabel": f"each output above {self.threshold:g}",
            "ordinal": f"the number of outputs above {self.threshold:g}",
            "values": "no decision",
        }[self.kind]


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """The head that a recipe asks for: a kind or `auto`, and a probability as the threshold; None stands for 0.5."""

    kind: Kind | Literal["auto"] = "auto"
    probability: float | None = None

    @classmethod
    def parse(cls, text: str) -> "HeadChoice":
        """`auto`, a kind, or a kind with a threshold such as `sigmoid:0.3`. Raises ValueError."""
        kind, _, number = text.partition(":")
        wanted = f"give auto, {', '.join(KINDS)}, or one with a threshold, such as sigmoid:0.3"
        if kind not in ("auto", *KINDS):
            raise ValueError(f"the head {text!r} is not known; {wanted}")
        if not number and not text.endswith(":"):
            return cls(kind)  # type: ignore[arg-type]
        try:
            probability = float(number)
        except ValueError:
            probability = math.nan
        if not 0 < probability < 1 or kind in ("auto", "softmax", "values"):
            raise ValueError(f"the head {text!r} has no threshold between 0 and 1, or needs none; {wanted}")
        return cls(kind, probability)  # type: ignore[arg-type]

    def resolved(self, outputs: int, probabilities: bool) -> Head:
        """The head of a model with this number of outputs for each image, such as classes.

        `probabilities` says that the outputs are probabilities and not logits. `auto` takes one output for a sigmoid
        and several for a softmax. Raises ValueError if the kind does not fit the number of outputs.
        """
        kind = ("sigmoid" if outputs == 1 else "softmax") if self.kind == "auto" else self.kind
        if kind == "values":
            return Head("values")
        if kind == "softmax" and outputs == 1:
            raise ValueError("the head softmax needs 2 or more outputs, and the model has 1; give --head sigmoid")
        if kind == "sigmoid" and outputs > 1:
            raise ValueError(
                f"the head sigmoid needs one output, and the model has {outputs}; give --head multilabel or softmax"
            )
        if kind == "softmax":
            return Head(probabilities=probabilities)
        p = 0.5 if self.probability is None else self.probability
        return Head(kind, p if probabilities else math.log(p / (1 - p)), probabilities)


def head_for(head: Head | None, outputs: "Tensor | NDArray[Any]") -> Head:
    """The head of a model; if it is not known, by the shape of its outputs.

    (images, 1) are logits of a sigmoid, (images, outputs) those of a softmax, and any other shape has values.
    """
    if head is not None:
        return head
    return HeadChoice().resolved(outputs.shape[1], probabilities=False) if outputs.ndim == 2 else Head("values")
