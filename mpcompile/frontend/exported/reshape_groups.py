"""Which axes a reshape merges and splits, and which one of them holds the batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Group = tuple[list[int], list[int]]


def reshape_groups(before: Sequence[int], after: Sequence[int]) -> Iterator[Group]:
    """The smallest runs of axes before and after a reshape that hold the same elements.

    (2, 197, 192) -> (2, 197, 3, 64) gives ([0], [0]), ([1], [1]), ([2], [2, 3]). Axes of size 1 that are left over
    belong to the last run.
    """
    i = j = 0
    while i < len(before) and j < len(after):
        inputs, outputs, left, right = [i], [j], before[i], after[j]
        while left != right:
            if left < right and inputs[-1] + 1 < len(before):
                inputs.append(inputs[-1] + 1)
                left *= before[inputs[-1]]
            elif right < left and outputs[-1] + 1 < len(after):
                outputs.append(outputs[-1] + 1)
                right *= after[outputs[-1]]
            else:
                return
        i, j = inputs[-1] + 1, outputs[-1] + 1
        if i == len(before):
            outputs.extend(range(j, len(after)))
            j = len(after)
        elif j == len(after):
            inputs.extend(range(i, len(before)))
            i = len(before)
        yield inputs, outputs


@dataclass(frozen=True, slots=True)
class BatchAxis:
    """The axis after a reshape that holds the batch.

    An axis of size `outer · batch · inner` holds, for each of `outer` positions, the images, and for each of these
    `inner` values.
    """

    axis: int
    outer: int


def batch_axis(
    before: Sequence[int], after: Sequence[int], grows: int, outer: int, batch: int
) -> tuple[BatchAxis, Group] | None:
    """The axis that holds the batch after a reshape, and the axes that are merged and split with it.

    `grows` is the axis that holds it before, `outer` its BatchAxis.outer. None if no axis can hold it.
    With a batch of 1, axes of size 1 belong to the run before or after them. Then an axis that begins exactly where
    the batch begins is preferred, and the last axis, which holds channels, is the last choice.
    """
    groups = list(reshape_groups(before, after))
    index = next((index for index, (inputs, _) in enumerate(groups) if grows in inputs), None)
    if index is None:
        return None
    inputs, outputs = groups[index]
    begins = outer * math.prod(before[axis] for axis in inputs if axis < grows)
    candidates = list(_candidates(after, outputs, begins, batch))
    if batch == 1 < begins and index + 1 < len(groups) and begins * batch == math.prod(after[axis] for axis in outputs):
        following = groups[index + 1][1]
        if after[following[0]] == 1:  # as in (tokens · 1, c) -> (tokens, 1, c)
            candidates.insert(0, BatchAxis(following[0], 1))
    if batch == 1 and index and inputs[0] == grows and outputs[0] == len(after) - 1:
        earlier_in, earlier_out = groups[index - 1]  # as in (tokens, 1, heads, d) -> (tokens · 1, c)
        size = math.prod(after[axis] for axis in earlier_out)
        return BatchAxis(earlier_out[-1], size), ([*earlier_in, grows], earlier_out)
    best = max(candidates, key=lambda found: found.outer == 1, default=None)
    return None if best is None else (best, (inputs, outputs))


def _candidates(after: Sequence[int], outputs: Sequence[int], begins: int, batch: int) -> Iterator[BatchAxis]:
    """The axes of a run that can hold a batch which begins after `begins` positions."""
    passed = 1
    for axis in outputs:
        if begins % passed == 0 and (passed * after[axis]) % (begins * batch) == 0:
            yield BatchAxis(axis, begins // passed)
        passed *= after[axis]
