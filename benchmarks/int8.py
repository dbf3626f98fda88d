"""Accuracy of int8 models, dense and with masks, ours and ONNX Runtime's -> results/int8.{json,md}.

    python benchmarks/int8.py                                  # weights: make bench-models
    python benchmarks/int8.py --models fashion_vit --seeds 0 --again "2:4"    # only these rows; others are kept

Three models with trained weights: the example's ViT, EfficientNet-Lite0 and a ViT-S/14, the last two with a linear head
for Fashion-MNIST (benchmarks/lib/pretrained.py). Each method gets the same 256 calibration images, chosen by the seed,
and is evaluated on held-out images: the ONNX file in ONNX Runtime on the CPU. The logit shift is the largest change of
a logit against the dense float32 file, averaged over images.

- `dense int8 (ours)`: the passes scale-migration and quantize. With a pattern: also permute and nm-mask before.
- `ONNX Runtime …`: its own quantisation tools on our float32 file, dense or masked, weights with one scale per output
  channel. Dynamic: MatMul and Gemm only. Static: all operators that the tools support.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lib.common import RESULTS, ROOT, markdown, rows_of, write
from lib.cpu_timing import processor_name
from lib.pretrained import fashion_data, on_fashion
from numpy.typing import NDArray

from mpcompile.data.images import Data
from mpcompile.driver.inputs import captured, loaded_from
from mpcompile.export.onnx_export import Exported, lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import Precision
from mpcompile.passes import NMMask, Permute, Quantize, ScaleMigration
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.runtimes.ort.int8 import logits_of, quantise_dynamic, quantise_static, saturates
from mpcompile.runtimes.ort.session import session_on

QUESTION = "How much accuracy do int8 files keep, dense and masked, ours and ONNX Runtime's?"
SIZES = {"efficientnet_lite0": 96, "vit_small": 112}  # pixels
HELD_OUT = {"fashion_vit": 2000, "efficientnet_lite0": 2000, "vit_small": 1000}  # images
CALIBRATION = 256  # images
SEEDS = (0, 1, 2)
PATTERNS = (NM(2, 4), NM(1, 4), NM(4, 8), NM(8, 16), NM(2, 4, 4))
METHODS = ("MinMax", "Percentile", "Entropy")  # of ONNX Runtime's calibration
COLUMNS = ("model", "method", "top-1", "of dense", "same answer", "logit shift", "size of fp32", "seeds")

Logits = NDArray[np.float32]


def model_named(name: str) -> Model:
    """The model of this name, captured."""
    if name == "fashion_vit":
        loaded, request = loaded_from(ROOT / "examples" / "fashion_vit" / "model.safetensors")
        return captured(loaded, request)
    module, source = on_fashion(name, SIZES[name])
    return capture(module, source)


def passes_of(pattern: NM | None, int8: bool) -> list[Pass]:
    """The passes for a pattern, in int8 or float32, as `mpcompile compile` runs them."""
    masks: list[Pass] = [] if pattern is None else [Permute(), NMMask(pattern)]
    return [ScaleMigration(), *masks, Quantize()] if int8 else masks


def files(model: Model, data: Data, folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Path, float]]:
    """Yields each wanted file: the method's name, its path, and the seconds that it took to make."""
    images = data.calibration.first(CALIBRATION).numpy()

    def made(pattern: NM | None, int8: bool) -> tuple[Exported, float]:
        started, precision = time.perf_counter(), "int8" if int8 else "fp32"
        result, _ = PassManager(passes_of(pattern, int8)).run(model, data.for_passes())
        name = f"{pattern}-{precision}.onnx".replace(":", "x")
        return lower(result, folder / name, precision=_precision(precision)), time.perf_counter() - started

    for pattern in (None, *PATTERNS):
        label = str(pattern or "dense")
        runtime_names = [f"{label}, then ONNX Runtime static {method.lower()}" for method in METHODS]
        dynamic = f"{label}, then ONNX Runtime dynamic"
        theirs = [name for name in (dynamic, *runtime_names) if pattern in (None, NM(2, 4)) and wanted(name)]
        if theirs or wanted(f"{label} fp32"):
            single, seconds = made(pattern, int8=False)
            yield f"{label} fp32", single.onnx, seconds
            for name in theirs:
                path, started = folder / "theirs.onnx", time.perf_counter()
                if name == dynamic:
                    quantise_dynamic(single.onnx, path, saturates())
                else:
                    quantise_static(single, path, images, saturates(), METHODS[runtime_names.index(name)])
                yield name, path, time.perf_counter() - started
        if wanted(f"{label} int8 (ours)"):
            quantised, seconds = made(pattern, int8=True)
            yield f"{label} int8 (ours)", quantised.onnx, seconds


def _precision(text: str) -> Precision:
    return "int8" if text == "int8" else "fp32"


def measured(name: str, seeds: Sequence[int], wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Yields one row for each method and seed of a model."""
    model = model_named(name)
    for seed in seeds:
        data = fashion_data(model.source, calibration=CALIBRATION, seed=seed)
        held_out = replace(data.held_out, order=data.held_out.order[: HELD_OUT[name]])
        pixels = held_out.first(len(held_out)).numpy()
        labels = np.concatenate([part.numpy() for _, part in held_out.batches()])
        with tempfile.TemporaryDirectory() as folder:
            file = lower(model, Path(folder) / "reference.onnx").onnx
            dense, size = logits_of(session_on(file), pixels), file.stat().st_size
            for method, path, seconds in files(model, data, Path(folder), wanted):
                found = logits_of(session_on(path), pixels)
                row = {
                    "model": name,
                    "method": method,
                    "seed": seed,
                    "top1": float((found.argmax(1) == labels).mean()),
                    "dense_top1": float((dense.argmax(1) == labels).mean()),
                    "agreement": float((found.argmax(1) == dense.argmax(1)).mean()),
                    "logit_shift": float(np.abs(found - dense).max(1).mean()),
                    "size": path.stat().st_size / size,
                    "seconds": seconds,
                    "images": len(labels),
                }
                print(row, flush=True)
                yield row


def page(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: the mean over seeds of each model and method."""
    table = []
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        same = [row for row in rows if (row["model"], row["method"]) == (model, method)]

        def mean(key: str, same: list[dict[str, Any]] = same) -> float:
            return float(np.mean([row[key] for row in same]))

        change = f"{100 * (mean('top1') - mean('dense_top1')):+.2f}"
        table.append(
            (
                model,
                method,
                f"{mean('top1'):.2%}",
                change,
                f"{mean('agreement'):.2%}",
                f"{mean('logit_shift'):.4f}",
                f"{mean('size'):.3f}",
                str(len(same)),
            )
        )
    counts = ", ".join(f"{name} {count:,}" for name, count in HELD_OUT.items())
    head = (
        f"{QUESTION}\n\n{processor_name()}. {CALIBRATION} calibration images; held-out images: {counts}. Means over "
        "the seeds, which choose the calibration images. `of dense`: change of top-1 in points. Logit shift: the "
        "largest change of a logit of an image, in the mean over images.\n\n"
    )
    return head + markdown(COLUMNS, table)


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(HELD_OUT), choices=list(HELD_OUT))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--again", default="", help="measure only methods whose names contain this; others are kept")
    arguments = parser.parse_args()
    for name in arguments.models:
        for row in measured(name, arguments.seeds, lambda method: arguments.again in method):
            key = (row["model"], row["method"], row["seed"])
            rows = [old for old in rows_of("int8") if (old["model"], old["method"], old["seed"]) != key] + [row]
            order = list(HELD_OUT)
            rows.sort(key=lambda row: (order.index(row["model"]), row["method"], row["seed"]))
            write("int8", QUESTION, processor_name(), ("onnxruntime", "torch", "timm"), rows)
            (RESULTS / "int8.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
