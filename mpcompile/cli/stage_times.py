"""The times of a run: how long each stage took, and how fast the steps of the current one go."""

from collections.abc import Callable
from dataclasses import dataclass, field

from mpcompile.system.progress import PARTS, Progress

SHOWN = 0.02  # the least share of the whole time for which a stage is named in the summary
LEAST_SECONDS = 1.0  # of steps, before their rate is told


@dataclass(frozen=True, slots=True)
class Loop:
    """Steps of one kind that follow each other: when they began, with how many done, and where they are."""

    began: float
    first: int
    at: Progress

    def pace(self, now: float) -> str:
        """The rate and the time to go, such as `3.1/s, 0:19 left`; empty until a step has taken its time.

        It is empty for parts of unequal length, too.
        """
        done, seconds = self.at.done - self.first, now - self.began
        if not done or seconds < LEAST_SECONDS or self.at.unit == PARTS:
            return ""
        rate, left = done / seconds, (self.at.total - self.at.done) * seconds / done
        speed = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        return f"{speed}, {clock(left)} left"


@dataclass(slots=True)
class StageTimes:
    """Receives the steps of a run, and keeps the times of its stages. `now` returns seconds."""

    now: Callable[[], float]
    began: float = field(init=False)
    ended: float | None = None
    stages: list[tuple[str, float]] = field(default_factory=list)  # each stage with the time when it began
    loops: list[Loop] = field(
        default_factory=list
    )  # of the current stage; a loop within a step follows that of the step

    def __post_init__(self) -> None:
        """Starts the clock."""
        self.began = self.now()

    def note(self, at: Progress) -> None:
        """Takes a stage or a step that begins; what a stage found takes no time."""
        if at.found is not None:
            return
        now = self.now()
        if at.step is None:
            self.stages.append((at.stage, now))
            self.loops.clear()
            return
        del self.loops[at.depth + 1 :]
        if at.depth < len(self.loops):
            loop = self.loops.pop()
            same = (loop.at.total, loop.at.unit) == (at.total, at.unit) and loop.at.done < at.done
            self.loops.append(Loop(loop.began, loop.first, at) if same else Loop(now, at.done, at))
        else:
            self.loops.append(Loop(now, at.done, at))

    def elapsed(self) -> float:
        """Seconds since the start."""
        return (self.now() if self.ended is None else self.ended) - self.began

    def finish(self) -> None:
        """Stops the clock."""
        self.ended = self.now()

    def summary(self) -> str:
        """Where the time went, as a sentence: `1:23 min in all: reconstruct 45 s, time 20 s, others 18 s`."""
        whole = self.elapsed()
        ends = [*(began for _, began in self.stages), self.began + whole][1:]
        seconds: dict[str, float] = {}
        for (stage, began), end in zip(self.stages, ends, strict=True):
            seconds[stage] = seconds.get(stage, 0.0) + end - began
        named = sorted(((took, stage) for stage, took in seconds.items() if took >= SHOWN * whole), reverse=True)
        texts = [f"{stage} {duration(took)}" for took, stage in named]
        others = whole - sum(took for took, _ in named)
        if len(named) < len(seconds):
            texts.append(f"others {duration(others)}")
        return f"{duration(whole)} in all{': ' if texts else ''}{', '.join(texts)}"


def clock(seconds: float) -> str:
    """Minutes and seconds, `0:19`, or hours, minutes and seconds, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """A time for a sentence: `0.4 s`, `12 s`, `1:23 min`, `1:02:03 h`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{clock(seconds)} {'h' if round(seconds) >= 3600 else 'min'}"
