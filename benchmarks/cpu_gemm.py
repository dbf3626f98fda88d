"""Speed of one masked GEMM on the N:M kernel, relative to ONNX Runtime's dense GEMM -> results/cpu_gemm.{json,md}.

    python benchmarks/cpu_gemm.py [--rounds 15]

Each GEMM is a session of one node with bias. The dense node has the masked weights of 2:4. All patterns of one shape
are timed in interleaved rounds on one thread, in process CPU time. The speedup is the median over rounds with its 95 %
interval; bold means slower. Rows of other processors are kept in the file, each processor in a table of its own.
"""

import argparse
from typing import Any

import numpy as np
import torch
from lib.common import RESULTS, markdown, write
from lib.cpu_timing import (
    by_processor,
    device,
    interleaved,
    load_range,
    median_speedup,
    provenance,
    rows_of_other_processors,
    speedup_cell,
)

from mpcompile.ir.pattern import NM
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.runtimes import native
from mpcompile.runtimes.native.custom_op import GEMM
from mpcompile.runtimes.native.microbenchmark import dense_node, native_node, one_node
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm
from mpcompile.runtimes.native.packing import pack

QUESTION = "For which shapes and patterns is the N:M kernel faster than ONNX Runtime's dense GEMM, on one thread?"
PATTERNS = ("2:4", "8:16", "16:32", "12:32", "1:4", "6:12", "12:16", "2:4x2", "2:4x4")
SHAPES = [(768, 192), (1536, 384), (384, 1536), (768, 768), (2304, 768), (3072, 768), (768, 3072)]  # out, in
TOKENS = (64, 197, 1576)  # cpu_gemm_few.py measures 1 to 16 tokens
COLUMNS = ("tokens", "in → out", "dense GFLOP/s", *PATTERNS)
BLOCK_MS = 8.0  # of each GEMM in each round


def random_gemm(rows: int, columns: int, pattern: NM, rng: np.random.Generator) -> MaskedGemm:
    """Returns a GEMM x -> y with a random bias and a random weight (rows, columns), masked by magnitude."""
    weight = rng.standard_normal((rows, columns), dtype=np.float32)
    weight *= nm_mask(torch.from_numpy(np.abs(weight)), pattern).numpy()
    bias = rng.standard_normal(rows, dtype=np.float32)
    return MaskedGemm(("layer",), "product", GEMM, "x", "y", ("y",), "w", pattern, weight, bias)


def main() -> None:
    """Measures, and writes both results files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each shape")
    arguments = parser.parse_args()
    library = native.library()
    if library is None:
        raise SystemExit(native.missing())
    rng = np.random.default_rng(0)
    rows = rows_of_other_processors("cpu_gemm")
    for tokens in TOKENS:
        for out, in_ in SHAPES:
            x = (1, tokens, in_)
            gemms = {
                text: random_gemm(out, in_, NM.parse(text), rng) for text in PATTERNS if in_ % NM.parse(text).of == 0
            }
            engines = {"dense": one_node(dense_node(gemms["2:4"]), gemms["2:4"], x, None, 1)}
            for text, gemm in gemms.items():
                engines[text] = one_node(native_node(gemm, pack(gemm.weight, gemm.pattern.of)), gemm, x, library, 1)
            samples = interleaved(engines, arguments.rounds, BLOCK_MS, wall=False)
            speedups = {text: median_speedup(samples["dense"], samples[text]) for text in gemms}
            gflops = 2 * tokens * out * in_ / float(np.median(samples["dense"])) / 1e6
            row = {"tokens": tokens, "out": out, "in": in_, "dense_gflops": gflops, "speedup": speedups}
            rows.append(row | {"rounds": arguments.rounds} | provenance())
            print(" | ".join(cells(rows[-1])), flush=True)
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files."""
    write("cpu_gemm", QUESTION, device(), ("onnxruntime", "numpy"), rows)
    count = f"{min(row['rounds'] for row in rows)} rounds or more of at least {BLOCK_MS:.0f} ms each"
    head = f"{QUESTION}\n\nSpeed relative to ONNX Runtime's dense GEMM: {count}, process CPU time, one thread.\n"
    tables = (
        f"{heading}, {load_range(own)}:\n\n{markdown(COLUMNS, [cells(row) for row in own])}"
        for heading, own in by_processor(rows)
    )
    (RESULTS / "cpu_gemm.md").write_text("\n".join([head, *tables]), encoding="utf-8")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the row as cells of the table."""
    speeds = (speedup_cell(row["speedup"][text]) if text in row["speedup"] else "–" for text in PATTERNS)
    return str(row["tokens"]), f"{row['in']} → {row['out']}", f"{row['dense_gflops']:.0f}", *speeds


if __name__ == "__main__":
    main()
