"""Speed of one int8 product on our kernel, relative to the fastest dense int8 one -> results/cpu_int8_gemm.{json,md}.

    python benchmarks/cpu_int8_gemm.py [--openvino PYTHON] [--shapes ViT-B] [--tokens 197] [--add]

The Linear layers of ViT-S, B and L. Each product is a model of one operator, with weights in the cache. Two kinds of
our operator, both with a fixed scale of the activations:

- u8 → u8: compared with QLinearMatMul, QGemm and OpenVINO;
- u8 → f32: compared with MatMulIntegerToFloat, and with DynamicQuantizeMatMul and OpenVINO, which also quantise x.

The baseline of a kind is the one of these with the lowest median time in this shape. Operators of the baseline multiply
dense weights. All are timed in interleaved rounds on one thread, in process CPU time; OpenVINO in a process under the
Python that --openvino names. The speedup is the median over rounds with its 95 % interval; bold means slower. Rows of
other processors are kept in the file, each processor in tables of its own; --add keeps other shapes and numbers of
tokens too.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cpu_gemm import random_gemm
from lib import int8_products
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
from lib.int8_products import Product, random_product
from lib.openvino_process import OpenVino, openvino
from numpy.typing import NDArray

from mpcompile.ir.pattern import NM
from mpcompile.runtimes import native
from mpcompile.runtimes.native.microbenchmark import OneNode, dense_node
from mpcompile.runtimes.ort.int8 import saturates

QUESTION = "How much faster is an int8 product on our kernel than the fastest dense int8 product, on one thread?"
# 8:16 stands for 2:4 and 4:8, 4:16 for 1:4 and 2:8: they run the same instructions.
PATTERNS = ("8:16", "2:4x2", "2:4x4", "4:16", "4:16x4", "dense")
KINDS = ("u8 → u8", "u8 → f32")
WIDTHS = {"ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}
SHAPES = {
    f"{model} {layer}": (rows * width, columns * width)
    for model, width in WIDTHS.items()
    for layer, (rows, columns) in {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}.items()
}
TOKENS = (1, 4, 16, 197, 1576)
HEADLINE = "ViT-B"
BLOCK_MS = 8.0  # of each product in each round
FP32, OPENVINO = "dense fp32", "OpenVINO"
OPENVINO_KINDS = {KINDS[0]: "u8 → u8", KINDS[1]: "f32 → f32"}
COLUMNS = ("tokens", "shape", "kind", "baseline", "baseline µs", *PATTERNS, FP32)


class Engines:
    """Sessions on all variants of one shape, ours and ONNX Runtime's, for any number of tokens.

    Keys are (kind, pattern) for ours, (kind, operator) for ONNX Runtime's, and FP32.
    """

    def __init__(self, rows: int, columns: int, library: Path) -> None:
        rng, limited = np.random.default_rng(0), saturates()
        self.products = {
            text: random_product(rows, columns, None if text == "dense" else NM.parse(text), rng, limited)
            for text in PATTERNS
        }
        self.dense = self.products["dense"]
        self.sizes = rows, columns
        self.theirs: dict[tuple[str, str], OneNode] = {
            (KINDS[0], "QLinearMatMul"): OneNode(int8_products.qlinear_matmul(self.dense), None, 1),
            (KINDS[0], "QGemm"): OneNode(int8_products.qgemm(self.dense), None, 1),
            (KINDS[1], "MatMulIntegerToFloat"): OneNode(int8_products.matmul_integer_to_float(self.dense), None, 1),
            (KINDS[1], "DynamicQuantizeMatMul"): OneNode(int8_products.dynamic_quantize_matmul(self.dense), None, 1),
        }
        self.ours = {
            (kind, text): OneNode(int8_products.native(product, kind), library, 1)
            for kind in KINDS
            for text, product in self.products.items()
        }
        self.fp32 = OneNode(dense_node(random_gemm(rows, columns, NM.parse("2:4"), rng)), None, 1)

    def bound(self, tokens: int) -> dict[tuple[str, str], OneNode]:
        """Binds random input and output arrays to all sessions, checks our results, and returns the sessions."""
        rows, columns = self.sizes
        rng = np.random.default_rng(1)
        x = rng.integers(0, 256, (1, tokens, columns), dtype=np.uint8)
        floats = rng.standard_normal((1, tokens, columns), dtype=np.float32)
        everything = {**self.ours, **self.theirs, ("", FP32): self.fp32}
        for (kind, name), engine in everything.items():
            y = np.empty((1, tokens, rows), np.uint8 if kind == KINDS[0] else np.float32)
            engine.bind(floats if name in ("DynamicQuantizeMatMul", FP32) else x, y)
            if (kind, name) in self.ours:
                engine()
                check(self.products[name], x, y)
        return everything


def check(product: Product, x: NDArray[np.uint8], y: NDArray[Any]) -> None:
    """Raises SystemExit if results of our operator are wrong; the first 16 tokens are checked."""
    expected, found = product.floats(x[:, :16]), y[:, :16].astype(np.float64)
    if y.dtype == np.uint8:
        expected = np.clip(np.round(expected / product.y.scale) + product.y.zero, 0, 255)
        right = np.abs(found - expected).max() <= 1  # a float32 result next to the middle of two integers
    else:
        right = np.allclose(found, expected, rtol=1e-5, atol=1e-4)
    if not right:
        raise SystemExit(f"wrong results: {found.ravel()[:4]} where {expected.ravel()[:4]} is right")


def measured(name: str, engines: Engines, tokens: int, python: str | None, rounds: int) -> list[dict[str, Any]]:
    """Returns the rows of one shape and number of tokens: one for each kind."""
    rows, columns = SHAPES[name]
    runs = engines.bound(tokens)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        other: dict[tuple[str, str], OpenVino] = {}
        for kind in KINDS if python is not None else ():
            file = Path(folder) / f"{KINDS.index(kind)}.onnx"
            onnx.save_model(int8_products.standard(engines.dense, OPENVINO_KINDS[kind]), file)
            started = stack.enter_context(openvino(python, file, (1, tokens, columns), 1))
            assert started is not None
            other[kind, OPENVINO] = started
        keyed = {" | ".join(key): run for key, run in runs.items()}
        elsewhere = {" | ".join(key): engine.ms for key, engine in other.items()}
        times = interleaved(keyed, rounds, BLOCK_MS, False, elsewhere)
    samples = {tuple(key.split(" | ")): value for key, value in times.items()}
    made = []
    for kind in KINDS:
        theirs = [key for key in (*engines.theirs, *other) if key[0] == kind]
        medians = {key[1]: float(np.median(samples[key])) * 1e3 for key in theirs}
        fastest = min(medians, key=lambda operator: medians[operator])
        baseline = samples[kind, fastest]
        ours = {text: samples[kind, text] for text in PATTERNS}
        made.append(
            {
                "tokens": tokens, "shape": name, "out": rows, "in": columns, "kind": kind, "rounds": rounds,
                "baseline": fastest, "baseline_us": medians,
                "openvino": {"version": other[kind, OPENVINO].version, "kernels": other[kind, OPENVINO].kernels}
                if other else None,
                "speedup": {text: median_speedup(baseline, value) for text, value in ours.items()}
                | {FP32: median_speedup(baseline, samples["", FP32])},
                "over_fp32": {text: median_speedup(samples["", FP32], value) for text, value in ours.items()},
                **provenance(int8_device()),
            }
        )  # fmt: skip
    return made


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the values that identify a row in its file; rows are sorted by them."""
    return row["device"], row["tokens"], list(SHAPES).index(row["shape"]), KINDS.index(row["kind"])


def main() -> None:
    """Measures, and writes both results files after each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvino", help="path of a Python with OpenVINO installed; default: OpenVINO is not timed")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each shape")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS), help="numbers of tokens")
    parser.add_argument("--shapes", nargs="*", default=list(WIDTHS), help="models, or layers such as 'ViT-B fc1'")
    parser.add_argument("--add", action="store_true", help="keep the rows that an earlier run wrote on this processor")
    arguments = parser.parse_args()
    library = native.library()
    if library is None:
        raise SystemExit(native.missing())
    chosen = [name for name in SHAPES if any(name.startswith(start) for start in arguments.shapes)]
    if not chosen:
        raise SystemExit(f"--shapes {' '.join(arguments.shapes)} names none of {', '.join(SHAPES)}")
    rows = rows_of("cpu_int8_gemm") if arguments.add else rows_of_other_processors("cpu_int8_gemm", int8_device())
    for name in chosen:
        engines = Engines(*SHAPES[name], library)
        for tokens in arguments.tokens:
            new = measured(name, engines, tokens, arguments.openvino, arguments.rounds)
            keys = [row_key(row) for row in new]
            rows = sorted([*(row for row in rows if row_key(row) not in keys), *new], key=row_key)
            print(*(" | ".join(cells(row)) for row in new), sep="\n", flush=True)
        report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files."""
    write("cpu_int8_gemm", QUESTION, int8_device(), ("onnxruntime", "numpy"), rows)
    head = (
        f"{QUESTION}\n\nSpeed relative to the fastest dense int8 product of ONNX Runtime and OpenVINO: median over "
        f"{min(row['rounds'] for row in rows)} rounds or more of at least {BLOCK_MS:.0f} ms each, process CPU time, "
        "one thread, weights in the cache. 8:16 stands for 2:4 and 4:8, 4:16 for 1:4 and 2:8.\n"
    )
    tables = (
        f"{heading}, {load_range(own)}{openvino_used(own)}.\n\n{headline(own)}\nEach shape, with 95 % intervals:\n\n"
        f"{markdown(COLUMNS, [cells(row) for row in own])}"
        for heading, own in by_processor(rows)
    )
    (RESULTS / "cpu_int8_gemm.md").write_text("\n".join([head, *tables]), encoding="utf-8")


def openvino_used(rows: list[dict[str, Any]]) -> str:
    """Returns OpenVINO's version and the kernels that it used in these rows, as text."""
    used = [row["openvino"] for row in rows if row["openvino"]]
    if not used:
        return "; OpenVINO was not timed"
    kernels = sorted({kernel for entry in used for kernel in entry["kernels"]})
    return f"; OpenVINO {', '.join(sorted({entry['version'] for entry in used}))} ran {', '.join(kernels)}"


def headline(rows: list[dict[str, Any]]) -> str:
    """Returns the table of medians over the layers of ViT-B, relative to the fastest dense int8 one and to fp32."""
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        for kind in KINDS:
            same = [
                row for row in rows
                if row["shape"].startswith(HEADLINE) and (row["tokens"], row["kind"]) == (tokens, kind)
            ]  # fmt: skip
            for label, key in (("dense int8", "speedup"), (FP32, "over_fp32")) if same else ():
                medians = (np.median([row[key][text][0] for row in same]) for text in PATTERNS)
                lines.append((str(tokens), kind, label, str(len(same)), *(f"{median:.2f}" for median in medians)))
    columns = ("tokens", "kind", "over", "shapes", *PATTERNS)
    return f"Medians over the layers of {HEADLINE}:\n\n{markdown(columns, lines)}" if lines else ""


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the row as cells of the table of all shapes."""
    shape = f"{row['shape']}, {row['in']} → {row['out']}"
    speeds = (speedup_cell(row["speedup"][text]) for text in (*PATTERNS, FP32))
    return (
        str(row["tokens"]),
        shape,
        row["kind"],
        row["baseline"],
        f"{row['baseline_us'][row['baseline']]:.0f}",
        *speeds,
    )


if __name__ == "__main__":
    main()
