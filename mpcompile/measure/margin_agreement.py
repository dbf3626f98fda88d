"""Agreement by quartile of the dense model's margin: decisions that were close are the first to change."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.ir.head import Head, head_for
from mpcompile.ir.results import MarginQuartile
from mpcompile.measure.confidence import in_chunks
from mpcompile.measure.intervals import wilson_interval

QUARTILES = 4


def agreement_by_margin(
    dense: Tensor | NDArray[Any], compressed: Tensor | NDArray[Any], head: Head | None = None
) -> tuple[MarginQuartile, ...] | None:
    """The agreement in each quarter of the dense margins, lowest margins first; None for outputs that are values.

    Quarters differ by at most one decision; with fewer than four decisions there are as many as decisions.
    """
    before, after = torch.as_tensor(dense), torch.as_tensor(compressed)
    rule = head_for(head, before)
    if not rule.decides:
        return None
    margins = torch.cat([dense_margins(chunk, rule).flatten() for chunk in in_chunks(before)])
    order = margins.sort(stable=True).indices
    same = rule.same(before, after).flatten()
    return tuple(
        _quartile(margins[rows], same[rows], before.ndim == 2) for rows in order.tensor_split(QUARTILES) if len(rows)
    )


def dense_margins(dense: Tensor, head: Head) -> Tensor:
    """The margin of each decision, (images, …), in float64: for a softmax the largest output minus the second."""
    return head.margin(dense) * (2 if head.kind == "softmax" else 1)


def _quartile(margins: Tensor, same: Tensor, independent: bool) -> MarginQuartile:
    count, agreeing = len(margins), int(same.sum())
    interval = wilson_interval(agreeing, count) if independent else None
    return MarginQuartile(float(margins[0]), float(margins[-1]), count, agreeing, interval)
