"""ONNX Runtime on the CPU with the native N:M kernel for the products that are measured to be faster with it.

The engine runs a copy of the model's file in which native operators replace those products. The copy is written beside
the file as `….native.onnx`. Any ONNX Runtime runs it, because each operator has a fallback in standard ONNX operators;
with the kernel's library registered it runs the native kernel.
"""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcompile.export.mask_check import ProvenMask
from mpcompile.export.onnx_export import INLINE_LIMIT_BYTES, Exported
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.runtimes import native
from mpcompile.runtimes.native import int8_selection
from mpcompile.runtimes.native.int8_conv_ops import CONV
from mpcompile.runtimes.native.int8_ops import GEMM
from mpcompile.runtimes.native.kernel_selection import Choice, accelerate
from mpcompile.runtimes.ort.session import OrtEngine, native_file, session_on
from mpcompile.runtimes.protocol import Build


@dataclass(frozen=True)
class NMEngine(OrtEngine):
    """A session, and the kernel selected for each masked product; in a file in 8 bits, for each 8-bit product."""

    choices: tuple[Choice, ...]

    def judged(
        self,
        verdicts: Sequence[LayerVerdict],
        masks: Sequence[ProvenMask],
        images: NDArray[np.float32],
        unused: object = None,
    ) -> tuple[LayerVerdict, ...]:
        """Returns one row per masked layer, from the measurements made when the engine was built."""
        by_layer = {mask.layer: mask for mask in masks}
        instructions = native.instruction_set() if self.exact else native.int8_instruction_set()
        rows = []
        for choice in self.choices:
            for layer in choice.layers:
                mask = by_layer.get(layer)
                if mask is None:  # a dense layer in 8 bits
                    continue
                operator = "NMGemm" if self.exact else CONV if mask.op == "Conv" else GEMM
                eligible = choice.dense is not None and choice.skips_zeros
                chosen = choice.native and choice.skips_zeros
                rows.append(
                    LayerVerdict(
                        layer=layer,
                        initializer=mask.initializer,
                        op=mask.op,
                        pattern=mask.pattern,
                        eligible=eligible,
                        rule="measured" if eligible else "kernel",
                        reason=choice.reason,
                        chosen=chosen,
                        kernel=f"{operator}, {instructions}" if chosen else None,
                        dense_ms=choice.dense.p50_ms if choice.dense else None,
                        sparse_ms=choice.sparse.p50_ms if choice.sparse else None,
                        speedup=choice.speedup.ratio if choice.speedup else None,
                    )
                )
        return tuple(rows)


def native_engine(exported: Exported, build: Build, library: Path) -> NMEngine:
    """Builds the engine. Kernels are selected at the smallest batch of `build`, and kept if they win at all batches.

    If the file with native operators is not significantly faster than the dense file at every batch of `build`, native
    operators are dropped until it is, or all of them: the engine then runs the dense file. Raises BuildError.
    """
    rng = np.random.default_rng(0)
    sizes = [exported.batch] if exported.batch else sorted(set(build.batches))
    smallest, *larger = (rng.standard_normal((size, *exported.image_shape)).astype(np.float32) for size in sizes)
    exact = exported.precision != "int8"
    select = accelerate if exact else int8_selection.accelerate
    accelerated = select(onnx.load(exported.onnx), exported.masks, library, smallest, build.threads, also=larger)
    if not accelerated.count:
        session = session_on(exported.onnx, build.threads).session
        return NMEngine(session, exported.onnx, accelerated.choices, exact=exact)
    folder = build.folder or Path(tempfile.mkdtemp())
    path = native_file(folder / exported.onnx.name)
    onnx.save_model(
        accelerated.file,
        path,
        save_as_external_data=accelerated.file.ByteSize() > INLINE_LIMIT_BYTES,
        location=f"{path.name}.data",
    )
    engine = NMEngine(session_on(path, build.threads, library).session, path, accelerated.choices, exact=exact)
    if build.folder is None:  # the file lasts as long as the engine
        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
    return engine
