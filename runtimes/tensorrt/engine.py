"""Building a TensorRT engine from an ONNX file, running it, and reading what is in it. Needs a GPU.

Device memory, streams and CUDA graphs are PyTorch's. The builder's log is kept at VERBOSE, since only there the names
of layers with sparse kernels stand; profiling is DETAILED, since only then layers tell their kernels. Nothing is asked
for that is not in both TensorRT 10 and 11: a test checks this file against the bindings of either.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from mpcompile.errors import BuildError
from mpcompile.export.mask_check import ProvenMask, file_weights
from mpcompile.export.onnx_export import INPUT, OUTPUT, Exported
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.runtimes.batching import in_pieces
from mpcompile.runtimes.nvidia import Gpu
from mpcompile.runtimes.protocol import Build
from mpcompile.runtimes.tensorrt.layer_verdicts import completed
from mpcompile.runtimes.tensorrt.logs import EngineLayer, SparsityLog, inspected, kept_logger, sparsity_in
from mpcompile.system.hashing import file_sha256

if TYPE_CHECKING:
    import tensorrt as trt


PROFILED_CALLS = 20
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class SerializedEngine:
    """A serialised engine and the log of its build."""

    data: bytes = field(repr=False)
    log: str = field(repr=False)


def planned(file: Path, shapes: Sequence[tuple[int, ...]], sparse: bool, cache: Path | None = None) -> SerializedEngine:
    """The engine of an ONNX file, serialised. `shapes` are those of the images that will be run, where the batch is
    free: each has a profile of its own, so that kernels are chosen for it. `cache` is a file of timings, read where it
    is there and written anew, its hash beside it. Raises BuildError.
    """
    import tensorrt as trt

    logger = kept_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # its factory returned nothing
        raise BuildError(f"TensorRT {trt.__version__} has no builder here: {logger.errors() or error}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        told = "; ".join(" ".join(error.desc().split()) for error in errors)
        raise BuildError(f"TensorRT {trt.__version__} does not take {file.name}: {told}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and not what the file says
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    for shape in shapes:
        profile = builder.create_optimization_profile()
        exact = trt.Dims(shape)
        profile.set_shape(INPUT, exact, exact, exact)
        config.add_optimization_profile(profile)
    if cache is not None:
        known = config.create_timing_cache(cache.read_bytes() if cache.exists() else b"")
        config.set_timing_cache(known, False)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise BuildError(f"TensorRT {trt.__version__} cannot build {file.name}: {logger.errors() or 'no reason given'}")
    if cache is not None:
        cache.write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
        cache.with_name(f"{cache.name}.sha256").write_text(f"{file_sha256(cache)}  {cache.name}\n", encoding="utf-8")
    return SerializedEngine(bytes(memoryview(built)), logger.text())


def engine_from(exported: Exported, build: Build, gpu: Gpu) -> "TensorRTEngine":
    """An engine that runs, checked for the precision asked; its plan, log and what it is go into `build.folder`."""
    import tensorrt as trt

    folder = build.folder
    batches = tuple(sorted(set(build.batches))) if exported.batch is None else ()
    shapes = [(batch, *exported.image_shape) for batch in batches]
    plan = planned(exported.onnx, shapes, build.sparse, folder / TIMING_CACHE if folder is not None else None)
    engine = TensorRTEngine.loaded(plan, exported, batches, gpu)
    if folder is not None:
        stem = engine_name(exported, build, trt.__version__, gpu)
        path = folder / f"{stem}.engine"
        path.write_bytes(plan.data)
        (folder / f"{stem}.log").write_text(plan.log, encoding="utf-8")
        sidecar = {
            "onnx": exported.onnx.name,
            "onnx_sha256": file_sha256(exported.onnx),
            "sha256": file_sha256(path),
            "tensorrt": trt.__version__,
            "gpu": gpu.name,
            "compute_capability": list(gpu.capability),
            "precision": exported.precision,
            "tuned_for_batches": batches or [exported.batch],
            "sparse_weights": build.sparse,
            "sparsity": asdict(engine.sparsity),
            "layers": [asdict(layer) for layer in engine.engine_layers],
        }
        (folder / f"{stem}.json").write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    return engine


@dataclass(frozen=True)
class TensorRTEngine:
    """An engine on the first GPU, with an execution context for each batch that it was tuned for.

    Calls are not thread-safe: those of one batch share a context. `engine_layers` are those of the largest batch.
    """

    contexts: Mapping[int, "trt.IExecutionContext"]
    engine: "trt.ICudaEngine"
    runtime: "trt.Runtime"  # an engine does not outlive it
    gpu: Gpu
    engine_layers: tuple[EngineLayer, ...]
    sparsity: SparsityLog

    @classmethod
    def loaded(cls, plan: SerializedEngine, exported: Exported, batches: tuple[int, ...], gpu: Gpu) -> "TensorRTEngine":
        """The engine of a plan. Raises BuildError where it does not load, or is not in the precision of the file."""
        import tensorrt as trt

        logger = kept_logger(trt)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan.data)
        if engine is None:
            raise BuildError(f"TensorRT {trt.__version__} cannot load its own engine: {logger.errors()}")
        contexts: dict[int, trt.IExecutionContext] = {}
        for place, batch in enumerate(batches or (exported.batch or 1,)):
            context = engine.create_execution_context()
            if context is None:
                raise BuildError(f"TensorRT {trt.__version__} cannot run its engine: {logger.errors()}")
            if batches:
                context.set_optimization_profile_async(place, torch.cuda.current_stream().cuda_stream)
                torch.cuda.current_stream().synchronize()
            # Before the inspector looks: with a free batch it tells no types of tensors.
            context.set_input_shape(INPUT, (batch, *exported.image_shape))
            contexts[batch] = context
        inspector = engine.create_engine_inspector()
        inspector.execution_context = contexts[max(contexts)]
        layers = tuple(inspected(inspector.get_engine_information(trt.LayerInformationFormat.JSON)))
        if wrong := in_float32(layers, exported):
            raise BuildError(
                f"{len(wrong)} products of the engine run in float32 and {exported.precision} was asked for "
                f"(first {wrong[0]}); the file says {exported.precision}, so this is the builder's doing"
            )
        return cls(contexts, engine, runtime, gpu, layers, sparsity_in(plan.log))

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch; one that the engine was not tuned for is run in pieces of the largest that it was."""
        if len(images) in self.contexts:
            return self._run(images)
        largest = max(self.contexts)
        return in_pieces(self._run, images, largest, largest)

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        call = Call(self.contexts[len(images)], torch.from_numpy(images))
        call.copy_in()
        call.execute()
        logits: NDArray[np.float32] = call.copy_out().numpy()
        return logits

    def staged(self, images: NDArray[np.float32], *, transfers: bool, graph: bool) -> Callable[[], object]:
        """One call as the harness times it: it returns when the GPU is done. Raises BuildError where the engine was
        not tuned for that batch, or its work cannot be recorded.
        """
        if len(images) not in self.contexts:
            raise BuildError(f"the engine is tuned for batches of {', '.join(map(str, self.contexts))}")
        call = Call(self.contexts[len(images)], torch.from_numpy(images))
        call.copy_in()
        run = call.captured() if graph else call.execute

        def once() -> None:
            if transfers:
                call.copy_in()
            run()
            if transfers:
                call.copy_out()
            call.stream.synchronize()

        return once

    def layer_times(self, images: NDArray[np.float32]) -> Mapping[str, float]:
        """Milliseconds of each layer of the engine: medians over PROFILED_CALLS calls, layer by layer, unrecorded."""
        import tensorrt as trt

        class Times(trt.IProfiler):  # type: ignore[misc] # where TensorRT is not installed
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.found: dict[str, list[float]] = {}

            def report_layer_time(self, layer_name: str, ms: Any) -> None:
                self.found.setdefault(layer_name, []).append(float(ms))

        # A context of its own: one with a profiler is slower, and can be recorded no more.
        context = self.engine.create_execution_context()
        if len(self.contexts) > 1 or self.engine.num_optimization_profiles > 1:
            place = list(self.contexts).index(len(images))
            context.set_optimization_profile_async(place, torch.cuda.current_stream().cuda_stream)
            torch.cuda.current_stream().synchronize()
        times = Times()
        call = Call(context, torch.from_numpy(images))
        call.copy_in()
        call.execute()  # what is set up at the first call is not counted
        call.stream.synchronize()
        context.profiler = times
        for _ in range(PROFILED_CALLS):
            call.execute()
            call.stream.synchronize()
        return {name: float(np.median(found)) for name, found in times.found.items()}

    def judged(
        self,
        verdicts: Sequence[LayerVerdict],
        masks: Sequence[ProvenMask],
        images: NDArray[np.float32],
        unused: "TensorRTEngine | None" = None,
    ) -> tuple[LayerVerdict, ...]:
        """The verdicts, completed; `unused` is an engine of the same file whose sparse kernels were not allowed."""
        dense_ms, dense_layers = (unused.layer_times(images), unused.engine_layers) if unused else ({}, ())
        return completed(
            verdicts, masks, self.sparsity, self.engine_layers, self.layer_times(images), dense_ms, dense_layers
        )

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """One row a layer of the engine."""
        return [asdict(layer) | {"sparse": layer.sparse} for layer in self.engine_layers]

    @property
    def device(self) -> str:
        return self.gpu.name


class Call:
    """Images of one shape on the device, and where their logits go."""

    def __init__(self, context: "trt.IExecutionContext", images: torch.Tensor) -> None:
        self.context, self.stream = context, torch.cuda.Stream()
        self.source = images.pin_memory()
        self.images = torch.empty(images.shape, dtype=images.dtype, device="cuda")
        if not context.set_input_shape(INPUT, tuple(images.shape)):
            raise BuildError(f"TensorRT does not take images of {tuple(images.shape)} here")
        found = context.get_tensor_shape(OUTPUT)
        shape = tuple(found[axis] for axis in range(len(found)))
        self.logits = torch.empty(shape, dtype=torch.float32, device="cuda")
        self.result = torch.empty(shape, dtype=torch.float32).pin_memory()
        torch.cuda.current_stream().synchronize()  # they are made there, and used on a stream of their own

    def copy_in(self) -> None:
        """Starts the transfer of the images."""
        with torch.cuda.stream(self.stream):
            self.images.copy_(self.source, non_blocking=True)

    def execute(self) -> None:
        """Starts the engine. Raises BuildError. The context may have run another call since this one was made."""
        bound = (
            self.context.set_input_shape(INPUT, tuple(self.images.shape))
            and self.context.set_tensor_address(INPUT, self.images.data_ptr())
            and self.context.set_tensor_address(OUTPUT, self.logits.data_ptr())
        )
        if not bound or not self.context.execute_async_v3(self.stream.cuda_stream):
            raise BuildError("TensorRT could not start its engine; its log is beside the engine file")

    def captured(self) -> Callable[[], None]:
        """The engine's work as a CUDA graph: started at once, not kernel by kernel. Raises BuildError."""
        self.execute()  # what is set up at the first call is no part of the graph
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.execute()
        except Exception as error:  # a failure inside is replaced by the capture's own
            raise BuildError(
                f"the engine's work cannot be recorded as a CUDA graph ({error}); leave --cuda-graph out"
            ) from error

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return replay

    def copy_out(self) -> torch.Tensor:
        """The logits, once the device is done."""
        with torch.cuda.stream(self.stream):
            self.result.copy_(self.logits, non_blocking=True)
        self.stream.synchronize()
        return self.result


def in_float32(layers: Sequence[EngineLayer], exported: Exported) -> list[str]:
    """The nodes with constant weights, of a file in half precision, that no layer of the engine runs in it.

    A node may be in several layers, as where a cast was fused; one is enough. Layers that do not tell their types are
    no complaint.
    """
    if exported.precision == "fp32":
        return []
    wrong = []
    for weight in file_weights(onnx.load(exported.onnx)):
        holders = [layer for layer in layers if weight.node in layer.onnx and layer.types]
        if holders and not any(layer.in_half_precision for layer in holders):
            wrong.append(weight.node)
    return wrong


def engine_name(exported: Exported, build: Build, version: str, gpu: Gpu) -> str:
    """Such as vit_base-2x4-fp16-bs8-trt10.16.1-sm80; one whose masks are not used says so."""
    return f"{build.file_stem(exported)}-trt{version}-{gpu.sm}"
