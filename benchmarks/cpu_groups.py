"""Speed of masked GEMMs of one density and several M on the N:M kernel -> results/cpu_groups.{json,md}.

    python benchmarks/cpu_groups.py [--rounds 15]

`--pattern 50%` takes the freest pattern, because the kernel's speed depends on the density and hardly on M. This file
is the evidence. All patterns of one density and shape are timed in interleaved rounds on one thread, in process CPU
time. Each number is the speed relative to the widest M: the median over rounds with its 95 % interval; bold means
slower. Rows of other processors are kept in the file, each processor in a table of its own.
"""

import argparse
from fractions import Fraction
from typing import Any

import numpy as np
from cpu_gemm import random_gemm
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
from mpcompile.runtimes import native
from mpcompile.runtimes.native.microbenchmark import native_node, one_node
from mpcompile.runtimes.native.packing import pack

QUESTION = "At one density, how much does the speed of the fp32 N:M kernel depend on M, on one thread?"
DENSITIES = tuple(Fraction(n, 8) for n in (2, 3, 4, 5, 6))
GROUPS = (32, 16, 8, 4)
SHAPES = [(768, 192), (768, 768), (3072, 768), (384, 1536)]  # out, in
TOKENS = (64, 197)
COLUMNS = ("density", "tokens", "in → out", *(f"M = {of}" for of in GROUPS))
BLOCK_MS = 8.0  # of each GEMM in each round


def patterns_of(density: Fraction) -> list[NM]:
    """Returns the patterns of a density with one of the M in GROUPS, widest M first."""
    return [NM(int(density * of), of) for of in GROUPS if (density * of).denominator == 1]


def main() -> None:
    """Measures, and writes both results files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each shape")
    arguments = parser.parse_args()
    library = native.library()
    if library is None:
        raise SystemExit(native.missing())
    rng = np.random.default_rng(0)
    rows = rows_of_other_processors("cpu_groups")
    for density in DENSITIES:
        for tokens in TOKENS:
            for out, in_ in SHAPES:
                engines = {}
                for pattern in patterns_of(density):
                    gemm = random_gemm(out, in_, pattern, rng)
                    node = native_node(gemm, pack(gemm.weight, pattern.of))
                    engines[str(pattern)] = one_node(node, gemm, (1, tokens, in_), library, 1)
                samples = interleaved(engines, arguments.rounds, BLOCK_MS, wall=False)
                widest = next(iter(engines))
                speeds = {text: median_speedup(samples[widest], samples[text]) for text in list(engines)[1:]}
                row = {"density": float(density), "tokens": tokens, "out": out, "in": in_, "widest": widest}
                rows.append(row | {"relative_speed": speeds, "rounds": arguments.rounds} | provenance())
                print(" | ".join(cells(rows[-1])), flush=True)
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files."""
    write("cpu_groups", QUESTION, device(), ("onnxruntime", "numpy"), rows)
    count = f"{min(row['rounds'] for row in rows)} rounds or more of at least {BLOCK_MS:.0f} ms each"
    head = f"{QUESTION}\n\nSpeed relative to the widest M of the density: {count}, process CPU time, one thread.\n"
    tables = []
    for heading, own in by_processor(rows):
        medians = (f"{text} {median:.2f}" for text, median in median_by_pattern(own).items())
        summary = f"Median over all shapes: {', '.join(medians)}."
        tables.append(f"{heading}, {load_range(own)}:\n\n{markdown(COLUMNS, [cells(row) for row in own])}\n{summary}\n")
    (RESULTS / "cpu_groups.md").write_text("\n".join([head, *tables]), encoding="utf-8")


def median_by_pattern(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the median over the shapes of each pattern's speed relative to the widest M of its density."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for text, (median, *_) in row["relative_speed"].items():
            ratios.setdefault(text, []).append(median)
    return {text: float(np.median(values)) for text, values in ratios.items()}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the row as cells of the table."""
    by_group = {NM.parse(text).of: f"{text} {speedup_cell(found)}" for text, found in row["relative_speed"].items()}
    by_group[NM.parse(row["widest"]).of] = row["widest"]
    shown = (by_group.get(of, "–") for of in GROUPS)
    return f"{row['density']:.1%}", str(row["tokens"]), f"{row['in']} → {row['out']}", *shown


if __name__ == "__main__":
    main()
