"""Progress and log lines on standard error. Only the command line configures logging."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from mpcompile.cli.stage_times import StageTimes, clock
from mpcompile.system.progress import Progress

LINE_SECONDS = 10.0  # between the lines of one stage, where there are no bars


@dataclass(frozen=True, slots=True)
class Shown:
    """An observer that shows each step, and knows where the time went."""

    show: Callable[[Progress], None]
    times: StageTimes

    def __call__(self, at: Progress) -> None:
        """Takes a stage or a step that begins."""
        self.times.note(at)
        self.show(at)


@contextmanager
def progress(quiet: bool) -> Iterator[Shown | None]:
    """An observer that shows progress on standard error: bars on a terminal, else lines.

    Yields None if `quiet`.
    """
    if quiet:
        yield None
        return
    times = StageTimes(time.monotonic)
    try:
        if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            from mpcompile.cli.progress_bars import bars

            with bars(times) as show:
                yield Shown(show, times)
        else:
            yield Shown(_lines(times), times)
    finally:
        times.finish()


def show_times(observe: Shown | None) -> None:
    """Prints on standard output where the time of a run went; nothing without an observer."""
    if observe is not None:
        typer.echo(f"Time: {observe.times.summary()}.")


def _lines(times: StageTimes) -> Callable[[Progress], None]:
    """Prints a line for each stage with the time since the start, and within a stage one every LINE_SECONDS."""
    printed = times.elapsed()

    def show(at: Progress) -> None:
        nonlocal printed
        elapsed = times.elapsed()
        if at.found is not None:
            from mpcompile.report.search_schema import Tuning  # not at start-up: it imports numpy
            from mpcompile.report.sentences import last_tried

            if isinstance(at.found, Tuning):
                typer.echo(
                    f"[{at.number}/{at.stages}] {at.stage}, after {clock(elapsed)}; {last_tried(at.found)}", err=True
                )
                printed = elapsed
        elif at.step is None or elapsed - printed >= LINE_SECONDS:
            steps = "".join(f"; {text}" for text in steps_so_far(times))
            typer.echo(f"[{at.number}/{at.stages}] {at.stage}, after {clock(elapsed)}{steps}", err=True)
            printed = elapsed

    return show


def steps_so_far(times: StageTimes) -> list[str]:
    """The loops of the current stage as texts, such as `12 of 72 layers, 3.1/s, 0:19 left`."""
    now = times.now()
    texts = [(f"{loop.at.done} of {loop.at.total} {loop.at.unit}", loop.pace(now)) for loop in times.loops]
    return [f"{position}, {pace}" if pace else position for position, pace in texts]


class _CurrentStderr(logging.Handler):
    """Writes to what sys.stderr is when a line is logged: while there are bars, rich prints it above them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # as in logging.StreamHandler: a line that cannot be written does not end the run
            self.handleError(record)


def configure_logging(verbose: int, quiet: bool) -> None:
    """Sends the package's log to standard error: errors if `quiet`, else warnings, info (1) or everything (2)."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("torch").setLevel(logging.ERROR)  # its exporter warns about operators that no model here uses
    logger = logging.getLogger("mpcompile")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
