"""The three forms in which `Artifact.load` returns a model: the original class, an ONNX Runtime session, an engine.

Weights are read from safetensors, so no pickled code is run. Code that a report names is run only if the caller allows
it, because anyone can write a report.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from mpcompile.driver.part import captured_part
from mpcompile.errors import LoadError, ParityError, RuntimeMissing, UsageError
from mpcompile.export.onnx_export import Exported
from mpcompile.frontend.architectures import is_factory
from mpcompile.frontend.call_inputs import InputSpec, call_inputs
from mpcompile.frontend.capture import capture, noise
from mpcompile.frontend.load_model import Request, load
from mpcompile.frontend.named_architecture import NAMING_FILES
from mpcompile.frontend.plain_copy import copied, plain_copy
from mpcompile.frontend.primary_output import outputs_in_order
from mpcompile.frontend.state_dict import mismatch
from mpcompile.frontend.weights_file import read
from mpcompile.frontend.whole_model import open_whole
from mpcompile.ir.model import Model
from mpcompile.ir.parity import TOLERANCE, relative_difference
from mpcompile.ir.precision import QUANTIZED
from mpcompile.ir.source import Source
from mpcompile.report.part_schema import Part
from mpcompile.runtimes import Build, Engine, OnnxRuntime, RunsGraph, Runtime
from mpcompile.runtimes.ort.session import OrtEngine, cpu_engine

__all__ = ["Engine", "OrtEngine", "Runtime", "module_of", "onnx_engine", "target_engine"]

PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def module_of(
    weights: Path,
    source: Source,
    exported: Exported,
    given: nn.Module | None,
    allow_factory: bool,
    others: Mapping[str, InputSpec],
    part: Part | None = None,
) -> nn.Module:
    """A module of the original class with the compressed weights, in evaluation mode.

    Args:
        weights: model.safetensors.
        source: architecture and preprocessing, from the report.
        exported: the compressed ONNX file; the module's outputs on noise are compared with it.
        given: an instance of the original class, which is copied; None builds one anew.
        others: the inputs beside the images.
        allow_factory: whether a factory function that the report names may be called to build it.
        part: the part of the module that the file computes; None if it computes the whole module.

    Raises UsageError if the class cannot be built or does not compute what the file computes, LoadError if the weights
    do not fit it, and ParityError if its outputs differ.
    """
    if exported.merges:
        raise UsageError(
            f"{exported.onnx.name} merges tokens, which the original class {source.arch} does not do; load the ONNX "
            f"file, or only the weights: load_state_dict with {weights.name}"
        )
    if exported.precision in QUANTIZED:
        raise UsageError(
            f"{exported.onnx.name} is in {exported.precision}: it quantises activations, which the original class "
            f"{source.arch} does not do; load the ONNX file, or only the weights: load_state_dict with {weights.name}"
        )
    if given is None:
        module = load(_rebuild_request(weights, source, allow_factory)).module
    else:
        state = read(weights, allow_pickle=False)
        module = copied(given).eval()
        if mismatch(module, state):  # the file has plain weights, also where the class computes them
            module, _ = plain_copy(given)
        if differences := mismatch(module, state):
            raise LoadError(
                f"{weights} does not fit the given {type(given).__name__}: {differences}. Pass one that is built with "
                "the same arguments as the compiled one"
            )
        module.load_state_dict(state)
    _require_parity(module, source, exported, others, part)
    return module


def onnx_engine(exported: Exported, threads: int | None) -> OrtEngine:
    """ONNX Runtime on the CPU: on model.native.onnx if that file and the N:M kernel are available, else on model.onnx.

    Raises RuntimeMissing or BuildError.
    """
    return OnnxRuntime().load_file(exported, threads)


def target_engine(
    runtime: Runtime, exported: Exported, threads: int | None, batches: Sequence[int], model: Model | None
) -> Engine:
    """An engine of a target, built on this machine.

    Args:
        runtime: the target.
        exported: the compressed ONNX file.
        threads: CPU threads; None leaves the number to the runtime.
        batches: the batch sizes that will be run.
        model: the captured model, for a target that runs the graph; None for others.

    Raises RuntimeMissing if the target does not run here, UsageError if it refuses these options, and BuildError.
    """
    if reason := runtime.missing() or runtime.idle():
        raise RuntimeMissing(f"target {runtime.name} does not run here: {reason}")
    if refused := runtime.refuses(exported.precision, threads):
        raise UsageError(f"target {runtime.name}: {refused}")
    if isinstance(runtime, RunsGraph) and model is not None:
        return runtime.graph_engine(model)
    return runtime.build(exported, Build(threads, batches=tuple(batches)))


def _rebuild_request(weights: Path, source: Source, allow_factory: bool) -> Request:
    """The request that builds the architecture of a report anew and loads the weights. Raises UsageError."""
    if source.arch_args is None:
        raise UsageError(
            f"the model was a {source.arch}, which no report can build by name; pass an instance with model="
        )
    if is_factory(source.arch) and not allow_factory:
        raise UsageError(
            f"the report names the function {source.arch}, which loading would run; if you trust the report as you "
            "would a program, load with allow_factory=True; or pass an instance with model="
        )
    file_arguments = sorted(NAMING_FILES & source.arch_args.keys())
    if file_arguments and not allow_factory:
        raise UsageError(
            f"the report gives {source.arch} {', '.join(file_arguments)}, which names other files to open; if you "
            "trust the report, load with allow_factory=True; or pass an instance with model="
        )
    return Request(str(weights), arch=source.arch, arch_args=source.arch_args)


def captured_again(
    module: nn.Module, source: Source, primary: str, others: Mapping[str, InputSpec], part: Part | None
) -> Model:
    """The module, or the part of it that was compressed, captured as when it was compiled. Raises CaptureError.

    `primary` is the path of the primary output; `others` are the inputs beside the images.
    """
    images = noise(source.size)
    if part is None:
        further = {name: spec.example(len(images)) for name, spec in others.items()}
        return capture(module, source, images, inputs=further, primary=primary)
    whole = open_whole(module, part.name, images, noise(source.size, len(images) + 1, seed=1))
    return captured_part(whole, source, images, primary=primary)


def _require_parity(
    module: nn.Module, source: Source, exported: Exported, others: Mapping[str, InputSpec], part: Part | None
) -> None:
    """Raises ParityError if a module and the ONNX file differ by more than the tolerance of the coarser data type."""
    own = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
    tolerance = max(TOLERANCE[exported.precision], TOLERANCE[PRECISION.get(own, "fp32")])
    images = noise(source.size)
    if part is None:
        called = call_inputs(module, images, {name: spec.example(len(images)) for name, spec in others.items()})
        with torch.no_grad():
            result = called.run(copied(module).cpu().float())
        name, taken = exported.output_names[0], tuple(called.tensors)
        outputs = outputs_in_order(result, type(module).__name__, name, taken).tensors[0][1].numpy()
        inputs = tuple(called.tensors.values())
    else:
        model = captured_again(copied(module).cpu().float(), source, exported.output_names[0], others, part)
        inputs, outputs = model.example_inputs, model(model.example_inputs).numpy()
    expected = cpu_engine(exported)(*(one.numpy() for one in inputs))
    difference = relative_difference(expected, outputs) if expected.shape == outputs.shape else float("inf")
    if difference > tolerance:
        raise ParityError(
            f"{type(module).__name__} with the compressed weights computes something else than "
            f"{exported.onnx.name}: outputs differ by {difference:.1e} of the largest output; {tolerance:.0e} is "
            "allowed. It was built with other arguments than the compiled one, or a pass changed more than weights; "
            "in the latter case load the ONNX file"
        )
