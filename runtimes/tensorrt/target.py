"""TensorRT 10 and 11. Target `trt`.

Networks are strongly typed: the precision is the file's, and nothing else is asked of the builder, since TensorRT 11
has no other way. Nothing is used that is not in both. Without a GPU no engine can be built; then files are checked
against the rules of tensorrt_rules.py, and the report says which commands to run where there is one.
"""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import torch

from mpcompile.errors import RuntimeMissing
from mpcompile.export.onnx_export import INPUT, Exported
from mpcompile.ir.pattern import NM
from mpcompile.runtimes.nvidia import first_gpu, import_failure
from mpcompile.runtimes.protocol import Build, Engine, Prepared
from mpcompile.runtimes.tensorrt.rules import AMPERE, TWO_FOUR, implies_two_four, refusals, verdicts_of

log = logging.getLogger(__name__)


INSTALL = "pip install 'mpcompile[trt]'"


@dataclass(frozen=True)
class TensorRT:
    """Target `trt`."""

    name: ClassVar[str] = "trt"
    offline: ClassVar[bool] = True

    def kernels(self) -> str:
        """One, on GPUs with sparse tensor cores."""
        return str(TWO_FOUR)

    def has_kernel(self, pattern: NM) -> bool:
        """Whether no four channels keep more than two, as 1:4 or 2:8 do not either."""
        return implies_two_four(pattern)

    def auto_patterns(self) -> tuple[NM, ...]:
        """The one that it has."""
        return (TWO_FOUR,)

    def missing(self) -> str | None:
        """What keeps engines from being built here, or None."""
        gpu = first_gpu()
        if isinstance(gpu, str):
            return f"{gpu}; TensorRT builds engines only on the GPU that they are for"
        if importlib.util.find_spec("tensorrt") is None:
            return f"TensorRT is not installed: {INSTALL}"
        if broken := import_failure("tensorrt"):
            return f"TensorRT is installed and does not import ({broken}): {INSTALL}"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} is built without CUDA, and device memory is its: install one with CUDA"
        return None

    def idle(self) -> str | None:
        """Where it is there, engines run."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """It takes any precision; threads are nothing that an engine has."""
        return None if threads is None else "threads are those of a CPU; leave --threads out"

    def versions(self) -> Mapping[str, str]:
        """The library's own word, where it can be asked."""
        if self.missing():
            return {}
        import tensorrt as trt

        return {"tensorrt": trt.__version__}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """What the rules say of the file, and the commands that build and measure it on a GPU."""
        file = onnx.load(exported.onnx, load_external_data=True)
        notes = [f"{exported.onnx.name}: TensorRT may refuse {refusal}" for refusal in refusals(file)]
        if not notes:
            notes.append(f"{exported.onnx.name} breaks none of the {self.name} rules that can be checked without a GPU")
        return Prepared(verdicts_of(file, exported.masks), tuple(notes), trtexec(exported, build))

    def build(self, exported: Exported, build: Build) -> Engine:
        """An engine, its files in `build.folder` if there is one. Raises RuntimeMissing or BuildError."""
        gpu = first_gpu()
        if isinstance(gpu, str) or (missing := self.missing()):
            raise RuntimeMissing(f"target {self.name}: {gpu if isinstance(gpu, str) else missing}")
        from mpcompile.runtimes.tensorrt.engine import engine_from

        if build.sparse and exported.masks and gpu.capability < (8, 0):
            log.warning("%s has no sparse tensor cores: %s", gpu.name, AMPERE.says)
        return engine_from(exported, build, gpu)


def trtexec(exported: Exported, build: Build) -> tuple[str, ...]:
    """The commands that build the file on a GPU with NVIDIA's own tool, and ours."""
    profile = build.profile(exported)
    shapes = ""
    if profile:
        shapes = "".join(
            f" --{kind}Shapes={INPUT}:{'x'.join(map(str, shape))}"
            for kind, shape in zip(("min", "opt", "max"), profile, strict=True)
        )
    sparsity = "enable" if exported.masks else "disable"
    return (
        f"trtexec --onnx={exported.onnx.name} --stronglyTyped --sparsity={sparsity}{shapes} "
        f"--profilingVerbosity=detailed --verbose --saveEngine={exported.onnx.stem}.engine",
    )
