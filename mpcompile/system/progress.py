"""Progress of a run, from inside a pass to the caller, without an argument through every call.

`compile`, `analyze` and `bench` take `observe=`, a function that is called with a Progress at the start of each stage
and of each step within it. In a pass, `for name in tracked(names, unit="layers"): ...` reports the steps. The listener
is stored in a context variable, so that two runs in one process do not receive each other's steps. Without a listener
nothing happens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")
PARTS = "parts"  # the unit of steps that take unequal times, from which no time to go follows
Listener = Callable[[str, int, int], None]  # current step, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Progress:
    """The position of a run: stage `stage`, number `number` of `stages`, counted from 1.

    Within a stage that reports steps, `step` is the current one, and `done` of `total` layers, images or the like
    (`unit`) are finished. At the start of a stage, `step` is None. Steps within a step, such as the images of a layer,
    have `depth` 1, steps within these 2.

    A stage that finds something before it ends, such as a search that has tried a recipe, reports it as `found`, in a
    copy of its current step.
    """

    stage: str
    number: int
    stages: int
    step: str | None = None
    done: int = 0
    total: int = 0
    unit: str = "steps"
    depth: int = 0
    found: object = None

    def __str__(self) -> str:
        within = "" if self.step is None else f": {self.step} ({self.done + 1} of {self.total})"
        return f"[{self.number}/{self.stages}] {self.stage}{within}"


# What hears of each step; the stage is not known here and left empty.
_heard: ContextVar[Callable[[Progress], None] | None] = ContextVar("heard", default=None)
_depth: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def stage_progress(
    observe: Callable[[Progress], None] | None, stages: Sequence[str]
) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with each stage's name as it begins; calls `observe` for stages and their steps.

    Stages begin in the order of `stages`; some may be skipped. A stage that is not in `stages` (a tuned recipe may add
    one) keeps the number of the stage before it. Without `observe` nothing is reported, and an outer listener stays.
    """
    if observe is None:
        yield lambda stage: None
        return
    at = last = Progress("", 0, len(stages))

    def begin(stage: str) -> None:
        nonlocal at, last
        ahead = list(stages[at.number :])
        number = at.number + (ahead.index(stage) + 1 if stage in ahead else 0)
        at = last = Progress(stage, max(number, 1), len(stages))
        observe(at)

    def heard(step: Progress) -> None:
        nonlocal last
        last = replace(last, found=step.found) if step.found is not None else step
        observe(replace(last, stage=at.stage, number=at.number, stages=at.stages))

    with _hearing(heard):
        yield begin


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` for every step of `tracked` inside the block; for a PassManager that is used directly."""

    def heard(at: Progress) -> None:
        if at.found is None:
            listener(at.step or "", at.done, at.total)

    with _hearing(heard):
        yield


def report_found(found: object) -> None:
    """Reports what the current stage has found so far, within the loop of its steps."""
    hear = _heard.get()
    if hear is not None:
        hear(Progress("", 0, 0, found=found))


@contextmanager
def _hearing(hear: Callable[[Progress], None]) -> Iterator[None]:
    """Calls `hear` for every step inside the block."""
    tokens = _heard.set(hear), _depth.set(0)
    try:
        yield
    finally:
        _heard.reset(tokens[0])
        _depth.reset(tokens[1])


def tracked(
    items: Collection[T],
    label: Callable[[T], str] = str,
    unit: str = "steps",
    amount: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yields the items; reports each to the listener before it is yielded.

    `unit` names what is counted, in the plural, and an item counts for `amount` of them: a batch for its images. Use
    PARTS if the items take unequal times.
    """
    hear = _heard.get()
    if hear is None:
        yield from items
        return
    depth, done, total = _depth.get(), 0, sum(map(amount, items))
    try:
        for item in items:
            _depth.set(depth)
            hear(Progress("", 0, 0, label(item), done, total, unit, depth))
            _depth.set(depth + 1)
            yield item
            done += amount(item)
    finally:
        _depth.set(depth)
