"""What every benchmark file says of where it was run."""

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
    """Writes results/NAME.json: the question, where and when it was answered, and the rows.

    `versions` are of libraries that are not installed under one name.
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
    """The rows of results/NAME.json, none where there is no such file."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def commit() -> str:
    """The commit that was measured, with a plus where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
