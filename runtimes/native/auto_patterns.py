"""Which densities are worth having on this machine: the kernel beside ONNX Runtime's dense one, on one usual product.

The kernel's speed goes by how much is kept and hardly by M, and of patterns of one density the widest keeps the most.
So all are N of 32, and those stay that are surely faster.
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
TOKENS, CHANNELS = 197, 768  # ViT-B's, at 224 pixels


def speedup_of(
    pattern: NM, out: int, in_: int, tokens: int, library: Path, threads: int | None = None, seconds: float = 0.2
) -> Speedup:
    """How many times as fast as dense a product of that pattern and shape is here, on random weights."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out, in_)).astype(np.float32)
    groups = np.abs(weight).reshape(out // pattern.rows, pattern.rows, in_ // pattern.of, pattern.of).sum(1)
    order = np.argsort(-groups, axis=-1)[..., : pattern.keep]
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order, True, axis=-1)
    weight *= np.repeat(kept.reshape(len(groups), in_), pattern.rows, axis=0)
    product = MaskedGemm(("random",), "random", GEMM, "x", "y", ("y",), "w", pattern, weight, np.zeros(out, np.float32))
    return measure(product, pack(weight, pattern.of), (1, tokens, in_), library, threads, seconds)[2]


def measured(library: Path) -> dict[NM, Speedup]:
    """The speedup over dense of each pattern N of GROUP here, on CHANNELS inputs and outputs and TOKENS tokens."""
    return {p: speedup_of(p, CHANNELS, CHANNELS, TOKENS, library) for p in (NM(kept, GROUP) for kept in KEPT)}


def worth_having(found: Mapping[NM, Speedup]) -> tuple[NM, ...]:
    """The patterns that are surely faster than dense, by what was measured. Raises UsageError where none is.

    What was measured is logged: as a warning where an interval includes 1, since another run may then choose otherwise.
    """
    faster = tuple(pattern for pattern, speedup in found.items() if speedup.faster)
    undecided = [pattern for pattern, speedup in found.items() if speedup.undecided]
    told = ", ".join(f"{pattern} {speedup.with_interval()}" for pattern, speedup in found.items())
    if not faster:
        raise UsageError(
            f"--pattern auto: no pattern is surely faster than dense on this machine now ({told}); try again when the "
            "machine is idle, name the patterns (--pattern 1:4,2:4), or choose by accuracy alone (--pattern auto:4)"
        )
    if undecided:
        names = ", ".join(map(str, undecided))
        log.warning("--pattern auto leaves out %s, whose speed cannot be told from dense here: %s", names, told)
    else:
        log.info("--pattern auto, measured here against dense: %s", told)
    return faster
