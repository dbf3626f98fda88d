"""The multiply-accumulates of a dense and of a compressed model, by both conventions."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Charged:
    """Multiply-accumulates (MACs) of one image. Zeros of patterns are not counted, even if no kernel skips them.

    Attributes:
        dense: the dense model.
        compressed: the compressed model, exact count.
        as_published: the compressed model by the paper's convention: each block with the tokens that enter it.
        merging: token merging itself (matching and averaging tokens); not part of the other counts.
        tokens: the tokens that enter each attention, then those that leave the last; empty without attention.
        merged: the tokens that token merging removes after each attention.
    """

    dense: float
    compressed: float
    as_published: float
    merging: float
    tokens: tuple[int, ...]
    merged: tuple[int, ...]
