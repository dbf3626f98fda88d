"""Target `ort`: ONNX Runtime on the CPU.

ONNX Runtime itself has no N:M kernels and runs masked weights as dense. native/ adds one. If its library is built,
build() uses it for the products that are measured to be faster with it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpcompile.export.mask_check import ProvenMask
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import QUANTIZED, Precision
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.timing import Speedup
from mpcompile.runtimes import native
from mpcompile.runtimes.ort.session import OrtEngine, fast_engine, missing_reason, native_file, session_on
from mpcompile.runtimes.protocol import Build, GemmShape, Prepared, QuantizedBaseline
from mpcompile.runtimes.quantized import QuantizedGemm, QuantizedSpeed

log = logging.getLogger(__name__)
BLOCK = 16  # input channels from which one shuffle of the int8 kernel selects
WITHOUT_LIBRARY = "%s needs the native N:M kernel, which cannot be used here: %s. %s runs instead, without it"
NO_INT8_KERNEL = "the native int8 kernel cannot be used ({}): it runs on ONNX Runtime's dense kernels"


@dataclass(frozen=True)
class OnnxRuntime:
    """The target `ort`."""

    name: ClassVar[str] = "ort"
    several_inputs: ClassVar[bool] = True
    offline: ClassVar[bool] = False

    def kernels(self) -> str:
        """Returns any N:M if the native kernel can be used, otherwise why not."""
        missing = native.missing()
        if missing:
            return f"none: {missing}"
        return (
            f"any N:M in float32 ({native.instruction_set()}); in int8 at most 8 kept of 16 "
            f"({native.int8_instruction_set()})"
        )

    def has_kernel(self, pattern: NM) -> bool:
        """Whether the native kernel can be used; it takes any pattern. build() measures whether it is faster."""
        return native.missing() is None

    def auto_patterns(self) -> tuple[NM, ...]:
        """Returns the N:32 patterns that are measured to be significantly faster than dense on this machine.

        Raises UsageError if none is.
        """
        from mpcompile.runtimes.native import auto_patterns as auto

        library = native.library()
        return auto.significantly_faster(auto.measured(library)) if library else ()

    def patterns_at(self, density: Fraction, precision: Precision, rows: int) -> tuple[NM, ...]:
        """Returns the patterns that the native kernel runs at one speed; the same where it cannot be used."""
        from mpcompile.runtimes.native.equal_speed import equally_fast

        return equally_fast(density, precision, rows)

    def predicted(self, products: Mapping[str, GemmShape]) -> Mapping[str, Speedup]:
        """Returns the measured speedup over dense of each product, on random weights; equal ones are measured once."""
        from mpcompile.runtimes.native.auto_patterns import speedup_of

        library = native.library()
        if library is None:
            return {}
        speedups = {
            product: speedup_of(product.pattern, product.out, product.in_, product.tokens, library)
            for product in dict.fromkeys(products.values())
        }
        return {name: speedups[product] for name, product in products.items()}

    def auto_quantized_patterns(self, precision: Precision, rows: int) -> tuple[NM, ...]:
        """Returns those of 8:16 and 4:16 that are measured to be significantly faster than dense int8 on this machine.

        Raises UsageError if none is.
        """
        from mpcompile.runtimes.native import int8_speeds
        from mpcompile.runtimes.native.auto_patterns import significantly_faster

        library = native.library()
        if library is None:
            return ()
        measured = int8_speeds.measured_patterns(library, rows)
        speedups = {pattern: speed.masked for pattern, speed in measured.items() if speed.masked}
        return significantly_faster(speedups, f"dense {precision}")

    def predicted_quantized(
        self, products: Mapping[str, QuantizedGemm], precision: Precision
    ) -> Mapping[str, QuantizedSpeed]:
        """Returns the measured speed of each product, on random weights; equal ones are measured once."""
        from mpcompile.runtimes.native import int8_speeds

        library = native.library()
        if library is None:
            return {}
        speeds = {product: int8_speeds.speed_of(product, library) for product in dict.fromkeys(products.values())}
        return {name: speeds[product] for name, product in products.items()}

    def references(
        self, exported: Exported, build: Build, images: NDArray[np.float32], folder: Path
    ) -> Mapping[str, QuantizedBaseline | str]:
        """Returns the dense model in int8, by dynamic and static quantisation, as accurate as this CPU allows."""
        from mpcompile.runtimes.ort.int8 import quantised, saturates

        return quantised(exported, build.threads, images, folder, saturating=saturates())

    def shipped(self, exported: Exported, threads: int | None) -> "tuple[Path, OrtEngine] | None":
        """Returns `….native.onnx`, whose native layers were selected at compile time, and its engine, if both exist."""
        file, library = native_file(exported.onnx), native.library()
        if library is None or not file.is_file():
            return None
        return file, replace(session_on(file, threads, library), exact=exported.precision != "int8")

    def load_file(self, exported: Exported, threads: int | None) -> OrtEngine:
        """An engine on `….native.onnx` if that file and our kernel are there, else on the ONNX file itself.

        If only the kernel is absent, a warning gives the reason.
        """
        if shipped := self.shipped(exported, threads):
            return shipped[1]
        if (file := native_file(exported.onnx)).is_file():
            log.warning(WITHOUT_LIBRARY, file.name, native.missing(), exported.onnx.name)
        return fast_engine(exported, threads)

    def missing(self) -> str | None:
        """Returns what to install, or None."""
        return missing_reason()

    def idle(self) -> str | None:
        """Returns None: it runs where it is installed."""
        return None

    def quantization(self, precision: Precision) -> Mapping[str, Any]:
        """Returns u8 activations, which its fast products take, and 8-bit outputs of convolutions only.

        On a processor whose products saturate at 16 bits, the weights must also fit into the lanes of the kernels: of
        the native kernel in masked layers, if it can be used, and of ONNX Runtime elsewhere.
        """
        from mpcompile.runtimes.ort.int8 import saturates

        lanes = "none" if not saturates() else "pairs" if native.missing() else "blocks"
        return {"activations": "u8", "outputs": "convolutions", "lanes": lanes}

    def has_quantized_kernel(self, pattern: NM) -> bool:
        """Whether the native int8 kernel can be used and skips zeros of this pattern: at most half of 16 are kept."""
        return native.missing() is None and 2 * pattern.keep <= pattern.of and BLOCK % pattern.of == 0

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Returns why it cannot run bf16 and fp8; other precisions run on any number of threads."""
        if precision == "fp8":
            return "it has no FP8 kernels on a CPU; use int8"
        return "it has no bfloat16 kernels on a CPU; use fp32 or fp16" if precision == "bf16" else None

    def versions(self) -> Mapping[str, str]:
        """Returns the versions of ONNX Runtime (onnxruntime or onnxruntime-gpu) and of the native kernel."""
        import onnxruntime

        kernel = {} if native.missing() else {"N:M kernel": native.instruction_set()}
        return {"onnxruntime": onnxruntime.__version__, **kernel}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Returns, for a file in 8 bits without our kernel, why each masked layer runs as dense.

        For an int8 file with our kernel, a note tells if ONNX Runtime's own kernels can saturate in masked layers.
        """
        missing = native.missing()
        if exported.precision not in QUANTIZED:
            several = len(exported.input_names) > 1 and exported.masks
            return Prepared(notes=(SEVERAL_INPUTS,)) if several else Prepared()
        if missing is not None:
            return Prepared(tuple(dense_in_8_bits(mask, missing) for mask in exported.masks))
        from mpcompile.runtimes.ort.saturation import note

        return Prepared(notes=note(exported))

    def build(self, exported: Exported, build: Build) -> OrtEngine:
        """Returns a session on the CPU, with `build.threads` threads or ONNX Runtime's default number.

        Masked products of float files, and products of int8 files, run on the native kernels if these are measured to
        be faster. Raises RuntimeMissing or BuildError.
        """
        replaceable = exported.masks if exported.precision not in QUANTIZED else exported.precision == "int8"
        one_input = len(exported.input_names) == 1  # layers are timed with images alone
        library = native.library() if build.sparse and replaceable and one_input else None
        if library is None:
            return fast_engine(exported, build.threads)
        from mpcompile.runtimes.ort.native_kernel import native_engine

        return native_engine(exported, build, library)


SEVERAL_INPUTS = "masked layers run as dense: the N:M kernels are selected for models with one input"


def dense_in_8_bits(mask: ProvenMask, missing: str) -> LayerVerdict:
    """The verdict on a masked layer of a file in 8 bits if the native kernel is `missing`, for this reason."""
    return LayerVerdict(
        layer=mask.layer,
        initializer=mask.initializer,
        op=mask.op,
        pattern=mask.pattern,
        eligible=False,
        rule="kernel",
        reason=NO_INT8_KERNEL.format(missing),
        chosen=False,
    )
