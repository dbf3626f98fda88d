"""Progress and log lines on standard error. Only the command line configures logging."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from mpcompile.system.progress import Progress


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """An observer that shows progress on standard error: bars on a terminal, else one line for each stage.

    Yields None if `quiet`.
    """
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield lambda at: typer.echo(str(at), err=True) if at.step is None else None
    else:
        with _bars() as show:
            yield show


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        stage_bar = bars.add_task("", total=None)
        step_bar = bars.add_task("", total=None, visible=False)

        def show(at: Progress) -> None:
            bars.update(stage_bar, description=at.stage, completed=at.number - 1, total=at.stages)
            name, visible = f"  {at.step}", at.step is not None
            bars.update(step_bar, description=name, completed=at.done, total=at.total, visible=visible)

        yield show


def configure_logging(verbose: int, quiet: bool) -> None:
    """Sends the package's log to standard error: errors if `quiet`, else warnings, info (1) or everything (2)."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("torch").setLevel(logging.ERROR)  # its exporter warns about operators that no model here uses
    logger = logging.getLogger("mpcompile")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
