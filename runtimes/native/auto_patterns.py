"""Measures which N:32 patterns are faster than dense on this machine, on one ViT-B shape, for `--pattern auto`.

The kernel's speed depends on the density and hardly on M. Of patterns with the same density, the one with the widest
groups keeps the most saliency. All candidates are therefore N:32, and those that are significantly faster are used.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup
from mpcompile.runtimes.native.custom_op import GEMM
from mpcompile.runtimes.native.microbenchmark import measure
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm
from mpcompile.runtimes.native.packing import pack

log = logging.getLogger(__name__)

GROUP = 32
KEPT = (8, 12, 16, 20, 24, 28)
TOKENS, CHANNELS = 197, 768  # ViT-B at 224 pixels


def speedup_of(
    pattern: NM, out: int, in_: int, tokens: int, library: Path, threads: int | None = None, seconds: float = 0.2
) -> Speedup:
    """Returns the measured speedup over dense of a GEMM of this pattern and shape, on random weights."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out, in_)).astype(np.float32)
    scores = np.abs(weight).reshape(out // pattern.rows, pattern.rows, in_ // pattern.of, pattern.of).sum(1)
    largest = np.argsort(-scores, axis=-1)[..., : pattern.keep]
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, largest, True, axis=-1)
    weight *= np.repeat(kept.reshape(len(scores), in_), pattern.rows, axis=0)
    product = MaskedGemm(("random",), "random", GEMM, "x", "y", ("y",), "w", pattern, weight, np.zeros(out, np.float32))
    return measure(product, pack(weight, pattern.of), (1, tokens, in_), library, threads, seconds)[2]


def measured(library: Path) -> dict[NM, Speedup]:
    """Returns the measured speedup of each candidate pattern, with CHANNELS inputs and outputs and TOKENS tokens."""
    return {p: speedup_of(p, CHANNELS, CHANNELS, TOKENS, library) for p in (NM(kept, GROUP) for kept in KEPT)}


def significantly_faster(speedups: Mapping[NM, Speedup], dense: str = "dense") -> tuple[NM, ...]:
    """Returns the patterns that are significantly faster than `dense`. Raises UsageError if there is none.

    The speedups are logged: as a warning if an interval includes 1, because the next run may then choose otherwise.
    """
    faster = tuple(pattern for pattern, speedup in speedups.items() if speedup.faster)
    undecided = [pattern for pattern, speedup in speedups.items() if speedup.undecided]
    table = ", ".join(f"{pattern} {speedup.with_interval()}" for pattern, speedup in speedups.items())
    if not faster:
        raise UsageError(
            f"--pattern auto: no pattern is significantly faster than {dense} on this machine now ({table}); try again "
            "when the machine is idle, name the patterns (--pattern 1:4,2:4), or choose by accuracy alone "
            "(--pattern auto:4)"
        )
    if undecided:
        names = ", ".join(map(str, undecided))
        log.warning(
            "--pattern auto leaves out %s: the speedup over %s may be 1 on this machine: %s", names, dense, table
        )
    else:
        log.info("--pattern auto, measured here against %s: %s", dense, table)
    return faster
