"""Progress of a run, from inside a pass to the caller, without an argument through every call.

`compile`, `analyze` and `bench` take `observe=`, a function that is called with a Progress at the start of each stage
and of each step within it. In a pass, `for name in tracked(names): ...` reports the steps. The listener is stored in a
context variable, so that two runs in one process do not receive each other's steps. Without a listener nothing happens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]  # current step, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Progress:
    """The position of a run: stage `stage`, number `number` of `stages`, counted from 1.

    Within a stage that reports steps, `step` is the current one and `done` of `total` are finished. At the start of a
    stage, `step` is None.
    """

    stage: str
    number: int
    stages: int
    step: str | None = None
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        within = "" if self.step is None else f": {self.step} ({self.done + 1} of {self.total})"
        return f"[{self.number}/{self.stages}] {self.stage}{within}"


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


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
    at = Progress("", 0, len(stages))

    def begin(stage: str) -> None:
        nonlocal at
        ahead = list(stages[at.number :])
        number = at.number + (ahead.index(stage) + 1 if stage in ahead else 0)
        at = Progress(stage, max(number, 1), len(stages))
        observe(at)

    with listening(lambda step, done, total: observe(replace(at, step=step, done=done, total=total))):
        yield begin


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` for every step of `tracked` inside the block; for a PassManager that is used directly."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tracked(items: Collection[T], label: Callable[[T], str] = str) -> Iterator[T]:
    """Yields the items; reports each to the listener before it is yielded."""
    listener = _listener.get()
    for done, item in enumerate(items):
        if listener is not None:
            listener(label(item), done, len(items))
        yield item
