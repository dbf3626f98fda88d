"""Speed of int8 convolutions on our kernel, single and in whole CNNs -> results/cpu_conv_int8.{json,md}.

    python benchmarks/cpu_conv_int8.py [--openvino PYTHON] [--threads 1 2] [--models resnet50] [--add]

Weights are random, masked by magnitude, and rounded to the nearest integers; activations are u8 with a fixed scale.
Whole CNNs are files as `--precision int8 --target ort` writes them: the first layer and the head stay in float32. Every
8-bit convolution without groups runs on our kernel, with the pooling, the additions and the rectifiers around it; all
other operators run in ONNX Runtime. The baselines are dense:

- ONNX Runtime in float32;
- ONNX Runtime on the same int8 file, and on the file of its own static quantisation, which has the first layer and the
  head in int8 too. The faster one is the baseline "its best int8";
- OpenVINO in float32 and in int8, in a process under the Python that --openvino names.

A single convolution reads and writes u8 with the channels last, on our kernel and on ONNX Runtime's. All of them run in
interleaved rounds, timed in process CPU time on one thread and in wall time on more. Rows of other processors are kept
in the file. With --add, other rows of this processor are kept too.
"""

import argparse
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from lib.cnn_files import in_int8, native_file, standard_file, untrained_cnn
from lib.common import RESULTS, markdown, rows_of, write
from lib.cpu_timing import (
    by_processor,
    int8_device,
    interleaved,
    load_range,
    median_speedup,
    provenance,
    rows_of_other_processors,
    speedup_cell,
)
from lib.openvino_process import openvino
from lib.untrained_cnns import CIFAR, pixels_of
from lib.vit_files import Engine, with_batch

from mpcompile.export.onnx_export import lower
from mpcompile.ir.pattern import NM
from mpcompile.runtimes import native
from mpcompile.runtimes.native.int8_convolutions import Int8Convolution
from mpcompile.runtimes.native.int8_microbenchmark import native_convolution, standard_convolution
from mpcompile.runtimes.native.int8_ops import U8Quantization
from mpcompile.runtimes.native.int8_speeds import LARGEST, random_mask
from mpcompile.runtimes.native.microbenchmark import OneNode
from mpcompile.runtimes.ort.int8 import quantise_static, saturates
from mpcompile.runtimes.ort.session import session_on

QUESTION = "How much faster is an int8 CNN on our kernel than dense float32 and the best dense int8 file?"
DENSE = "dense"
MODELS = (CIFAR, "resnet50", "efficientnet_lite0")
PATTERNS = (DENSE, "2:4", "2:4x4", "4:16")  # 2:4 stands for 8:16 too, and 4:16 for 1:4
FP32, INT8 = "ONNX Runtime, fp32", "ONNX Runtime, int8, "
OPENVINO_FP32, OPENVINO_INT8 = "OpenVINO, fp32", "OpenVINO, int8"
OVER = {"over_fp32": "over ONNX Runtime fp32", "over_int8": "over its best int8", "over_openvino": "over OpenVINO int8"}
# Of ResNet-50: output and input channels, taps per axis, pixels per axis.
LAYERS = ((64, 64, 3, 56), (256, 64, 1, 56), (64, 256, 1, 56), (128, 128, 3, 28), (512, 128, 1, 28), (256, 256, 3, 14),
          (1024, 256, 1, 14), (256, 1024, 1, 14), (512, 512, 3, 7), (2048, 512, 1, 7), (512, 2048, 1, 7))  # fmt: skip
BLOCK_MS = 20.0  # of each engine in each round
DRIFT_LIMIT = 0.1  # of our logits from the quantised file in float32 arithmetic, relative to their norm


def layer(shape: tuple[int, int, int, int], pattern: NM | None, rng: np.random.Generator) -> Int8Convolution:
    """Returns a convolution with random weights."""
    rows, channels, taps, _ = shape
    weight = rng.integers(1, LARGEST, (taps, taps, channels, rows), endpoint=True, dtype=np.int8)
    weight *= rng.choice(np.array((-1, 1), np.int8), weight.shape)
    if pattern is not None:
        weight *= random_mask(pattern, (weight.size // rows, rows), rng).reshape(weight.shape)
    floats = np.full(rows, 0.01, np.float32)
    pad = taps // 2
    return Int8Convolution(
        "conv", "x", "floats", U8Quantization(0.02, 128), "product", "y", U8Quantization(1.0, 128), (128, 255), ("y",),
        "weight", np.ascontiguousarray(weight.transpose(3, 2, 0, 1)), floats, floats, (1, 1),
        (pad, pad, pad, pad), (1, 1),
    )  # fmt: skip


def measured_layer(shape: tuple[int, int, int, int], patterns: list[str], rounds: int) -> dict[str, Any]:
    """Returns the row of one convolution, at batch 1 and on one thread."""
    rng, (rows, channels, _, size) = np.random.default_rng(0), shape
    dense = layer(shape, None, rng)
    x = rng.integers(0, 256, (1, size, size, channels), dtype=np.uint8)
    runs = {"theirs": OneNode(standard_convolution(dense), None, 1)}
    for text in patterns:
        made = dense if text == DENSE else layer(shape, NM.parse(text), rng)
        runs[text] = OneNode(native_convolution(made), native.library(), 1)
    for run in runs.values():
        run.bind(x, np.empty((1, size, size, rows), np.uint8))
    samples = interleaved(runs, rounds, BLOCK_MS / 4, False)
    speedups = {text: median_speedup(samples["theirs"], samples[text]) for text in patterns}
    return {"layer": list(shape), "batch": 1, "threads": 1, "rounds": rounds, "speedup": speedups,
            "theirs_us": float(np.median(samples["theirs"])) * 1e3, **provenance(int8_device())}  # fmt: skip


def write_files(name: str, patterns: list[str], folder: Path) -> dict[str, Path]:
    """Writes all files of a CNN, and returns them by engine; a pattern is the engine of a file for our kernel."""
    model, limited = untrained_cnn(name), saturates()
    size = pixels_of(name)
    two = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole = lower(model, folder / "whole.onnx")
    files = {FP32: whole.onnx, f"{INT8}static": folder / "static.onnx"}
    quantise_static(whole, files[f"{INT8}static"], two.numpy(), limited)
    for text in patterns:
        pattern = None if text == DENSE else NM.parse(text)
        path = folder / f"{text.replace(':', '_')}.onnx"
        standard = standard_file(in_int8(model, pattern, two, limited), path)
        files[text] = path.with_suffix(".native.onnx")
        onnx.save_model(native_file(standard, two.numpy())[0], files[text])
        expected = session_on(path, 1, kernels_8_bit=False)(two.numpy())
        drift = np.linalg.norm(session_on(files[text], 1, native.library())(two.numpy()) - expected)
        if not drift <= DRIFT_LIMIT * np.linalg.norm(expected):
            raise SystemExit(f"{name}, {text}: our logits are wrong")
        if text == DENSE:
            files[f"{INT8}as exported"] = path
    return files


def measured_model(
    name: str, files: dict[str, Path], patterns: list[str], batch: int, threads: int, python: str | None, rounds: int
) -> dict[str, Any]:
    """Returns the row of one CNN."""
    size = pixels_of(name)
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    fixed = files[FP32].with_name(f"whole_{batch}.onnx")
    onnx.save_model(with_batch(onnx.load(files[FP32]), batch), fixed)
    engines: dict[str, Engine] = {FP32: session_on(fixed, threads)}
    engines |= {key: session_on(path, threads) for key, path in files.items() if key.startswith(INT8)}
    engines |= {text: session_on(files[text], threads, native.library()) for text in patterns}
    wall = threads > 1
    with ExitStack() as stack:
        other = {
            key: stack.enter_context(openvino(python, files[source], images.shape, threads))
            for key, source in ((OPENVINO_FP32, FP32), (OPENVINO_INT8, f"{INT8}as exported"))
        }
        elsewhere = {key: engine.ms for key, engine in other.items() if engine is not None}
        runs = {key: partial(engine, images) for key, engine in engines.items()}
        samples = interleaved(runs, rounds, BLOCK_MS, wall, elsewhere)
        versions = {key: engine.version for key, engine in other.items() if engine is not None}
    ms = {key: float(np.median(values)) for key, values in samples.items()}
    best = min((key for key in ms if key.startswith(INT8)), key=lambda key: ms[key])
    over = {
        column: {key: median_speedup(samples[base], samples[key]) for key in samples if key != base}
        if base in samples
        else {}
        for column, base in zip(OVER, (FP32, best, OPENVINO_INT8), strict=True)
    }
    return {"model": name, "batch": batch, "threads": threads, "clock": "wall" if wall else "process CPU",
            "rounds": rounds, "ms": ms, "best_int8": best, **over, "openvino": versions,
            **provenance(int8_device())}  # fmt: skip


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the values that identify a row in its file; rows are sorted by them."""
    return row["device"], row.get("model", ""), row.get("layer", []), row["batch"], row["threads"]


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvino", help="path of a Python with OpenVINO installed; default: OpenVINO is not timed")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="threads of each engine")
    parser.add_argument("--rounds", type=int, default=15, help="rounds at batch 1; half as many at other batches")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="CNNs; an empty list times layers alone")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="batch sizes of whole CNNs")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS), help="patterns of our files, or 'dense'")
    parser.add_argument("--no-layers", action="store_true", help="time whole CNNs only")
    parser.add_argument("--add", action="store_true", help="keep the rows that an earlier run wrote on this processor")
    given = parser.parse_args()
    if missing := native.missing():
        raise SystemExit(missing)
    rows = rows_of("cpu_conv_int8") if given.add else rows_of_other_processors("cpu_conv_int8", int8_device())

    def add(row: dict[str, Any]) -> None:
        nonlocal rows
        rows = sorted([*(kept for kept in rows if row_key(kept) != row_key(row)), row], key=row_key)
        print(row_key(row)[1:], row.get("ms") or row["speedup"], flush=True)
        report(rows)

    for shape in () if given.no_layers else LAYERS:
        add(measured_layer(shape, given.patterns, given.rounds))
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(name, given.patterns, Path(folder))
            for batch, threads in product(given.batches, given.threads):
                rounds = given.rounds if batch == 1 else max(5, given.rounds // 2)
                add(measured_model(name, files, given.patterns, batch, threads, given.openvino, rounds))


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files with the rows measured so far."""
    write("cpu_conv_int8", QUESTION, int8_device(), ("onnxruntime", "timm", "torch"), rows)
    parts = [
        f"{QUESTION}\n\nMedian over {min(row['rounds'] for row in rows)} rounds or more, 95 % interval; bold means "
        "slower. A pattern is a file on our kernel. Its best int8 is the faster of two dense int8 files in ONNX "
        "Runtime; that of its own static quantisation has the first layer and the head in int8 too.\n"
    ]
    for heading, own in by_processor(rows):
        parts.append(f"## {heading}, {load_range(own)}\n")
        layers = [row for row in own if "layer" in row]
        if layers:
            names = list(layers[0]["speedup"])
            lines = [
                (
                    layer_name(row),
                    f"{row['theirs_us']:.0f}",
                    *(speedup_cell(tuple(row["speedup"][name])) for name in names),
                )
                for row in layers
            ]
            table = markdown(("Convolution", "ONNX Runtime's int8, µs", *names), lines)
            parts.append(f"Single convolutions, batch 1, one thread, over ONNX Runtime's dense int8:\n\n{table}")
        for row in (row for row in own if "model" in row):
            used = "".join(f"; {key} {version}" for key, version in row["openvino"].items())
            title = f"{row['model']}, batch {row['batch']}, {row['threads']} thread(s), {row['clock']} time{used}"
            lines = [(key, f"{ms:.2f}", *cells(row, key)) for key, ms in row["ms"].items()]
            parts.append(f"{title}:\n\n{markdown(('', 'ms', *OVER.values()), lines)}")
    (RESULTS / "cpu_conv_int8.md").write_text("\n".join(parts), encoding="utf-8")


def layer_name(row: dict[str, Any]) -> str:
    """Returns the channels, the taps and the size of a convolution."""
    rows, channels, taps, size = row["layer"]
    return f"{channels} → {rows}, {taps}×{taps}, {size} px"


def cells(row: dict[str, Any], key: str) -> list[str]:
    """Returns the speed of one engine over each baseline."""
    return [speedup_cell(tuple(row[column][key])) if key in row[column] else "–" for column in OVER]


if __name__ == "__main__":
    main()
