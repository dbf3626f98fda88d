"""Which axes a reshape merges and splits."""

from collections.abc import Iterator, Sequence


def reshape_groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
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
