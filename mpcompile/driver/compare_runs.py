"""compare_runs: several output folders side by side, from their reports alone."""

from collections.abc import Sequence
from pathlib import Path

from mpcompile.driver.read_report import read_checked_report
from mpcompile.errors import ConditionError, UsageError
from mpcompile.report.compared_page import compared_html
from mpcompile.report.compared_runs import compared
from mpcompile.report.compared_schema import ComparedRuns
from mpcompile.report.conditions import parse_condition


def compare_runs(folders: Sequence[str | Path], fail_if: Sequence[str] = ()) -> ComparedRuns:
    """The comparison of one or more output folders. It reads report.json and runs nothing.

    `fail_if` are conditions such as `top1 < dense - 0.5` (mpcompile/report/conditions.py), which are checked on every
    folder; `require_conditions` raises if one is true. Raises UsageError for a condition that is not understood, and
    LoadError for a folder without a readable report.
    """
    conditions = [parse_condition(text) for text in fail_if]
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise UsageError("no output folder was given; give one or more, such as out/")
    if twice := {str(path) for path in paths if paths.count(path) > 1}:
        raise UsageError(f"{', '.join(sorted(twice))} is there twice; give different output folders")
    return compared([str(path) for path in paths], [read_checked_report(path) for path in paths], conditions)


def require_conditions(found: ComparedRuns) -> None:
    """Raises ConditionError if a condition is true, or cannot be checked because its metric was not measured."""
    failed = sum(row.state != "holds" for row in found.conditions)
    if failed:
        raise ConditionError(
            f"{failed} of {len(found.conditions)} checks of --fail-if failed; the lines above say by how much"
        )


def write_page(found: ComparedRuns, path: Path) -> None:
    """Writes the comparison as one HTML page. Raises UsageError if the file cannot be written."""
    try:
        path.write_text(compared_html(found), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; give another file with --html") from error
