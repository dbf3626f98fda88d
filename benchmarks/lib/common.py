"""Results files: the measured rows with the commit, date and environment of the run; and Markdown tables of them."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpcompile.system.hardware import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def write(
    name: str,
    question: str,
    device: str,
    libraries: tuple[str, ...],
    rows: list[dict[str, Any]],
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Writes results/NAME.json (question, date, commit, environment, rows) and returns its path.

    The environment has the version of each of `libraries`, which are names of installed distributions. `versions` adds
    versions that cannot be looked up by such a name.
    """
    RESULTS.mkdir(exist_ok=True)
    content = {
        "question": question,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": environment({library: version(library) for library in libraries} | dict(versions or {}), device),
        "rows": rows,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def rows_of(name: str) -> list[dict[str, Any]]:
    """Returns the rows of results/NAME.json, or an empty list if there is no such file."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def commit() -> str:
    """Returns the abbreviated hash of the current commit, with a plus if files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def mean_and_range(values: Sequence[float], mean: str = "{:.3f}", ends: str | None = None) -> str:
    """Returns the mean, and [lowest, highest] if there are several values: "77.38 [77.0, 77.7]".

    `mean` and `ends` are the formats of the mean and of the other two; without `ends` they are the same.
    """
    ends = ends or mean
    spread = f" [{ends.format(min(values))}, {ends.format(max(values))}]" if len(values) > 1 else ""
    return mean.format(sum(values) / len(values)) + spread


def markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
