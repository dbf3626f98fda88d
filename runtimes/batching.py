"""Running batches of any size on an engine that takes some sizes only."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def in_pieces(run: Run, images: NDArray[np.float32], smallest: int, largest: int) -> NDArray[np.float32]:
    """The logits of all images, in pieces of `smallest` to `largest`; the last image fills one too short."""
    count = len(images)
    if smallest <= count <= largest:
        return run(images)
    found = []
    for start in range(0, count, largest):
        piece = images[start : start + largest]
        short = max(smallest - len(piece), 0)
        padded = np.concatenate([piece, np.repeat(piece[-1:], short, axis=0)]) if short else piece
        found.append(run(np.ascontiguousarray(padded))[: len(piece)])
    return np.concatenate(found)
