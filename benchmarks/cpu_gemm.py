"""One masked product on the native kernel against ONNX Runtime's dense one -> results/cpu_gemm.{json,md}.

    python benchmarks/cpu_gemm.py [--rounds 15]

Each product is a session of one node with its bias; the dense one has the same masked weights. One thread, process CPU
time, all of a shape in turns in one run. The ratio is the median over rounds with its 95 % interval; bold is slower. A
run on another processor adds a table of its own.
"""

import argparse
from typing import Any

import numpy as np
import torch
from lib.common import RESULTS, markdown, write
from lib.cpu_turns import by_processor, device, elsewhere, loads, ratio, shown, stamp, turns

from mpcompile.ir.pattern import NM
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.runtimes import native
from mpcompile.runtimes.native.custom_op import GEMM
from mpcompile.runtimes.native.microbenchmark import dense_node, native_node, one_node
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm
from mpcompile.runtimes.native.packing import pack

QUESTION = "for which shapes and patterns is the native N:M kernel faster than ONNX Runtime's dense one, on one thread?"
PATTERNS = ("2:4", "8:16", "16:32", "12:32", "1:4", "6:12", "12:16", "2:4x2", "2:4x4")
SHAPES = [(768, 192), (1536, 384), (384, 1536), (768, 768), (2304, 768), (3072, 768), (768, 3072)]  # out, in
TOKENS = (64, 197, 1576)  # fewer: cpu_gemm_few.py
COLUMNS = ("tokens", "in → out", "dense GFLOP/s", *PATTERNS)
BLOCK_MS = 8.0


def product(rows: int, columns: int, pattern: NM, rng: np.random.Generator) -> MaskedGemm:
    """A random weight that follows the pattern, as one node of a file."""
    weight = rng.standard_normal((rows, columns), dtype=np.float32)
    weight *= nm_mask(torch.from_numpy(np.abs(weight)), pattern).numpy()
    bias = rng.standard_normal(rows, dtype=np.float32)
    return MaskedGemm(("layer",), "product", GEMM, "x", "y", ("y",), "w", pattern, weight, bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    library = native.library()
    if library is None:
        raise SystemExit(native.missing())
    rng = np.random.default_rng(0)
    rows = elsewhere("cpu_gemm")
    for tokens in TOKENS:
        for out, in_ in SHAPES:
            x = (1, tokens, in_)
            products = {
                text: product(out, in_, NM.parse(text), rng) for text in PATTERNS if in_ % NM.parse(text).of == 0
            }
            engines = {"dense": one_node(dense_node(products["2:4"]), products["2:4"], x, None, 1)}
            for text, one in products.items():
                engines[text] = one_node(native_node(one, pack(one.weight, one.pattern.of)), one, x, library, 1)
            samples = turns(engines, arguments.rounds, BLOCK_MS, wall=False)
            found = {text: ratio(samples["dense"], samples[text]) for text in products}
            gflops = 2 * tokens * out * in_ / float(np.median(samples["dense"])) / 1e6
            row = {"tokens": tokens, "out": out, "in": in_, "dense_gflops": gflops, "speedup": found}
            rows.append(row | {"rounds": arguments.rounds} | stamp())
            print(" | ".join(cells(rows[-1])), flush=True)
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both files."""
    write("cpu_gemm", QUESTION, device(), ("onnxruntime", "numpy"), rows)
    count = f"{min(row['rounds'] for row in rows)} rounds or more of at least {BLOCK_MS:.0f} ms each"
    head = f"{QUESTION}\n\nTimes as fast as ONNX Runtime dense: {count}, process CPU time, one thread.\n"
    tables = (
        f"{where}, {loads(of)}:\n\n{markdown(COLUMNS, [cells(row) for row in of])}" for where, of in by_processor(rows)
    )
    (RESULTS / "cpu_gemm.md").write_text("\n".join([head, *tables]), encoding="utf-8")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    speeds = (shown(row["speedup"][text]) if text in row["speedup"] else "–" for text in PATTERNS)
    return str(row["tokens"]), f"{row['in']} → {row['out']}", f"{row['dense_gflops']:.0f}", *speeds


if __name__ == "__main__":
    main()
