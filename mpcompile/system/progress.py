"""Progress: how far a run is, from deep inside a pass to whoever shows it, without an argument through every call.

`compile`, `analyze` and `bench` take `observe=`, a function that is called with a Progress: at the beginning of each
stage, and of each step within one. In a pass, `for name in tracked(names): ...` makes the steps. The listener belongs
to the context of the caller (`contextvars`), so that two runs in one process do not hear each other; where nobody
listens, nothing happens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]  # what is being worked on, how many are done, of how many


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: in stage `number` of `stages`, counted from 1, whose name is `stage`.

    Where the stage tells its steps, `step` is the one being worked on, `done` are finished, of `total`; `step` is None
    where the stage itself begins.
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
def reported(observe: Callable[[Progress], None] | None, stages: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each stage as it begins; inside, `observe` is told of these and their steps.

    The names are told in the order of `stages`; some may be left out, and one that is not there, as a tuned recipe may
    have, counts with the one before it. Without `observe` nothing is told, and
    whoever listens already goes on listening.
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
    """Inside, `listener` is told of every step that `tracked` makes: for a PassManager that is run by itself."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tracked(items: Collection[T], label: Callable[[T], str] = str) -> Iterator[T]:
    """The items, each announced before it is handed out."""
    listener = _listener.get()
    for done, item in enumerate(items):
        if listener is not None:
            listener(label(item), done, len(items))
        yield item
