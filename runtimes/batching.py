"""Runs a batch of any size on an engine that accepts only some batch sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Run = Callable[..., NDArray[np.float32]]


def in_pieces(
    run: Run, images: NDArray[np.float32], smallest: int, largest: int, others: Sequence[NDArray[Any]] = ()
) -> NDArray[np.float32]:
    """Returns the logits of all images, run in batches of `smallest` to `largest`.

    `others` are further inputs of the model, with one row for each image. A last batch that is too small is padded with
    its last image.
    """
    count = len(images)
    if smallest <= count <= largest:
        return run(images, *others)
    logits = []
    for start in range(0, count, largest):
        taken = min(largest, count - start)
        pieces = (_padded(given[start : start + taken], smallest) for given in (images, *others))
        logits.append(run(*pieces)[:taken])
    return np.concatenate(logits)


def _padded(piece: NDArray[Any], smallest: int) -> NDArray[Any]:
    """The rows of a piece, the last one repeated if there are fewer than `smallest`."""
    missing = max(smallest - len(piece), 0)
    return np.ascontiguousarray(np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece)
