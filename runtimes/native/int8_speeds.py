"""Times products in int8 on this machine, masked and dense, on random weights: for `--pattern auto` and `analyze`.

A dense int8 layer runs on ONNX Runtime's kernel or on the native one. A masked layer saves time only if it is faster
than the same layer dense on the faster of the two. So all kernels are timed in turns, and the dense fp32 kernel too.

The native kernel skips zeros for at most 8 and for at most 4 kept of 16. Of the patterns with one of these densities,
8:16 and 4:16 keep the most saliency, so these are the candidates of `--pattern auto`.
"""

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Call, speedup
from mpcompile.runtimes.native.auto_patterns import CHANNELS, TOKENS
from mpcompile.runtimes.native.custom_op import GEMM
from mpcompile.runtimes.native.int8_microbenchmark import native_node, standard_node
from mpcompile.runtimes.native.int8_ops import U8Quantization
from mpcompile.runtimes.native.int8_products import Int8Product
from mpcompile.runtimes.native.microbenchmark import (
    OneNode,
    Samples,
    calls_per_block,
    dense_node,
    judged,
    one_node,
    repeated,
)
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm
from mpcompile.runtimes.quantized import QuantizedGemm, QuantizedSpeed

KEPT, GROUP = (4, 8), 16
# Four weights share a 16-bit lane. Four of this size cannot saturate it, so every processor uses its fastest kernel.
LARGEST = 31
FLOAT, THEIRS, OURS = "dense fp32", "ONNX Runtime's dense int8 kernel", "the native dense int8 kernel"
MASKED = "masked"


def measured_patterns(library: Path, rows: int = 1) -> dict[NM, QuantizedSpeed]:
    """Returns the speed of each candidate of `--pattern auto`, with CHANNELS inputs and outputs and TOKENS tokens.

    `rows` neighbouring output channels share each pattern.
    """
    return {
        pattern: speed_of(QuantizedGemm(CHANNELS, CHANNELS, TOKENS, pattern), library)
        for pattern in (NM(kept, GROUP, rows) for kept in KEPT)
    }


def speed_of(gemm: QuantizedGemm, library: Path, threads: int | None = None, seconds: float = 1.0) -> QuantizedSpeed:
    """Returns the measured speed of a product in int8. Raises BuildError.

    If the comparison of masked and dense is undecided, as many rounds are added once more.
    """
    runs = kernels(gemm, library, threads)
    repeats = calls_per_block(runs[OURS])
    turns = {name: partial(repeated, run, repeats) for name, run in runs.items()}
    return judged(turns, seconds, compared, lambda speed: speed.masked is None or not speed.masked.undecided)[1]


def compared(samples: Samples) -> QuantizedSpeed:
    """Returns the speeds that the samples of FLOAT, THEIRS, OURS and, of a masked product, MASKED show."""
    dense = min((THEIRS, OURS), key=lambda name: float(np.median(samples[name])))
    masked = speedup(samples[dense], samples[MASKED], dense) if MASKED in samples else None
    return QuantizedSpeed(speedup(samples[FLOAT], samples[dense], FLOAT), masked)


def kernels(gemm: QuantizedGemm, library: Path, threads: int | None) -> dict[str, Call]:
    """Returns the calls to time: the product dense on three kernels and, with a pattern, masked on the native one."""
    rng = np.random.default_rng(0)
    x = (1, gemm.tokens, gemm.in_)
    sizes = rng.integers(1, LARGEST, (gemm.in_, gemm.out), endpoint=True)
    weight = (sizes * rng.choice((-1, 1), sizes.shape)).astype(np.int8)
    activations = rng.integers(0, 256, x, dtype=np.uint8)

    def bound(name: str, integers: NDArray[np.int8]) -> OneNode:
        product, native = _product(integers), name != THEIRS
        node = OneNode(native_node(product) if native else standard_node(product), library if native else None, threads)
        node.bind(activations, np.empty((*x[:-1], gemm.out), np.float32))
        return node

    float_weight = np.ascontiguousarray(weight.T.astype(np.float32))
    pattern = gemm.pattern or NM(1, 2)  # a MaskedGemm has one; the dense node does not read it
    floats = MaskedGemm(
        ("random",), "random", GEMM, "x", "y", ("y",), "w", pattern, float_weight, np.zeros(gemm.out, np.float32)
    )
    runs: dict[str, Call] = {FLOAT: one_node(dense_node(floats), floats, x, None, threads)}
    runs |= {name: bound(name, weight) for name in (THEIRS, OURS)}
    if gemm.pattern is not None:
        runs[MASKED] = bound(MASKED, np.where(random_mask(gemm.pattern, weight.shape, rng), weight, np.int8(0)))
    return runs


def random_mask(pattern: NM, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Returns a random mask (columns, rows) of a pattern; groups lie along the columns."""
    columns, rows = shape
    scores = rng.random((columns // pattern.of, pattern.of, -(-rows // pattern.rows)))
    kept = scores.argsort(1).argsort(1) < pattern.keep
    return np.repeat(kept.reshape(columns, -1), pattern.rows, axis=1)[:, :rows]


def _product(integers: NDArray[np.int8]) -> Int8Product:
    """Returns the product with these weights (columns, rows), and with scales and biases that do not matter."""
    rows = integers.shape[1]
    return Int8Product(
        name="random",
        x="x",
        x_quantization=U8Quantization(0.02, 128),
        y="y",
        nodes=("y",),
        initializer="weight",
        weight=integers,
        scale=np.full(rows, 0.01, np.float32),
        bias=np.zeros(rows, np.float32),
    )
