"""Accuracy and measured CPU speed of each pattern -> results/cpu_choice.{json,md}.

    make bench-models; python benchmarks/cpu_choice.py [--models …] [--patterns …]

Each pattern gets the passes of `mpcompile MODEL --pattern N:M --data …`, without training: budget, permutation, joint
masks with refit, batch-norm correction. The ViT is the trained example. The CNN is EfficientNet-Lite0 with a linear
head for Fashion-MNIST at 96 pixels (benchmarks/lib/pretrained.py). Speed is that of target ort on one thread, relative
to the dense file in ONNX Runtime in the same run. A layer runs on the N:M kernel if it is measured to be faster there.
Rows are sorted by speed, so that patterns of equal speed are neighbours.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lib.pretrained as pretrained
import torch
from lib.common import RESULTS, ROOT, markdown, rows_of, write
from lib.cpu_timing import device_with_load, processor_with_load, speedup_cell
from torch import nn

from mpcompile import Recipe, compile
from mpcompile.data.images import Data
from mpcompile.frontend.load_model import Request, load
from mpcompile.runtimes import native

QUESTION = "At equal measured speed on a CPU, which pattern keeps the most accuracy?"
PATTERNS = ("2:4", "4:8", "8:16", "16:32", "12:32", "12:16", "1:4", "2:4x2", "2:4x4", "8:16x4", "16:32x4")
MODELS = ("fashion_vit", "efficientnet_lite0")
PIXELS = 96  # image size of the CNN
BATCHES = (1, 8)
COLUMNS = ("model", "pattern", "speed, batch 1", "speed, batch 8", "top-1", "logit shift", "MACs left", "on the kernel")


def model_of(name: str) -> tuple[nn.Module, Data]:
    """Returns the model of this name, and its images."""
    if name == "fashion_vit":
        loaded = load(Request(str(ROOT / "examples" / "fashion_vit" / "model.safetensors")))
        return loaded.module, pretrained.fashion_data(loaded.source)
    return pretrained.on_fashion(name, PIXELS)[0], pretrained.fashion_data()


def measure(name: str, module: nn.Module, data: Data, pattern: str, folder: Path) -> dict[str, Any]:
    """Compiles one model with one pattern, and returns its row."""
    passes = [{"mp-budget": {"patterns": [pattern], "null": False}}, "permute", "nm-mask", "batch-norm"]
    recipe = Recipe.checked({"passes": passes, "bench": {"batches": list(BATCHES), "threads": 1}})
    report = compile(module, recipe, data=data, output=folder / f"{name}-{pattern.replace(':', '_')}").report
    accuracy = report.comparison
    assert accuracy is not None
    assert accuracy.dense is not None
    assert accuracy.compressed is not None
    return {
        "model": name,
        "pattern": pattern,
        "dense_top1": accuracy.dense.top1,
        "top1": accuracy.compressed.top1,
        "images": accuracy.count,
        "agreement": accuracy.agreement,
        "logit_shift": accuracy.logit_shift_mean,
        "logit_range": accuracy.logit_range,
        "macs": report.cost.compressed / report.cost.dense,
        "layers": len(report.layers),
        "masked": sum(row.pattern is not None for row in report.layers),
        "native": sum(bool(row.chosen) for row in report.verdicts),
        "speedup": {str(pair.dense.batch): (pair.speedup.ratio, *pair.speedup.interval) for pair in report.latency},
        "dense_ms": {str(pair.dense.batch): pair.dense.p50_ms for pair in report.latency},
        "load": processor_with_load(),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the row as cells of the table."""
    return (
        row["model"],
        row["pattern"],
        *(speedup_cell(tuple(row["speedup"][str(batch)])) for batch in BATCHES),
        f"{row['top1']:.2%} of {row['dense_top1']:.2%}",
        f"{row['logit_shift']:.3f} of {row['logit_range']:.2f}",
        f"{row['macs']:.1%}",
        f"{row['native']} of {row['masked']} masked",
    )


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, help="models to measure; rows of other models are kept")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS, help="patterns to measure; other rows are kept")
    arguments = parser.parse_args()
    models, patterns = arguments.models, arguments.patterns
    if missing := native.missing():
        raise SystemExit(missing)
    torch.set_num_threads(1)
    rows = [row for row in rows_of("cpu_choice") if row["model"] not in models or row["pattern"] not in patterns]
    for name in models:
        module, data = model_of(name)
        for pattern in patterns:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(name, module, data, pattern, Path(folder)))
            print(cells(rows[-1]), flush=True)
            report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files with the rows measured so far."""
    rows = sorted(rows, key=lambda row: (MODELS.index(row["model"]), -row["speedup"]["8"][0]))
    write(
        "cpu_choice",
        QUESTION,
        processor_with_load(),
        ("torch", "timm", "onnx", "onnxruntime"),
        rows,
        {"N:M kernel": native.instruction_set()},
    )
    head = (
        f"# A pattern for a CPU\n\n{QUESTION}\n\nSpeed is relative to ONNX Runtime's dense float32 in the same run: "
        f"median and 95 % interval, one thread. {rows[0]['images']:,} held-out images, no training. Measured on "
        f"{device_with_load()}. The fastest at batch 8 is first.\n\n"
    )
    (RESULTS / "cpu_choice.md").write_text(head + markdown(COLUMNS, [cells(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
