"""Which axes a reshape merges and splits, and which one of them holds the batch."""

import pytest

from mpcompile.frontend.exported.reshape_groups import batch_axis, reshape_groups


@pytest.mark.parametrize(
    ("before", "after", "groups"),
    [
        ((2, 197, 192), (2, 197, 3, 64), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ((2, 197, 3, 64), (2, 197, 192), [([0], [0]), ([1], [1]), ([2, 3], [2])]),
        ((2, 8, 7, 8, 7, 4), (16, 7, 56, 4), [([0, 1], [0]), ([2], [1]), ([3, 4], [2]), ([5], [3])]),
        ((2, 8, 1, 1), (2, 8), [([0], [0]), ([1, 2, 3], [1])]),
        ((6,), (2, 3), [([0], [0, 1])]),
        ((2, 3), (4, 2), []),
    ],
)
def test_groups(before: tuple[int, ...], after: tuple[int, ...], groups: list[tuple[list[int], list[int]]]) -> None:
    assert list(reshape_groups(before, after)) == groups


@pytest.mark.parametrize(
    ("before", "after", "grows", "outer", "batch", "axis", "new_outer"),
    [
        ((2, 197, 192), (2, 197, 3, 64), 0, 1, 2, 0, 1),
        ((2, 4, 4, 9), (32, 9), 0, 1, 2, 0, 1),  # into windows
        ((32, 9), (2, 4, 4, 9), 0, 1, 2, 0, 1),  # and back
        ((17, 2, 64), (17, 8, 16), 1, 1, 2, 1, 1),  # heads of a sequence-first attention
        ((8, 17, 16), (2, 4, 17, 16), 0, 1, 2, 0, 1),
        ((17, 2, 4, 16), (34, 64), 1, 1, 2, 0, 17),
        ((34, 64), (17, 2, 64), 0, 17, 2, 1, 1),
        ((16, 64), (8, 2, 64), 0, 8, 2, 1, 1),  # 8 is a multiple of the batch too
        ((17, 1, 64), (17, 4, 16), 1, 1, 1, 1, 1),
        ((4, 17, 16), (1, 4, 17, 16), 0, 1, 1, 0, 1),
        ((17, 1, 4, 16), (17, 64), 1, 1, 1, 0, 17),
        ((17, 64), (17, 1, 64), 0, 17, 1, 1, 1),
        ((1, 4, 16), (1, 64), 1, 1, 1, 0, 1),  # one query that pools
        ((1, 16, 16), (1, 1, 256), 0, 1, 1, 0, 1),
    ],
)
def test_the_axis_of_the_batch(
    before: tuple[int, ...], after: tuple[int, ...], grows: int, outer: int, batch: int, axis: int, new_outer: int
) -> None:
    found = batch_axis(before, after, grows, outer, batch)
    assert found is not None
    assert (found[0].axis, found[0].outer) == (axis, new_outer)


def test_no_axis_can_hold_it() -> None:
    assert batch_axis((2, 3), (3, 2), 0, 1, 2) is None
    assert batch_axis((2, 3), (4, 2), 0, 1, 2) is None
