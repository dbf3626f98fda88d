"""Comparison of a whole model, dense and with its compressed part, on the same images: every output that it returns.

Outputs are compared as numbers. If the model returns one row of class scores for each image, its answers and its
accuracy are compared too. The outputs of a detector are compared on those images for which both return as many boxes.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.errors import ParityError
from mpcompile.frontend.primary_output import ONE_TENSOR
from mpcompile.ir.head import Head
from mpcompile.ir.output_tree import flattened
from mpcompile.measure.accuracy import accuracy
from mpcompile.measure.whole_difference import OutputDifference, WholeComparison

Outputs = tuple[Any, Any, Tensor]  # of the dense model, of the compressed one, and the labels of the images


def compare_whole(pairs: Iterable[Outputs], head: Head | None, labelled: bool, primary: str | None) -> WholeComparison:
    """The comparison over the outputs of both models, batch by batch. Raises ParityError if one is not finite.

    Args:
        pairs: for each batch the outputs of both models and its labels.
        head: how the output `primary` becomes a decision; None if it does not.
        labelled: whether the labels count.
        primary: the path of the output with class scores, one row for each image; None if there is none.
    """
    sums: dict[str, NDArray[np.float64]] = {}  # squared differences, squares of both, products
    images = comparable = 0
    decisions: list[tuple[NDArray[Any], NDArray[Any]]] = []
    answers: list[NDArray[np.int64]] = []
    for dense, compressed, labels in pairs:
        images += len(labels)
        sides = [dict(_finite(outputs)) for outputs in (dense, compressed)]
        if {name: one.shape for name, one in sides[0].items()} != {name: one.shape for name, one in sides[1].items()}:
            continue
        comparable += len(labels)
        for name, one in sides[0].items():
            other = sides[1][name]
            found = [((other - one) ** 2).sum(), (one**2).sum(), (other**2).sum(), (one * other).sum()]
            sums[name] = sums.get(name, np.zeros(4)) + np.asarray(found)
        if primary is not None:
            decisions.append((sides[0][primary], sides[1][primary]))
            answers.append(labels.numpy())
    rows = tuple(_difference(name, *map(float, values)) for name, values in sums.items())
    if head is None or not decisions:
        return WholeComparison(images, comparable, rows)
    before, after = (np.concatenate(side) for side in zip(*decisions, strict=True))
    truth = np.concatenate(answers)
    return WholeComparison(
        images,
        comparable,
        rows,
        float(head.same(before, after).mean()),
        accuracy(before, truth, head) if labelled else None,
        accuracy(after, truth, head) if labelled else None,
    )


def _finite(outputs: Any) -> list[tuple[str, NDArray[np.float64]]]:
    """The tensors of what a model returned, by path, in float64."""
    found = [(name or ONE_TENSOR, one.double().numpy(force=True)) for name, one in flattened(outputs)[1]]
    for name, values in found:
        if not np.isfinite(values).all():
            raise ParityError(f"the whole model returns numbers that are not finite in {name} on held-out images")
    return found


def _difference(name: str, squared: float, dense: float, compressed: float, product: float) -> OutputDifference:
    """The row of an output; an output that is zero in both models does not differ."""
    if dense == 0 or compressed == 0:
        same = dense == compressed
        return OutputDifference(name, 0.0 if same else 1.0, 1.0 if same else 0.0)
    return OutputDifference(name, (squared / dense) ** 0.5, product / (dense * compressed) ** 0.5)
