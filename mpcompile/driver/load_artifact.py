"""The model of an output folder, ready to run: in its original class, in ONNX Runtime, or as an engine of a target.

Weights are read from safetensors, so that no pickled code is run; and what a report names is not run either unless the
caller says so, since a report is a file that anyone can write.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mpcompile.errors import LoadError, ParityError, RuntimeMissing, UsageError
from mpcompile.export.onnx_export import Exported
from mpcompile.frontend.architectures import is_factory
from mpcompile.frontend.capture import noise
from mpcompile.frontend.load_model import NAMING_FILES, Request, load
from mpcompile.frontend.state_dict import mismatch
from mpcompile.frontend.weights_file import read
from mpcompile.ir.model import Model, Source
from mpcompile.ir.parity import TOLERANCE, relative_difference
from mpcompile.runtimes import Build, Eager, Engine, OnnxRuntime, Runtime
from mpcompile.runtimes.eager import EagerEngine
from mpcompile.runtimes.ort.session import OrtEngine, cpu_engine

__all__ = ["Engine", "OrtEngine", "Runtime", "module_of", "onnx_engine", "target_engine"]

PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def module_of(
    weights: Path, source: Source, exported: Exported, given: nn.Module | None, allow_factory: bool
) -> nn.Module:
    """The original class with the compressed weights, in evaluation mode, compared with the ONNX file on noise.

    `given` is an instance of that class, and is left as it was. Without one it is built again, by timm or, where
    `allow_factory`, by the factory that the report names. Raises UsageError, LoadError or ParityError.
    """
    if exported.merges:
        raise UsageError(
            f"tokens are merged in {exported.onnx.name}, which the original class {source.arch} does not do: load the "
            f"ONNX file; what {weights.name} holds are the weights alone, as load_state_dict takes them"
        )
    if given is None:
        module = load(_rebuilding(weights, source, allow_factory)).module
    else:
        state = read(weights, allow_pickle=False)
        module = copy.deepcopy(given).eval()
        if listed := mismatch(module, state):
            raise LoadError(
                f"{weights} does not fit the {type(given).__name__} given: {listed}. Is it built as the one compiled?"
            )
        module.load_state_dict(state)
    _require_same(module, source, exported)
    return module


def onnx_engine(exported: Exported, threads: int | None) -> OrtEngine:
    """The file in ONNX Runtime on the CPU: the one for the N:M kernel, where both are there.

    Raises RuntimeMissing or BuildError.
    """
    shipped = OnnxRuntime().shipped(exported, threads)
    return shipped[1] if shipped else cpu_engine(exported, threads)


def target_engine(
    runtime: Runtime, exported: Exported, threads: int | None, batches: Sequence[int], model: Model | None
) -> Engine:
    """An engine of a target, built here; `model` is what target eager runs. Raises RuntimeMissing or BuildError."""
    if reason := runtime.missing() or runtime.idle():
        raise RuntimeMissing(f"target {runtime.name} does not run here: {reason}")
    if refused := runtime.refuses(exported.precision, threads):
        raise UsageError(f"target {runtime.name}: {refused}")
    if isinstance(runtime, Eager) and model is not None:
        return EagerEngine(model)
    return runtime.build(exported, Build(threads, batches=tuple(batches)))


def _rebuilding(weights: Path, source: Source, allow_factory: bool) -> Request:
    """How the class of a report is built again. Raises UsageError."""
    if source.arch_args is None:
        raise UsageError(
            f"the model was a {source.arch} given in Python, which a report cannot build again; give a new one, model="
        )
    if is_factory(source.arch) and not allow_factory:
        raise UsageError(
            f"the report names {source.arch}, and a report can name any function there is: if you trust it as you "
            "would a program, load with allow_factory=True; or give a new module, model="
        )
    named = sorted(NAMING_FILES & source.arch_args.keys())
    if named and not allow_factory:
        raise UsageError(
            f"the report gives {source.arch} {', '.join(named)}, which names other files to open: if you trust it, "
            "load with allow_factory=True; or give a new module, model="
        )
    return Request(str(weights), arch=source.arch, arch_args=source.arch_args)


def _require_same(module: nn.Module, source: Source, exported: Exported) -> None:
    """Raises ParityError where a module and the ONNX file differ by more than the coarser of their types allows."""
    own = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
    tolerance = max(TOLERANCE[exported.precision], TOLERANCE[PRECISION.get(own, "fp32")])
    images = noise(source.size)
    with torch.no_grad():
        found = copy.deepcopy(module).cpu().float()(images).numpy()
    expected = cpu_engine(exported)(images.numpy())
    difference = relative_difference(expected, found) if expected.shape == found.shape else float("inf")
    if difference > tolerance:
        raise ParityError(
            f"{type(module).__name__} with the compressed weights is another function than {exported.onnx.name}: "
            f"outputs differ by {difference:.1e} of their size, and {tolerance:.0e} is allowed. It is built in another "
            "way than the one compiled, or a pass changed the graph and not the weights alone; then load the ONNX file"
        )
