"""Calibration batches by rank of a process group, and second moments summed over the ranks.

Rank r of R runs the batches r, r + R, r + 2R …; batch b belongs to part b mod 4 of the images. With 1, 2 or 4 ranks all
batches of a part are those of one rank, in the same order, which sends its moments to the others: moments, masks and
weights have the same bits as with one process. With other numbers of ranks, several ranks have batches of a part, and
float64 sums round differently in their last bits.
"""

from collections.abc import Sequence

import torch

from mpcompile.passes.reconstruct.second_moments import SecondMoments
from mpcompile.system.distributed import all_gathered, all_reduced, share, tensor_of

PARTS = 4  # of the calibration images, for cross-validation


def own_batches(count: int) -> range:
    """The batches that this rank runs, of `count`."""
    here = share()
    return range(here.rank, count, here.size)


def shared(parts: Sequence[SecondMoments]) -> tuple[SecondMoments, ...]:
    """The moments of each part, summed over all ranks. Every rank must call it, with parts of the same layer."""
    return tuple(parts) if share().size == 1 else tuple(_summed(part) for part in parts)


def _summed(part: SecondMoments) -> SecondMoments:
    """The sum of one part over all ranks, relative to the shifts of the first rank that has any of its images."""
    known = all_gathered((part.count, part.shift_x.cpu(), part.shift_y.cpu()))
    having = [rank for rank, (count, *_) in enumerate(known) if count]
    if not having:
        return part
    first, count = having[0], sum(count for count, *_ in known)
    shift_x, shift_y = (shift.to(torch.empty(0).device) for shift in known[first][1:])
    if len(having) == 1:
        own = part if part.count else SecondMoments.of_none(shift_x, shift_y)
        return SecondMoments(count, shift_x, shift_y, *(tensor_of(first, one) for one in own.sums))
    own = part.about(shift_x, shift_y) if part.count else SecondMoments.of_none(shift_x, shift_y)
    return SecondMoments(count, shift_x, shift_y, *(all_reduced(one) for one in own.sums))
