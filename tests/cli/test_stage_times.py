"""The times of stages and the pace of steps, by a clock that the test sets."""

from dataclasses import dataclass

import pytest

from mpcompile.cli.console import steps_so_far
from mpcompile.cli.stage_times import StageTimes, clock, duration
from mpcompile.system.progress import PARTS, Progress


@dataclass
class Clock:
    """A clock that the test sets."""

    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Run:
    """Stage times, and a clock that goes on before each step."""

    clock: Clock
    times: StageTimes

    def step(self, seconds: float, done: int, total: int, unit: str = "layers", depth: int = 0) -> list[str]:
        self.clock.seconds += seconds
        self.times.note(Progress("stage", 1, 2, f"step {done}", done, total, unit, depth))
        return steps_so_far(self.times)

    def stage(self, seconds: float, name: str) -> None:
        self.clock.seconds += seconds
        self.times.note(Progress(name, 1, 2))


@pytest.fixture
def run() -> Run:
    now = Clock()
    return Run(now, StageTimes(now))


def test_a_pace_is_told_once_steps_have_taken_their_time(run: Run) -> None:
    assert run.step(0, 0, 10) == ["0 of 10 layers"]
    assert run.step(0.5, 1, 10) == ["1 of 10 layers"]
    assert run.step(0.5, 2, 10) == ["2 of 10 layers, 2/s, 0:04 left"]
    run.clock.seconds += 7
    assert steps_so_far(run.times) == ["2 of 10 layers, 4 s each, 0:32 left"]  # a slow step lowers the pace


def test_no_pace_follows_from_parts_of_unequal_length(run: Run) -> None:
    run.step(0, 0, 4, PARTS)
    assert run.step(9, 1, 4, PARTS) == ["1 of 4 parts"]


def test_a_loop_that_was_resumed_counts_only_its_own_steps(run: Run) -> None:
    run.step(0, 6, 10)
    assert run.step(2, 8, 10) == ["8 of 10 layers, 1/s, 0:02 left"]


def test_loops_within_a_step_leave_its_pace_alone(run: Run) -> None:
    run.step(0, 0, 4)
    run.step(0, 0, 128, "images", 1)
    assert run.step(2, 64, 128, "images", 1) == ["0 of 4 layers", "64 of 128 images, 32/s, 0:02 left"]
    assert run.step(2, 1, 4) == ["1 of 4 layers, 4 s each, 0:12 left"]
    assert run.step(0, 0, 128, "images", 1) == ["1 of 4 layers, 4 s each, 0:12 left", "0 of 128 images"]


@pytest.mark.parametrize(("done", "total", "unit"), [(0, 10, "layers"), (3, 12, "layers"), (3, 10, "images")])
def test_another_loop_begins_anew(run: Run, done: int, total: int, unit: str) -> None:
    run.step(0, 0, 10)
    run.step(5, 2, 10)
    assert run.step(5, done, total, unit) == [f"{done} of {total} {unit}"]


def test_a_stage_ends_the_loops_of_the_one_before(run: Run) -> None:
    run.step(0, 0, 10)
    run.stage(0, "next")
    assert steps_so_far(run.times) == []


def test_the_summary_says_where_the_time_went(run: Run) -> None:
    for seconds, name in ((0.5, "load"), (1, "masks"), (60, "check"), (20, "masks"), (10, "write")):
        run.stage(seconds, name)
    run.clock.seconds += 0.25
    run.times.finish()
    run.clock.seconds += 1000
    assert run.times.summary() == "1:32 min in all: masks 1:10 min, check 20 s, others 1.8 s"


def test_a_summary_without_stages(run: Run) -> None:
    run.times.finish()
    assert run.times.summary() == "0.0 s in all"


@pytest.mark.parametrize(
    ("seconds", "as_clock", "as_duration"),
    [(0.04, "0:00", "0.0 s"), (9.96, "0:10", "10 s"), (59.6, "1:00", "1:00 min"), (3725.0, "1:02:05", "1:02:05 h")],
)
def test_times_are_written_alike(seconds: float, as_clock: str, as_duration: str) -> None:
    assert (clock(seconds), duration(seconds)) == (as_clock, as_duration)
