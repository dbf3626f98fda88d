"""ONNX Runtime on the CPU. Target `ort`.

By itself it has no N:M kernels and runs a masked weight as a dense one; native/ adds one, which build() uses where it
was built and measured to be faster. Sessions are checked for the provider that was asked for, because ONNX Runtime
falls back silently.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mpcompile.export.onnx_export import Exported
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup
from mpcompile.runtimes import native
from mpcompile.runtimes.ort.session import OrtEngine, missing_reason, native_file, session_on
from mpcompile.runtimes.protocol import Build, GemmShape, Prepared, QuantizedBaseline


@dataclass(frozen=True)
class OnnxRuntime:
    """Target `ort`."""

    name: ClassVar[str] = "ort"
    offline: ClassVar[bool] = False

    def kernels(self) -> str:
        """Any, where our kernel is there."""
        missing = native.missing()
        return f"none: {missing}" if missing else f"any N:M in float32 ({native.instruction_set()})"

    def has_kernel(self, pattern: NM) -> bool:
        """Whether our kernel is there: it takes any pattern. That it is faster is measured when an engine is built."""
        return native.missing() is None

    def auto_patterns(self) -> tuple[NM, ...]:
        """N of 32 for every N that is surely faster than dense on this machine."""
        from mpcompile.runtimes.native import auto_patterns as auto

        library = native.library()
        return auto.worth_having(auto.measured(library)) if library else ()

    def predicted(self, products: Mapping[str, GemmShape]) -> Mapping[str, Speedup]:
        """How many times as fast as dense each product is here: measured on random weights, one of each shape."""
        from mpcompile.runtimes.native.auto_patterns import speedup_of

        library = native.library()
        if library is None:
            return {}
        known = {
            product: speedup_of(product.pattern, product.out, product.in_, product.tokens, library)
            for product in dict.fromkeys(products.values())
        }
        return {name: known[product] for name, product in products.items()}

    def references(
        self, exported: Exported, build: Build, images: NDArray[np.float32], folder: Path
    ) -> Mapping[str, QuantizedBaseline | str]:
        """The dense model in int8, by dynamic and by static quantisation, each as exact as this processor allows."""
        from mpcompile.runtimes.ort.int8 import quantised, saturates

        return quantised(exported, build.threads, images, folder, saturating=saturates())

    def shipped(self, exported: Exported, threads: int | None) -> "tuple[Path, OrtEngine] | None":
        """`….native.onnx` on our kernel, with the layers on it that were chosen when the model was compiled."""
        file, library = native_file(exported.onnx), native.library()
        return (file, session_on(file, threads, library)) if library and file.is_file() else None

    def missing(self) -> str | None:
        """What to install, or None."""
        return missing_reason()

    def idle(self) -> str | None:
        """It runs where it is installed."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """It runs float32 and float16 on any number of threads."""
        return "it has no bfloat16 kernels on a CPU; use fp32 or fp16" if precision == "bf16" else None

    def versions(self) -> Mapping[str, str]:
        """The library's own word: it comes as onnxruntime or as onnxruntime-gpu."""
        import onnxruntime

        kernel = {} if native.missing() else {"N:M kernel": native.instruction_set()}
        return {"onnxruntime": onnxruntime.__version__, **kernel}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Nothing: it runs the file as it is."""
        return Prepared()

    def build(self, exported: Exported, build: Build) -> OrtEngine:
        """A session on the CPU, with that many threads or ONNX Runtime's own choice; masked products on our kernel
        where that is faster here.
        """
        library = native.library() if build.sparse and exported.masks else None
        if library is None:
            return session_on(exported.onnx, build.threads)
        from mpcompile.runtimes.ort.native_kernel import native_engine

        return native_engine(exported, build, library)
