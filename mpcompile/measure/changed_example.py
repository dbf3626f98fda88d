"""A held-out image whose decision the compression changed."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChangedExample:
    """A held-out image whose decision changed.

    `index` counts the held-out images from 0. `dense` and `compressed` are the decisions, with their margins in the
    unit of the outputs, as the quarters of the agreement have them (mpcompile/measure/margin_agreement.py). `label` is
    None if the images have none. `thumbnail` is the image as a data URI; None for inputs that are no picture.
    """

    index: int
    label: int | None
    dense: int
    compressed: int
    dense_margin: float
    compressed_margin: float
    thumbnail: str | None = None
