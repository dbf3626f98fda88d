"""Acceptance of native operators by the whole file, with the measured numbers given."""

from collections.abc import Callable

import pytest

from mpcompile.measure.timing import Speedup
from mpcompile.runtimes.native.whole_file import MOST_TRIALS, Loss, Names, accept, trials

SPEEDUPS = {"a": 1.2, "conv": 2.0, "b": 1.9, "c": 1.5, "d": 1.3}
FASTER, TIE, UNSURE, SLOWER = (1.04, 1.2), (0.98, 1.02), (1.01, 1.2), (0.8, 0.9)


def recorded(
    interval: Callable[[Names, int], tuple[float, float]],
) -> tuple[list[tuple[Names, int]], Callable[[Names, int], Speedup]]:
    """Returns a comparison whose intervals are given, and the list of its calls."""
    calls: list[tuple[Names, int]] = []

    def compare(names: Names, batch: int) -> Speedup:
        calls.append((names, batch))
        return Speedup(1.0, interval(names, batch), 15, "dense")

    return calls, compare


def test_all_operators_are_kept_if_the_file_is_faster_at_every_batch() -> None:
    calls, compare = recorded(lambda names, batch: FASTER)
    found = accept(SPEEDUPS, {"conv"}, (1, 8, 32), compare)
    assert found.kept == tuple(SPEEDUPS)
    assert found.dropped == {}
    assert calls == [(tuple(SPEEDUPS), batch) for batch in (1, 8, 32)]


@pytest.mark.parametrize("lost", [TIE, UNSURE, SLOWER])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_one_batch_at_which_the_file_is_not_significantly_faster_is_enough(
    lost: tuple[float, float], batch: int
) -> None:
    calls, compare = recorded(lambda names, at: lost if at == batch else FASTER)
    found = accept(SPEEDUPS, (), (1, 8, 32), compare)
    assert found.kept == ()
    assert found.dropped.keys() == SPEEDUPS.keys()
    assert {loss.batch for loss in found.dropped.values()} == {batch}
    assert {at for _, at in calls} == {at for at in (1, 8, 32) if at <= batch}


def test_operators_are_dropped_until_the_file_is_faster() -> None:
    calls, compare = recorded(lambda names, batch: FASTER if len(names) <= 2 else SLOWER if "conv" in names else TIE)
    found = accept(SPEEDUPS, {"conv"}, (1, 8), compare)
    assert found.kept == ("b", "c")
    assert [names for names, _ in calls] == [tuple(SPEEDUPS), ("a", "b", "c", "d"), ("b", "c"), ("b", "c")]
    # Each dropped operator has the last comparison that it was part of.
    assert found.dropped == {
        "conv": Loss(5, 1, Speedup(1.0, SLOWER, 15, "dense")),
        "a": Loss(4, 1, Speedup(1.0, TIE, 15, "dense")),
        "d": Loss(4, 1, Speedup(1.0, TIE, 15, "dense")),
    }


def test_the_number_of_trials_is_bounded() -> None:
    many = {str(number): float(number) for number in range(1000)}
    calls, compare = recorded(lambda names, batch: TIE)
    assert accept(many, (), (1, 8), compare).kept == ()
    assert [len(names) for names, _ in calls] == [1000, 500, 250, 125]
    assert len(calls) == MOST_TRIALS


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ((), [("a", "conv", "b", "c", "d"), ("conv", "b"), ("conv",)]),
        (("conv",), [("a", "conv", "b", "c", "d"), ("a", "b", "c", "d"), ("b", "c"), ("b",)]),
        (SPEEDUPS, [("a", "conv", "b", "c", "d"), ("conv", "b"), ("conv",)]),
    ],
)
def test_trials_drop_the_named_operators_and_then_the_slower_half(first: Names, expected: list[Names]) -> None:
    assert list(trials(SPEEDUPS, first)) == expected


def test_without_candidates_nothing_is_compared() -> None:
    calls, compare = recorded(lambda names, batch: FASTER)
    assert accept({}, (), (1, 8), compare).kept == ()
    assert calls == []
