"""Runs a batch of any size on an engine that accepts only some batch sizes."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def in_pieces(run: Run, images: NDArray[np.float32], smallest: int, largest: int) -> NDArray[np.float32]:
    """Returns the logits of all images, run in batches of `smallest` to `largest`.

    A last batch that is too small is padded with its last image.
    """
    count = len(images)
    if smallest <= count <= largest:
        return run(images)
    logits = []
    for start in range(0, count, largest):
        piece = images[start : start + largest]
        missing = max(smallest - len(piece), 0)
        padded = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
        logits.append(run(np.ascontiguousarray(padded))[: len(piece)])
    return np.concatenate(logits)
