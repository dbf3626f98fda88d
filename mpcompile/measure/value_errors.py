"""Differences of outputs that are values without a decision (maps, boxes, embeddings): relative error and cosine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcompile.ir.parity import is_constant


@dataclass(frozen=True, slots=True)
class ValueErrors:
    """How far the outputs y′ of a compressed model are from the dense model's y, over images.

    The relative error of an image is ‖y′ − y‖₂ / ‖y‖₂ over all values of its output, and the cosine similarity is
    ⟨y, y′⟩ / (‖y‖₂ ‖y′‖₂). Where ‖y‖₂ is 0, the relative error is relative to the mean of ‖y‖₂ over the
    images (to 1 if that is 0), and the cosine similarity is 1 if y′ is 0 too, else 0.
    """

    relative_error_mean: float
    relative_error_p99: float
    relative_error_max: float
    cosine_mean: float
    cosine_min: float


@dataclass(frozen=True, slots=True)
class Norms:
    """Per image of one or several batches, (images,) each, in float64."""

    difference: NDArray[np.float64]  # ‖y′ − y‖₂
    dense: NDArray[np.float64]  # ‖y‖₂
    compressed: NDArray[np.float64]  # ‖y′‖₂
    product: NDArray[np.float64]  # ⟨y, y′⟩

    @classmethod
    def between(cls, dense: NDArray[np.floating], compressed: NDArray[np.floating]) -> "Norms":
        """The norms of two batches of outputs (b, …)."""
        y, found = (side.reshape(len(side), -1).astype(np.float64) for side in (dense, compressed))
        difference, before, after = (np.linalg.norm(one, axis=1) for one in (found - y, y, found))
        return cls(difference, before, after, np.einsum("bi,bi->b", y, found))


def value_errors(batches: Sequence[Norms]) -> ValueErrors:
    """The errors over the images of all batches, of which there is at least one image."""
    difference, dense, compressed, product = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("difference", "dense", "compressed", "product")
    )
    error = difference / np.where(dense > 0, dense, dense.mean() or 1.0)
    lengths = dense * compressed
    both_zero = (dense == 0) & (compressed == 0)
    cosine = np.where(lengths > 0, product / np.where(lengths > 0, lengths, 1.0), both_zero.astype(np.float64))
    cosine = np.clip(cosine, -1.0, 1.0)  # rounding
    return ValueErrors(
        relative_error_mean=float(error.mean()),
        relative_error_p99=float(np.percentile(error, 99)),
        relative_error_max=float(error.max()),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
    )


class ValueDifferences:
    """Collects, batch by batch, what a comparison of outputs that are values needs; it keeps no outputs but one."""

    def __init__(self) -> None:
        self.norms: list[Norms] = []
        self.shifts: list[NDArray[np.float64]] = []  # per image the largest |y′ − y| of a value
        self.ranges: list[NDArray[np.float64]] = []  # per image the largest minus the smallest value of y
        self._first: NDArray[np.floating] | None = None
        self._constant, self._count = True, 0

    def add(self, dense: NDArray[np.floating], compressed: NDArray[np.floating]) -> None:
        """Adds a batch of both models' outputs (b, …)."""
        self.norms.append(Norms.between(dense, compressed))
        y, found = (side.reshape(len(side), -1).astype(np.float64) for side in (dense, compressed))
        self.shifts.append(np.abs(found - y).max(axis=1))
        self.ranges.append(np.ptp(y, axis=1))
        self._first = dense[:1] if self._first is None else self._first
        self._constant = self._constant and is_constant(np.concatenate([self._first, dense]))
        self._count += len(dense)

    @property
    def constant(self) -> bool:
        """Whether the dense outputs of 2 or more images are the same, to rounding."""
        return self._constant and self._count > 1
