"""Progress as bars on a terminal: one for the stages, and one for each loop of steps within the current stage.

A search shows its picture of accuracy against speed above the bars, with the recipes tried so far.

Lines that are printed or logged meanwhile appear above the bars: rich replaces sys.stdout and sys.stderr.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from mpcompile.cli.chart_text import drawn_for
from mpcompile.cli.stage_times import StageTimes, clock
from mpcompile.report.search_chart import tuning
from mpcompile.report.search_schema import Tuning
from mpcompile.system.progress import Progress

LOOPS = 3  # bars for loops within each other; deeper ones are not shown


class _Pace(ProgressColumn):
    """The position, the rate and the time to go of a loop; for the stages the time since the start."""

    def __init__(self, times: StageTimes) -> None:
        super().__init__(Column(no_wrap=True))
        self.times = times

    def render(self, task: Task) -> Text:
        depth = task.fields["depth"]
        if depth is None:
            return Text(f"{int(task.completed) + 1}/{task.total or 0:.0f}, {clock(self.times.elapsed())}")
        loops = tuple(self.times.loops)  # this runs in rich's thread
        if depth >= len(loops):
            return Text("")
        loop = loops[depth]
        pace = loop.pace(self.times.now())
        return Text(f"{loop.at.done}/{loop.at.total} {loop.at.unit}{', ' if pace else ''}{pace}")


class _BarsBelowPicture(Bars):
    """Bars below the picture of a search, while there is one."""

    search: Tuning | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The picture, then the bars."""
        if self.search is not None:
            yield drawn_for(self.console, tuning(self.search))
        yield from super().get_renderables()


@contextmanager
def bars(times: StageTimes) -> Iterator[Callable[[Progress], None]]:
    """Yields a function that shows a stage or a step that begins. The bars are gone after the block."""
    name = TextColumn(
        "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
    )
    columns = (name, BarColumn(bar_width=12), _Pace(times))
    with _BarsBelowPicture(*columns, console=Console(stderr=True), transient=True, expand=True) as shown:
        stage_bar = shown.add_task("", total=None, depth=None)
        loop_bars = [shown.add_task("", total=None, visible=False, depth=depth) for depth in range(LOOPS)]

        def show(at: Progress) -> None:
            if at.found is not None:
                shown.search = at.found if isinstance(at.found, Tuning) else None
                return
            if at.step is None:
                shown.search = None
            shown.update(stage_bar, description=at.stage, completed=at.number - 1, total=at.stages)
            for depth, bar in enumerate(loop_bars):
                if depth >= len(times.loops):
                    shown.update(bar, visible=False)
                    continue
                loop = times.loops[depth].at
                indented = f"{'  ' * (depth + 1)}{loop.step}"
                shown.update(bar, description=indented, completed=loop.done, total=loop.total, visible=True)

        yield show
