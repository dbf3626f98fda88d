"""What does the inner loop of each CPU microkernel cost on processors that are not here, by llvm-mca's estimate?

    python benchmarks/instruction_counts.py

Compiles the kernels for x86-64 and aarch64, reads the innermost loop of the widest tile of each microkernel, and lets
llvm-mca estimate its cycles. Estimates assume that all data are in the L1 cache and that no branch is mispredicted.
On a processor with the x86-64 kernels, the int8 loops are also measured here, so that the estimate's error is visible.
Writes results/instruction_counts.{json,md}. Needs g++, g++-aarch64-linux-gnu and llvm (the newest: llvm-22).
"""

import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lib.common import RESULTS, markdown, write
from lib.machine_code import (
    FAMILIES,
    compiled,
    cycles,
    estimator,
    loops_of,
    products_of,
    selects_columns,
)

from mpcompile.runtimes.native import build
from mpcompile.system.hardware import processor_name

QUESTION = (__doc__ or "").splitlines()[0]
COMMON = 0.66  # of the kept weights at 2:4, the share whose column both rows of a pair keep (runtimes/native/NOTES.md)
# Kept of 16, rows that share a pattern, and the name. The dense loop is our own one; see DENSE_I8MM.
INT8_KINDS = (
    (16, 4, "dense int8"), (8, 1, "8:16"), (8, 2, "8:16, 2 rows share"), (8, 4, "8:16, 4 rows share"),
    (4, 1, "4:16"), (4, 2, "4:16, 2 rows share"), (4, 4, "4:16, 4 rows share"),
)  # fmt: skip
FP32_DENSE, FP32_OWN = "multiply-adds on registers", "8:16"
MATRIX_DENSE = "dense int8, usmmla"


@dataclass(frozen=True, slots=True)
class Kernel:
    """The build of a microkernel for an instruction set, its tiles, and the processors that are estimated."""

    name: str
    family: str
    processors: tuple[str, ...]  # as llvm-mca names them
    dense: int  # tokens of the widest tile: of dense int8, and by the rows that share a pattern
    tokens: tuple[int, int, int]
    vector: str = ""  # of float32: the type
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)  # of a tile that is measured: dense, then as `tokens`

    def tile(self, kept: int, shared: int) -> int:
        """Returns the tokens of the widest tile."""
        return self.dense if kept == 16 else self.tokens[(1, 2, 4).index(shared)]

    def measured_rows(self, kept: int, shared: int) -> int:
        """Returns the rows of the widest tile."""
        return self.rows[0 if kept == 16 else (0, 1, 2, 4).index(shared)]


INT8 = (
    Kernel("avx2", "x86", ("skylake-avx512", "icelake-server", "znver4"), 3, (9, 5, 3), rows=(32, 8, 16, 32)),
    Kernel("avx512vnni", "x86", ("cascadelake", "icelake-server", "znver4"), 5, (10, 10, 5), rows=(64, 8, 8, 64)),
    Kernel("dotprod", "arm", ("neoverse-n1", "apple-m1"), 5, (8, 10, 4)),
    Kernel("i8mm", "arm", ("neoverse-v1", "neoverse-v2"), 5, (8, 10, 4)),
)
FP32 = (
    Kernel("avx2", "x86", ("skylake-avx512", "icelake-server", "znver4"), 0, (6, 6, 3), "float __vector(8)"),
    Kernel("avx512", "x86", ("skylake-avx512", "icelake-server", "znver4"), 0, (7, 7, 6), "float __vector(16)"),
    Kernel(
        "baseline", "arm", ("neoverse-n1", "neoverse-v1", "neoverse-v2", "apple-m1"), 0, (12, 12, 6),
        "float __vector(4)",
    ),
)  # fmt: skip
HERE = "znver4"
# On Zen 4, as shares of the peak of multiply-adds on registers (runtimes/native/NOTES.md).
FP32_MEASURED = {
    ("avx512", FP32_OWN): "95 %", ("avx512", "8:16, 2 rows share"): "99 %",
    ("avx512", "8:16, 4 rows share"): "97–100 %", ("avx2", FP32_OWN): "84–86 %",
    ("avx2", "8:16, 2 rows share"): "97 %", ("avx2", "8:16, 4 rows share"): "92–99 %",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One loop on one processor. `measured` are cycles per kept product on the processor of this machine."""

    precision: str
    kernel: str
    processor: str
    kind: str
    instructions: int
    kept_share: float
    cycles_per_product: float
    over_dense: float = 0
    measured: float | None = None
    measured_over_dense: float | None = None

    @property
    def dense_equivalent(self) -> float:
        """The products of a dense layer that a cycle stands for."""
        return 1 / self.cycles_per_product / self.kept_share


def matrix_loop() -> list[str]:
    """Returns a dense loop of 8 rows by 8 tokens with usmmla, the fastest dense int8 with i8mm; we have none."""
    loads = [f"ldr q{i}, [x0, #{16 * i}]" for i in range(4)] + [f"ldr q{4 + i}, [x1, #{16 * i}]" for i in range(4)]
    multiplies = [f"usmmla v{16 + 4 * i + j}.4s, v{i}.16b, v{4 + j}.16b" for i in range(4) for j in range(4)]
    return [*loads, *multiplies, "add x0, x0, #64", "add x1, x1, #64", "cmp x0, x2", "b.ne 0"]


def register_loop(kernel: Kernel) -> list[str]:
    """Returns a loop of independent multiply-adds on registers only."""
    if kernel.family == "arm":
        return [*(f"fmla v{i}.4s, v30.4s, v31.4s" for i in range(24)), "subs x0, x0, #1", "b.ne 0"]
    name, count = ("zmm", 24) if kernel.name == "avx512" else ("ymm", 12)
    return [
        *(f"vfmadd231ps %{name}14, %{name}15, %{name}{i + 4 * (i > 11)}" for i in range(count)),
        "dec %rax",
        "jne 0",
    ]


def row_of(kernel: Kernel, precision: str, processor: str, kind: str, loop: Sequence[str], kept: float) -> Row:
    """Returns the estimate of one loop."""
    per_product = cycles(loop, FAMILIES[kernel.family], processor) / products_of(loop)
    return Row(precision, kernel.name, processor, kind, len(loop), kept, per_product)


def int8_rows(kernel: Kernel, folder: Path) -> list[Row]:
    """Returns the estimates of one int8 kernel."""
    machine, file, rows = FAMILIES[kernel.family].machine, folder / f"int8_gemm_{kernel.name}.o", []
    for kept, shared, kind in INT8_KINDS:
        loop = loops_of(file, f"multiply<{kept}, {shared}, false, {kernel.tile(kept, shared)}>", machine)[0]
        rows += [row_of(kernel, "int8", name, kind, loop.instructions, kept / 16) for name in kernel.processors]
    if kernel.name == "i8mm":
        rows += [row_of(kernel, "int8", name, MATRIX_DENSE, matrix_loop(), 1) for name in kernel.processors]
    return relative(rows, INT8_KINDS[0][2])


def fp32_rows(kernel: Kernel, folder: Path) -> list[Row]:
    """Returns the estimates of one float32 kernel. Own patterns run two loops, which are weighted by COMMON."""
    machine, file, rows = FAMILIES[kernel.family].machine, folder / f"nm_gemm_{kernel.name}.o", []
    for processor in kernel.processors:
        rows.append(row_of(kernel, "fp32", processor, FP32_DENSE, register_loop(kernel), 1))
        for shared, kind in ((1, FP32_OWN), (2, "8:16, 2 rows share"), (4, "8:16, 4 rows share")):
            name = f"{kernel.vector}, {max(shared, 2)}, {kernel.tile(8, shared)}, false, {str(shared == 1).lower()}>"
            found = loops_of(file, f"multiply<{name}", machine)
            most = products_of(found[0].instructions)
            loops = sorted((one for one in found if products_of(one.instructions) == most), key=selects_columns)
            made = [row_of(kernel, "fp32", processor, kind, one.instructions, 0.5) for one in loops]
            if shared == 1:
                both, own = made[0].cycles_per_product, made[-1].cycles_per_product
                made[0] = replace(made[0], cycles_per_product=COMMON * both + (1 - COMMON) * own)
            rows.append(made[0])
    return relative(rows, FP32_DENSE)


def relative(rows: Iterable[Row], dense: str) -> list[Row]:
    """Fills in the ratio over the dense loop of the same processor."""
    rows = list(rows)
    of_dense = {row.processor: row.dense_equivalent for row in rows if row.kind == dense}
    return [replace(row, over_dense=row.dense_equivalent / of_dense[row.processor]) for row in rows]


def measured(folder: Path, objects: Sequence[Path]) -> dict[tuple[str, str], float]:
    """Measures the int8 loops that this processor can run: cycles per kept product, by kernel and kind."""
    program = folder / "int8_loop"
    source = Path(__file__).parent / "lib" / "int8_loop.cpp"
    flags = ["-std=c++17", "-O2", f"-I{build.SOURCES}"]
    subprocess.run(["g++", *flags, source, *objects, "-pthread", "-o", program], check=True)
    wanted = [
        (kernel.name, kept, shared, kernel.measured_rows(kept, shared), kernel.tile(kept, shared))
        for kernel in INT8 if kernel.family == "x86" for kept, shared, _ in INT8_KINDS
    ]  # fmt: skip
    command = [str(program), *(str(value) for one in wanted for value in one)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    kinds = {(str(kept), str(shared)): kind for kept, shared, kind in INT8_KINDS}
    return {(name, kinds[kept, shared]): float(value) for name, kept, shared, value in (line.split() for line in lines)}


def with_measured(rows: Iterable[Row], found: dict[tuple[str, str], float]) -> list[Row]:
    """Adds what was measured to the estimates for the processor of this machine."""
    made = []
    for row in rows:
        value = found.get((row.kernel, row.kind)) if row.processor == HERE and row.precision == "int8" else None
        if value is not None:
            ratio = found[row.kernel, INT8_KINDS[0][2]] / value / row.kept_share
            row = replace(row, measured=value, measured_over_dense=ratio)
        made.append(row)
    return made


def cell(row: Row) -> str:
    """Returns the three estimates of a row."""
    return f"{1000 * row.cycles_per_product:.1f} / {row.dense_equivalent:.0f} / {row.over_dense:.2f}"


def table(rows: Sequence[Row]) -> str:
    """Returns the table of one kernel: estimates for each processor, and what was measured on Zen 4."""
    processors = list(dict.fromkeys(row.processor for row in rows))
    compared = any(row.measured or (row.kernel, row.kind) in FP32_MEASURED for row in rows)
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        by_processor = {row.processor: row for row in rows if row.kind == kind}
        line = [kind, *(cell(by_processor[name]) for name in processors)]
        if compared:
            line += comparison(by_processor[HERE])
        lines.append(tuple(line))
    heading = ("loop", *(f"{name}, estimated" for name in processors))
    return markdown((*heading, "Zen 4, measured", "estimate's error") if compared else heading, lines)


def comparison(row: Row) -> list[str]:
    """Returns what was measured, and by how much the estimated cycles and the estimated ratio differ from it."""
    if row.precision == "fp32":
        share = FP32_MEASURED.get((row.kernel, row.kind))
        return [f"{share} of the peak", f"estimated {row.over_dense / 2:.0%} of the peak"] if share else ["–", "–"]
    if row.measured is None or row.measured_over_dense is None:
        return ["–", "–"]
    error, ratio_error = row.cycles_per_product / row.measured - 1, row.over_dense / row.measured_over_dense - 1
    equivalent = 1 / row.measured / row.kept_share
    return [
        f"{1000 * row.measured:.1f} / {equivalent:.0f} / {row.measured_over_dense:.2f}",
        f"cycles {error:+.0%}, ratio {ratio_error:+.0%}",
    ]


def main() -> None:
    """Estimates, measures, and writes both results files."""
    tool = subprocess.run([estimator(), "--version"], check=True, capture_output=True, text=True).stdout
    version = next(line.strip() for line in tool.splitlines() if "version" in line)
    with tempfile.TemporaryDirectory() as name:
        folders = {family: Path(name) / family for family in FAMILIES}
        objects = {family: compiled(FAMILIES[family], folder) for family, folder in folders.items()}
        rows = [row for kernel in INT8 for row in int8_rows(kernel, folders[kernel.family])]
        rows += [row for kernel in FP32 for row in fp32_rows(kernel, folders[kernel.family])]
        rows = with_measured(rows, measured(Path(name), objects["x86"]))
    report(rows, version)


def report(rows: Sequence[Row], version: str) -> None:
    """Writes both results files."""
    stored: list[dict[str, Any]] = [{**asdict(row), "dense_equivalent": row.dense_equivalent} for row in rows]
    write("instruction_counts", QUESTION, processor_name(), (), stored, {"llvm-mca": version})
    parts = [
        f"# {QUESTION}\n",
        f'Columns named "estimated" are {version}\'s static estimates and were not measured: one innermost loop, all '
        "data in the L1 cache, no mispredicted branch, no stores, no quantisation. Nothing here was run on ARM or "
        f'Intel hardware. "Measured" is the same loop on {processor_name()} (a Zen 4), first decile of 401 rounds.\n',
        "Three models are doubtful. Zen 4's counts `vpdpbusd` between 512-bit registers at half its measured rate, "
        "so its cycles with VNNI are twice the measured ones. Neoverse V1's counts `tbl` as two operations. Apple "
        "M1's has three vector units where the processor has four, and other rates for `fmla` by element, so that "
        "the ratio over multiply-adds on registers can exceed 2.\n",
        "Each cell: cycles per 1,000 kept products / products of the dense layer per cycle / times the dense loop of "
        "the same table.\n",
    ]
    for precision, kernels in (("int8", INT8), ("fp32", FP32)):
        for kernel in kernels:
            own = [row for row in rows if (row.precision, row.kernel) == (precision, kernel.name)]
            parts.append(f"### {precision}, {'NEON' if kernel.name == 'baseline' else kernel.name}\n\n{table(own)}")
    (RESULTS / "instruction_counts.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
