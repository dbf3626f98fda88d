"""Which architectures can be captured, masked at 2:4 and exported -> results/capture.{json,md}.

    python benchmarks/capture.py [--names PATTERN …] [--jobs N] [--no-onnx]

Weights are random, and sizes are reduced where the constructor allows it, since capture depends on neither. Each model
is captured twice from one instance, masked by magnitude without images, and exported to ONNX. A model counts as
captured if capturing leaves it unchanged and the graph gives all of its outputs on other images and on another batch
size. The ONNX file is compared with the masked graph on two batch sizes. Each model runs in a process of its own.

`--names` takes shell patterns, such as 'timm/*' or '*Swin*', and keeps the rows of the other architectures.
`--no-onnx` leaves the export out, which takes most of the time. The files are written after each model.
"""

import argparse
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

from lib.common import RESULTS, markdown, rows_of, write
from lib.isolated import isolated
from lib.zoo import zoo

SCRIPT = "benchmarks/capture.py"
QUESTION = "Which architectures can be captured, how many of their layers can be masked at 2:4, and is the ONNX equal?"
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime")
LIMIT_S = 300.0
COLUMNS = (
    "architecture",
    "captured by",
    "parity",
    "other batch sizes",
    "layers",
    "eligible for 2:4",
    "masked",
    "ONNX equal",
    "seconds",
    "reason",
)


def attempt(task: tuple[str, bool]) -> dict[str, Any]:
    """The row of one architecture, in this process; `task` is its name, and whether it is exported."""
    import logging

    import torch
    from lib.capture_trial import trial

    warnings.simplefilter("ignore")  # the libraries' own deprecations
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    name, onnx = task
    return trial(name, zoo()[name], onnx=onnx)


def row_of(name: str, onnx: bool) -> dict[str, Any]:
    """The row of one architecture, from a process of its own."""
    row: dict[str, Any] = {"name": name, "captured": False} | isolated(attempt, (name, onnx), LIMIT_S)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of all rows."""
    return markdown(COLUMNS, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    parity = max(row.get("parity_images", 0.0), row.get("parity_batch", 0.0))
    return (
        row["name"],
        row.get("way", "") if row["captured"] else "**no**",
        f"{parity:.0e}" if row["captured"] and parity else "exact" if row["captured"] else "",
        _yes(row.get("batch_free")),
        *(str(row.get(key, "")) for key in ("layers", "eligible", "masked")),
        _yes(row.get("onnx")),
        f"{row['seconds']:.0f}" if "seconds" in row else "",
        _short(row["reason"] or "").replace("|", "\\|"),
    )


def _yes(value: bool | None) -> str:
    return {None: "", True: "yes", False: "**no**"}[value]


def _short(reason: str) -> str:
    return reason if len(reason) <= 240 else f"{reason[:239]}…"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many of the architectures are taken, masked and exported."""
    captured = [row for row in rows if row["captured"]]
    masked = [row for row in captured if row.get("masked")]
    tried = [row for row in captured if "onnx" in row]
    equal = sum(row["onnx"] for row in tried)
    return (
        f"{len(captured)} of {len(rows)} architectures are captured. {len(masked)} of these have layers that take "
        f"2:4; the others have no eligible layer. {len(tried)} were exported to ONNX; {equal} of these files equal the "
        "masked graph on two batch sizes."
    )


def main(words: list[str]) -> None:
    """Writes both results files; with --names, the rows of other architectures stay as they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", nargs="+", metavar="PATTERN", help="architectures to run (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="models that run at the same time (default: 1)")
    parser.add_argument("--no-onnx", action="store_true", help="leave the export to ONNX out")
    options = parser.parse_args(words)
    names = list(zoo())
    chosen = [n for n in names if options.names is None or any(fnmatchcase(n, one) for one in options.names)]
    if not chosen:
        raise SystemExit(f"no architecture matches {' '.join(options.names)}; one of them is {names[0]}")
    rows = {row["name"]: row for row in rows_of("capture")}
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda name: row_of(name, not options.no_onnx), chosen):
            print(
                f"{row['name']}: {'captured' if row['captured'] else 'NOT CAPTURED'} {row['reason'] or ''}", flush=True
            )
            rows[row["name"]] = row
            write_both([rows[name] for name in names if name in rows])


def write_both(rows: list[dict[str, Any]]) -> None:
    """Writes results/capture.json and results/capture.md."""
    write("capture", QUESTION, "cpu", LIBRARIES, rows)
    text = f"# Capture\n\n{summary(rows)} Source: `{SCRIPT}`.\n\n{table(rows)}"
    (RESULTS / "capture.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
