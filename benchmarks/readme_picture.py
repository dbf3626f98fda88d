"""The chart of accuracy against speed in README -> docs/images/accuracy-speed.svg.

    python benchmarks/readme_picture.py                  # patterns on the trained example, results/fashion_vit.json
    python benchmarks/readme_picture.py out/report.json  # recipes that `mpcompile … --tune N -o out` tried

It is the chart of report.html. Without an argument, the dark dots are the patterns of PATTERNS: top-1 on the held-out
images, and the geometric mean of the speedups at all batch sizes. The grey dots are magnitude masks of the same
patterns without refit. They are drawn at the speed of the dark dots, since the time of a kernel depends only on the
pattern.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.common import RESULTS, ROOT

from mpcompile.measure.timing import Speedup
from mpcompile.report.chart import Chart, Dot, Label, Mark
from mpcompile.report.render import svg
from mpcompile.report.schema import Report
from mpcompile.report.search_chart import accuracy_speed, tuning
from mpcompile.report.search_schema import Point

PICTURE = ROOT / "docs" / "images" / "accuracy-speed.svg"
PATTERNS = ("2:4", "2:4x4", "16:32", "1:4")
LOWEST = -20.0  # lower end of the accuracy axis in percentage points; every pattern of the example is above it


def pattern_chart() -> Chart:
    """Returns the chart of the fp32 patterns in results/fashion_vit.json."""
    results = json.loads((RESULTS / "fashion_vit.json").read_text(encoding="utf-8"))
    shown = [row for row in results["rows"] if row["pattern"] in PATTERNS and row["precision"] == "fp32"]
    points = [_point(row, row["comparison"]["compressed"]["top1"]) for row in shown]
    magnitude = [replace(_point(row, row["top1_largest"]), name="") for row in shown]
    batches = " and ".join(str(pair["dense"]["batch"]) for pair in shown[0]["latency"])
    machine = f"{results['environment']['processor']}, {results['environment']['cores']} cores"
    speed = f"speedup over dense in ONNX Runtime, mean of batches {batches}, with 95 % interval; {machine}"
    chart = accuracy_speed(points, [point.name for point in points], magnitude, lowest=LOWEST, speed=speed)
    images = shown[0]["comparison"]["dense"]["count"]
    legend: list[Mark] = [
        Dot(70, 222, "compressed"),
        Label(80, 226, "permutation, joint masks and refit, without training (the defaults)"),
        Dot(70, 242, "dense"),
        Label(80, 246, "permutation, magnitude masks, no refit"),
    ]
    title = f"Change of top-1 in percentage points on {images:,} held-out images, against the speedup over dense"
    return replace(chart, title=title, marks=(*chart.marks, *legend))


def _point(row: dict[str, Any], top1: float) -> Point:
    """Returns the point of a pattern with this top-1, and the measured speedups of its row."""
    speedups = tuple(
        Speedup(speed["ratio"], tuple(speed["interval"]), speed["count"], speed["baseline"])
        for speed in (pair["speedup"] for pair in row["latency"])
    )
    drop = 100 * (row["comparison"]["dense"]["top1"] - top1)
    return Point(row["pattern"], drop=drop, speedups=speedups, holds=True)


def run_chart(path: Path) -> Chart:
    """Returns the chart of the recipe search in a report.json. Raises SystemExit if the report has no search."""
    report = Report.read(path.parent if path.is_file() else path)
    if report.tuning is None:
        raise SystemExit(f"{path} has no recipe search; run mpcompile with --tune 8 --max-drop 1")
    return tuning(report.tuning)


def main() -> None:
    """Writes the chart."""
    chart = run_chart(Path(sys.argv[1])) if len(sys.argv) > 1 else pattern_chart()
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg(chart), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
