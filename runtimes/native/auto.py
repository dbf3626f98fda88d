"""Which densities are worth having on this machine: the kernel beside ONNX Runtime's dense one, on one usual product.

The kernel's speed goes by how much is kept and hardly by M, and of patterns of one density the widest keeps the most.
So all are N of 32, and those stay that are surely faster.
"""

from pathlib import Path

import numpy as np

from mpcompile.model import NM
from mpcompile.runtimes.native.graph import Product
from mpcompile.runtimes.native.node import GEMM
from mpcompile.runtimes.native.pack import pack
from mpcompile.runtimes.native.trial import measure
from mpcompile.timing import Speedup

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
    product = Product(("random",), "random", GEMM, "x", "y", ("y",), "w", pattern, weight, np.zeros(out, np.float32))
    return measure(product, pack(weight, pattern.of), (1, tokens, in_), library, threads, seconds)[2]


def worth_having(library: Path) -> tuple[NM, ...]:
    """The patterns N of GROUP that are surely faster than dense here."""
    patterns = (NM(kept, GROUP) for kept in KEPT)
    return tuple(p for p in patterns if speedup_of(p, CHANNELS, CHANNELS, TOKENS, library).interval[0] > 1)
