"""Which pattern to choose on a CPU: accuracy beside measured speed -> results/cpu_choice.{json,md}.

    make bench-models; python benchmarks/cpu_choice.py [--models …] [--patterns …]

What `mpcompile MODEL --pattern N:M --data …` does, without training: budget, permutation, joint masks with their refit,
batch statistics. The ViT is the trained example; the CNN is EfficientNet-Lite0 with a linear head for Fashion-MNIST at
96 pixels (benchmarks/lib/pretrained.py). Speed is that of target ort on one thread, on the kernel where that is
measured to be faster, against the dense file in ONNX Runtime in the same run. Rows stand in order of speed, so that
patterns of equal speed are neighbours.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lib.pretrained as pretrained
import torch
from lib.common import RESULTS, ROOT, markdown, rows_of, write
from lib.cpu_turns import busy_device, processor, shown
from torch import nn

from mpcompile import Recipe, compile
from mpcompile.data.images import Data
from mpcompile.frontend.load_model import Request, load
from mpcompile.runtimes import native

QUESTION = "at equal measured speed on a CPU, which pattern keeps most accuracy?"
PATTERNS = ("2:4", "4:8", "8:16", "16:32", "12:32", "12:16", "1:4", "2:4x2", "2:4x4", "8:16x4", "16:32x4")
MODELS = ("fashion_vit", "efficientnet_lite0")
PIXELS = 96  # of the CNN
BATCHES = (1, 8)
COLUMNS = ("model", "pattern", "speed, batch 1", "speed, batch 8", "top-1", "logit shift", "MACs left", "on the kernel")


def model_of(name: str) -> tuple[nn.Module, Data]:
    """The model and its images."""
    if name == "fashion_vit":
        loaded = load(Request(str(ROOT / "examples" / "fashion_vit" / "model.safetensors")))
        return loaded.module, pretrained.fashion_data(loaded.source)
    return pretrained.on_fashion(name, PIXELS)[0], pretrained.fashion_data()


def measure(name: str, module: nn.Module, data: Data, pattern: str, folder: Path) -> dict[str, Any]:
    """The row for one model and pattern."""
    passes = [{"mp-budget": {"patterns": [pattern], "null": False}}, "permute", "nm-mask", "batch-norm"]
    recipe = Recipe.checked({"passes": passes, "bench": {"batches": list(BATCHES), "threads": 1}})
    report = compile(module, recipe, data=data, output=folder / f"{name}-{pattern.replace(':', '_')}").report
    found = report.comparison
    assert found is not None
    assert found.dense is not None
    assert found.compressed is not None
    return {
        "model": name,
        "pattern": pattern,
        "dense_top1": found.dense.top1,
        "top1": found.compressed.top1,
        "images": found.count,
        "agreement": found.agreement,
        "logit_shift": found.logit_shift_mean,
        "logit_range": found.logit_range,
        "macs": report.cost.compressed / report.cost.dense,
        "layers": len(report.layers),
        "masked": sum(row.pattern is not None for row in report.layers),
        "native": sum(bool(row.chosen) for row in report.verdicts),
        "speedup": {str(pair.dense.batch): (pair.speedup.ratio, *pair.speedup.interval) for pair in report.latency},
        "dense_ms": {str(pair.dense.batch): pair.dense.p50_ms for pair in report.latency},
        "load": processor(),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row of the table."""
    return (
        row["model"],
        row["pattern"],
        *(shown(tuple(row["speedup"][str(batch)])) for batch in BATCHES),
        f"{row['top1']:.2%} of {row['dense_top1']:.2%}",
        f"{row['logit_shift']:.3f} of {row['logit_range']:.2f}",
        f"{row['macs']:.1%}",
        f"{row['native']} of {row['masked']} masked",
    )


def main() -> None:
    """Writes both files, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--patterns", nargs="*", default=PATTERNS, help="rows of others stay, as those of other models")
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
    """Writes what has been measured so far."""
    rows = sorted(rows, key=lambda row: (MODELS.index(row["model"]), -row["speedup"]["8"][0]))
    write(
        "cpu_choice",
        QUESTION,
        processor(),
        ("torch", "timm", "onnx", "onnxruntime"),
        rows,
        {"N:M kernel": native.instruction_set()},
    )
    head = (
        f"# A pattern for a CPU\n\n{QUESTION}\n\nOne thread, medians and 95 % intervals against ONNX Runtime's dense "
        f"float32 in the same run, {rows[0]['images']:,} held-out images, no training, on {busy_device()}. "
        "Fastest at batch 8 first.\n\n"
    )
    (RESULTS / "cpu_choice.md").write_text(head + markdown(COLUMNS, [cells(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
