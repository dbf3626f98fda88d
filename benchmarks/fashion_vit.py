"""Accuracy, size and speed of the trained example by pattern, without training -> results/fashion_vit.{json,md}.

    python benchmarks/fashion_vit.py

Each pattern gets the passes of `mpcompile MODEL --pattern N:M --data …`: budget, permutation, joint masks with refit,
batch-norm correction, certificate. For comparison, top-1 is also measured for magnitude masks without refit, with the
same budget and permutation. Speed is that of target ort on this machine, relative to the dense file of the same
precision in ONNX Runtime, in interleaved rounds. A layer runs on the N:M kernel if it is measured to be faster there.
"""

import tempfile
from pathlib import Path
from typing import Any

from lib.common import RESULTS, ROOT, markdown, write

from mpcompile import Recipe, compile
from mpcompile.report.run_tables import summary

EXAMPLE = ROOT / "examples" / "fashion_vit"
CASES = [
    ("2:4", "fp32"),
    ("2:4x2", "fp32"),
    ("2:4x4", "fp32"),
    ("4:8", "fp32"),
    ("8:16", "fp32"),
    ("16:32", "fp32"),
    ("12:32", "fp32"),
    ("1:4", "fp32"),
    ("2:4", "fp16"),
]
COLUMNS = (
    "pattern",
    "precision",
    "dense top-1",
    "top-1",
    "largest weights, no refit",
    "same answer",
    "logit shift of range",
    "ONNX file",
    "speed, batch 8",
)
QUESTION = "Which accuracy, size and speed does each pattern give on the trained example, without training?"


def measure(pattern: str, precision: str, folder: Path) -> dict[str, Any]:
    """Compiles the example with one pattern and precision, and returns its row."""
    shared = [{"mp-budget": {"patterns": [pattern]}}, "permute"]
    recipe = Recipe.checked({"passes": [*shared, "nm-mask", "batch-norm", "certify"], "precision": precision})
    magnitude = {"nm-mask": {"criterion": "magnitude", "refit": "none"}}
    baseline = Recipe.checked({"passes": [*shared, magnitude], "precision": precision, "bench": {"seconds": 0.1}})
    model, images = EXAMPLE / "model.safetensors", EXAMPLE / "images.npz"
    artifact = compile(model, recipe, data=images, output=folder / f"{pattern}-{precision}")
    output = folder / f"{pattern}-{precision}-magnitude"
    accuracy = compile(model, baseline, data=images, output=output).report.comparison
    assert accuracy is not None
    assert accuracy.compressed is not None
    report = artifact.report.model_dump(mode="json")
    keys = ("comparison", "latency", "parity", "accelerated", "verdict")
    files = {row["name"]: row["bytes"] for row in report["files"] if row["name"].endswith(".onnx")}
    masked = sum(row["pattern"] is not None for row in report["layers"])
    return {
        "pattern": pattern,
        "precision": precision,
        "target": recipe.target,
        "top1_largest": accuracy.compressed.top1,
        "masked_layers": masked,
        "weights": artifact.report.weights(),
        "nonzero": artifact.report.nonzero(),
        "bytes": files,
        "summary": summary(artifact.report).texts(),
        **{key: report[key] for key in keys},
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the row as cells of the table in docs/results-accuracy.md."""
    comparison = row["comparison"]
    batch8 = next(pair for pair in row["latency"] if pair["dense"]["batch"] == 8)["speedup"]
    return (
        row["pattern"],
        row["precision"],
        f"{comparison['dense']['top1']:.2%}",
        f"{comparison['compressed']['top1']:.2%}",
        f"{row['top1_largest']:.2%}",
        f"{comparison['agreement']:.2%}",
        f"{comparison['logit_shift_mean']:.2f} of {comparison['logit_range']:.2f}",
        f"{row['bytes']['model.onnx'] / 1e6:.2f} MB",
        f"{batch8['ratio']:.2f} [{batch8['interval'][0]:.2f}, {batch8['interval'][1]:.2f}]",
    )


def main() -> None:
    """Measures, and writes both results files."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(pattern, precision, Path(folder)) for pattern, precision in CASES]
    write("fashion_vit", QUESTION, "CPUExecutionProvider", ("torch", "timm", "onnx", "onnxruntime"), rows)
    table = markdown(COLUMNS, [cells(row) for row in rows])
    (RESULTS / "fashion_vit.md").write_text(
        f"# The trained example by pattern\n\n{QUESTION}\n\n{table}", encoding="utf-8"
    )
    print(table)


if __name__ == "__main__":
    main()
