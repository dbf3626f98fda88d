"""Target `trt`: TensorRT 10 and 11.

Networks are strongly typed, the only mode of TensorRT 11: the builder uses the precision of the file. Only what both
versions have is used. Without a GPU no engine can be built. Files are then checked against the rules in rules.py, and
the report lists the commands to run on a machine with a GPU.
"""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import onnx
import torch

from mpcompile.errors import RuntimeMissing, UsageError
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import nested
from mpcompile.ir.precision import Precision
from mpcompile.runtimes.nvidia import Gpu, first_gpu, import_failure
from mpcompile.runtimes.protocol import Build, Engine, Prepared
from mpcompile.runtimes.tensorrt.quantization_rules import FP8_CAPABILITY, eight_bit_note
from mpcompile.runtimes.tensorrt.rules import AMPERE, TWO_FOUR, implies_two_four, refusals, verdicts_of

log = logging.getLogger(__name__)

INSTALL = "pip install 'mpcompile[trt]'"
FP8_SMALLEST = (8, 9)  # compute capability of Ada; Hopper has 9.0


@dataclass(frozen=True)
class TensorRT:
    """The target `trt`."""

    name: ClassVar[str] = "trt"
    offline: ClassVar[bool] = True

    def kernels(self) -> str:
        """Returns 2:4, which sparse tensor cores compute."""
        return str(TWO_FOUR)

    def has_kernel(self, pattern: NM) -> bool:
        """Whether every mask of the pattern is also 2:4, such as those of 1:4."""
        return implies_two_four(pattern)

    def auto_patterns(self) -> tuple[NM, ...]:
        """Returns 2:4."""
        return (TWO_FOUR,)

    def patterns_at(self, density: Fraction, precision: Precision, rows: int) -> tuple[NM, ...]:
        """Returns 2:4 for 50 %. Raises UsageError for any other density."""
        if density != Fraction(TWO_FOUR.keep, TWO_FOUR.of):
            raise UsageError(
                f"target {self.name} runs {TWO_FOUR} and no other pattern faster than dense, so a density of "
                f"{float(100 * density):g}% gains no speed over 50%; give --pattern 50%, or name a pattern, such as "
                f"{nested(density)[-1]}"
            )
        return (replace(TWO_FOUR, rows=rows),)

    def missing(self) -> str | None:
        """Returns why no engine can be built here and what to install, or None."""
        gpu = first_gpu()
        if isinstance(gpu, str):
            return f"{gpu}; TensorRT builds engines only on the GPU that they are for"
        if importlib.util.find_spec("tensorrt") is None:
            return f"TensorRT is not installed: {INSTALL}"
        if broken := import_failure("tensorrt"):
            return f"TensorRT is installed and does not import ({broken}): {INSTALL}"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} is built without CUDA, and TensorRT needs it: install one with CUDA"
        return None

    def idle(self) -> str | None:
        """Returns None: where engines can be built, they run."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Returns why `--threads` cannot be used, or why the GPU of this machine cannot run fp8."""
        if precision == "fp8" and isinstance(gpu := first_gpu(), Gpu) and gpu.capability < FP8_SMALLEST:
            found = ".".join(map(str, gpu.capability))
            return f"fp8 needs compute capability 8.9 or newer, and {gpu.name} has {found}; use int8"
        return None if threads is None else "--threads is for targets on a CPU; leave it out"

    def quantization(self, precision: Precision) -> Mapping[str, Any]:
        """Returns symmetric activations, and 8-bit outputs of all layers: sparse int8 products need both."""
        return {"activations": "fp8" if precision == "fp8" else "s8", "outputs": "all"}

    def has_quantized_kernel(self, pattern: NM) -> bool:
        """Whether every mask of the pattern is also 2:4, as for `has_kernel`."""
        return implies_two_four(pattern)

    def versions(self) -> Mapping[str, str]:
        """Returns the TensorRT version; empty if it cannot be imported."""
        if self.missing():
            return {}
        import tensorrt as trt

        return {"tensorrt": trt.__version__}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Returns the verdicts of the rules on the file, and the commands that build and measure it on a GPU."""
        file = onnx.load(exported.onnx, load_external_data=True)
        notes = [f"{exported.onnx.name}: TensorRT may refuse {refusal}" for refusal in refusals(file)]
        if not notes:
            notes.append(f"{exported.onnx.name} breaks none of the {self.name} rules that can be checked without a GPU")
        if (counted := eight_bit_note(file)) is not None:
            notes.append(f"{exported.onnx.name}: {counted}")
        if exported.precision == "fp8":
            notes.append(f"{exported.onnx.name}: {FP8_CAPABILITY.says}")
        return Prepared(verdicts_of(file, exported.masks), tuple(notes), trtexec(exported, build))

    def build(self, exported: Exported, build: Build) -> Engine:
        """Builds an engine, with its files in `build.folder` if given. Raises RuntimeMissing or BuildError."""
        gpu = first_gpu()
        if isinstance(gpu, str) or (missing := self.missing()):
            raise RuntimeMissing(f"target {self.name}: {gpu if isinstance(gpu, str) else missing}")
        from mpcompile.runtimes.tensorrt.builder import build_engine

        if build.sparse and exported.masks and gpu.capability < (8, 0):
            log.warning("%s has no sparse tensor cores: %s", gpu.name, AMPERE.says)
        return build_engine(exported, build, gpu)


def trtexec(exported: Exported, build: Build) -> tuple[str, ...]:
    """Returns the trtexec command that builds the file's engine on a GPU and times it.

    It is the same for TensorRT 10 and 11 and for every precision: in a strongly typed network the file gives the types,
    8-bit ones by its QuantizeLinear nodes, and `--int8`, `--fp8` and `--fp16` do not go with it.
    """
    profile = build.profile(exported)
    shapes = ""
    if profile:
        shapes = "".join(
            f" --{kind}Shapes={exported.input_names[0]}:{'x'.join(map(str, shape))}"
            for kind, shape in zip(("min", "opt", "max"), profile, strict=True)
        )
    sparsity = "enable" if exported.masks else "disable"
    return (
        f"trtexec --onnx={exported.onnx.name} --stronglyTyped --sparsity={sparsity}{shapes} "
        f"--profilingVerbosity=detailed --verbose --saveEngine={exported.onnx.stem}.engine",
    )
