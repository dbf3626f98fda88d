"""The table of `make demo`: the example dense and at 2:4, in fp32 and in int8 -> results/demo.{json,md}.

    python benchmarks/demo.py            # prints the table of the two output folders that `make demo` wrote
    python benchmarks/demo.py --write    # also writes the results files, from which tables.py takes README's table

Speeds are relative to the dense fp32 file, in the run of each output folder. "Dense int8" is, at each batch size, the
fastest dense int8 model of the int8 run: ours, or one of ONNX Runtime's own tools.
"""

import argparse
from typing import Any

from lib.common import RESULTS, ROOT, markdown, write

from mpcompile.driver.artifact import Artifact
from mpcompile.measure.timing import Speedup
from mpcompile.report.quantized_schema import Variant
from mpcompile.report.schema import Report

QUESTION = "What does the demo print: accuracy, size and speed of the example, dense and at 2:4, in fp32 and in int8?"
FOLDERS = {"fp32": "build/demo", "int8": "build/demo-int8"}
COLUMNS = ("", "dense fp32", "2:4 fp32", "dense int8", "2:4 int8")
NATIVE = "model.native.onnx"
Row = tuple[str, ...]


def table(fp32: Report, int8: Report) -> list[Row]:
    """The rows of the table, from the reports of the two runs."""
    assert fp32.comparison is not None
    assert int8.comparison is not None
    assert int8.quantized is not None
    dense, single, both = fp32.comparison.dense, fp32.comparison.compressed, int8.comparison.compressed
    [ours] = [row for row in int8.quantized.baselines if row.file]
    tops = (dense.top1 if dense else None, single.top1 if single else None, ours.top1, both.top1 if both else None)
    same = (fp32.comparison.agreement, ours.agreement, int8.comparison.agreement)
    rows: list[Row] = [
        ("top-1", *(_percent(value) for value in tops)),
        ("same answer as dense fp32", "", *(_percent(value) for value in same)),
        (
            "ONNX file",
            *(_size(fp32, name) for name in ("dense.onnx", "model.onnx")),
            *(_size(int8, name) for name in (ours.file, "model.onnx")),
        ),
    ]
    for n, (pair, quantized) in enumerate(zip(fp32.latency, int8.latency, strict=True)):
        batch, over_dense = pair.dense.batch, int8.quantized.over_fastest[n]
        fastest = _named(int8, over_dense.baseline)
        speeds = (pair.speedup, fastest.speedups[n], quantized.speedup)
        rows.append((f"batch {batch}, beside dense fp32", f"{pair.dense.p50_ms:.2f} ms", *map(_speed, speeds)))
        rows.append(
            (f"batch {batch}, beside dense int8", "", "", f"{fastest.timings[n].p50_ms:.2f} ms", _speed(over_dense))
        )
    return rows


def kernels(report: Report) -> str:
    """A sentence on the native kernels: how many masked layers run on them, or that the file with them is not there."""
    precision, masked = report.recipe.precision, len(report.verdicts)
    if any(row.name == NATIVE for row in report.files):
        native = sum(bool(row.chosen) for row in report.verdicts)
        return f"{precision}: {native} of {masked} masked layers run on the N:M kernel ({NATIVE})."
    return (
        f"{precision}: no {NATIVE}, because no file with the N:M kernel was significantly faster at every batch size. "
        "The file on ONNX Runtime's dense kernels was timed."
    )


def _named(report: Report, name: str) -> Variant:
    assert report.quantized is not None
    return next(row for row in report.quantized.baselines if row.name == name)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _size(report: Report, name: str | None) -> str:
    return next((f"{row.bytes / 1e6:.2f} MB" for row in report.files if row.name == name), "")


def _speed(speed: Speedup) -> str:
    """The ratio and its interval, and whether the difference is not significant."""
    interval = f"[{speed.interval[0]:.2f}, {speed.interval[1]:.2f}]"
    if speed.conclusion == "interval includes 1":
        return f"no difference {interval}"
    return f"{speed.ratio:.2f}× {interval}{'' if speed.significant else ', not significant'}"


def main() -> None:
    """Prints the table, and with --write writes both results files."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    fp32, int8 = (Artifact.open(ROOT / folder).report for folder in FOLDERS.values())
    rows, sentences = table(fp32, int8), [kernels(fp32), kernels(int8)]
    shown = markdown(COLUMNS, rows)
    print(f"\n{shown}", *sentences, sep="\n")
    if given.write:
        kept = ("comparison", "latency", "quantized", "files", "verdict")
        reports: dict[str, Any] = {
            name: {key: report.model_dump(mode="json")[key] for key in kept}
            for name, report in (("fp32", fp32), ("int8", int8))
        }
        result = {"table": rows, "kernels": sentences, **reports}
        write("demo", QUESTION, "CPUExecutionProvider", ("torch", "onnx", "onnxruntime"), [result])
        text = "\n".join(sentences)
        (RESULTS / "demo.md").write_text(f"# The demo\n\n{QUESTION}\n\n{shown}\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
