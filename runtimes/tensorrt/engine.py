"""Runs a TensorRT engine, times its layers, and reads which kernels it uses. Needs a GPU.

Device memory, streams and CUDA graphs are PyTorch's. Only what TensorRT 10 and 11 both have is used: a test checks this
file and builder.py against the bindings of both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from mpcompile.errors import BuildError
from mpcompile.export.mask_check import ProvenMask, file_weights
from mpcompile.export.onnx_export import Exported
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.runtimes.batching import in_pieces
from mpcompile.runtimes.nvidia import Gpu
from mpcompile.runtimes.tensorrt.layer_verdicts import completed
from mpcompile.runtimes.tensorrt.logs import EngineLayer, SparsityLog, inspected, kept_logger, sparsity_in

if TYPE_CHECKING:
    import tensorrt as trt


PROFILED_CALLS = 20


@dataclass(frozen=True)
class TensorRTEngine:
    """An engine on the first GPU, with one execution context per batch that it was tuned for.

    Calls are not thread-safe, because calls of one batch share a context. `engine_layers` are the layers as inspected
    at the largest batch.
    """

    contexts: Mapping[int, "trt.IExecutionContext"]
    engine: "trt.ICudaEngine"
    runtime: "trt.Runtime"  # the engine is valid only while its runtime lives
    gpu: Gpu
    engine_layers: tuple[EngineLayer, ...]
    sparsity: SparsityLog
    output: str  # the name of the primary output

    @classmethod
    def loaded(cls, data: bytes, log: str, exported: Exported, batches: tuple[int, ...], gpu: Gpu) -> "TensorRTEngine":
        """Loads a serialised engine. `log` is the log of its build, `batches` its profiles, empty for a fixed batch.

        Raises BuildError if it does not load, or if it runs layers of a half-precision file in float32.
        """
        import tensorrt as trt

        logger = kept_logger(trt)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BuildError(f"TensorRT {trt.__version__} cannot load its own engine: {logger.errors()}")
        contexts: dict[int, trt.IExecutionContext] = {}
        for profile, batch in enumerate(batches or (exported.batch or 1,)):
            context = engine.create_execution_context()
            if context is None:
                raise BuildError(f"TensorRT {trt.__version__} cannot run its engine: {logger.errors()}")
            if batches:
                context.set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream)
                torch.cuda.current_stream().synchronize()
            # The inspector reports tensor types only once shapes are set.
            context.set_input_shape(exported.input_names[0], (batch, *exported.image_shape))
            contexts[batch] = context
        inspector = engine.create_engine_inspector()
        inspector.execution_context = contexts[max(contexts)]
        layers = tuple(inspected(inspector.get_engine_information(trt.LayerInformationFormat.JSON)))
        if widened := in_float32(layers, exported):
            raise BuildError(
                f"TensorRT built {len(widened)} products in float32 (the first is {widened[0]}), although the file is "
                f"{exported.precision}; {exported.precision} was asked for"
            )
        return cls(contexts, engine, runtime, gpu, layers, sparsity_in(log), exported.output_names[0])

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the logits of a batch. A batch without a profile runs in pieces of the largest tuned batch."""
        if len(images) in self.contexts:
            return self._run(images)
        largest = max(self.contexts)
        return in_pieces(self._run, images, largest, largest)

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        call = DeviceCall(self.contexts[len(images)], torch.from_numpy(images), self.output)
        call.copy_in()
        call.execute()
        logits: NDArray[np.float32] = call.copy_out().numpy()
        return logits

    def staged(self, images: NDArray[np.float32], *, transfers: bool, graph: bool) -> Callable[[], object]:
        """Returns the call that the harness times; it returns when the GPU is done.

        Raises BuildError if the engine was not tuned for that batch, or if the call cannot be captured as a CUDA graph.
        """
        if len(images) not in self.contexts:
            raise BuildError(
                f"the engine is not tuned for a batch of {len(images)}, only for {', '.join(map(str, self.contexts))}; "
                f"give --batch {len(images)}"
            )
        call = DeviceCall(self.contexts[len(images)], torch.from_numpy(images), self.output)
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
        """Returns the milliseconds per layer of the engine: medians over PROFILED_CALLS calls without a CUDA graph."""
        import tensorrt as trt

        class LayerTimes(trt.IProfiler):  # type: ignore[misc] # if TensorRT is not installed
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.samples_ms: dict[str, list[float]] = {}

            def report_layer_time(self, layer_name: str, ms: Any) -> None:
                self.samples_ms.setdefault(layer_name, []).append(float(ms))

        # A separate context: one with a profiler is slower and can no longer be captured.
        context = self.engine.create_execution_context()
        if len(self.contexts) > 1 or self.engine.num_optimization_profiles > 1:
            profile = list(self.contexts).index(len(images))
            context.set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream)
            torch.cuda.current_stream().synchronize()
        times = LayerTimes()
        call = DeviceCall(context, torch.from_numpy(images), self.output)
        call.copy_in()
        call.execute()  # the first call also allocates, and is not counted
        call.stream.synchronize()
        context.profiler = times
        for _ in range(PROFILED_CALLS):
            call.execute()
            call.stream.synchronize()
        return {name: float(np.median(samples)) for name, samples in times.samples_ms.items()}

    def judged(
        self,
        verdicts: Sequence[LayerVerdict],
        masks: Sequence[ProvenMask],
        images: NDArray[np.float32],
        unused: "TensorRTEngine | None" = None,
    ) -> tuple[LayerVerdict, ...]:
        """Returns the verdicts with kernels and times. `unused` is an engine of the same file without sparse kernels.

        Without it, dense times are None.
        """
        dense_ms, dense_layers = (unused.layer_times(images), unused.engine_layers) if unused else ({}, ())
        return completed(
            verdicts, masks, self.sparsity, self.engine_layers, self.layer_times(images), dense_ms, dense_layers
        )

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """Returns one row per layer of the engine."""
        return [asdict(layer) | {"sparse": layer.sparse} for layer in self.engine_layers]

    @property
    def device(self) -> str:
        return self.gpu.name


class DeviceCall:
    """Input and output buffers of one image shape, in pinned host memory and on the GPU, and a stream.

    `output` is the name of the primary output, which is copied back; other outputs stay on the GPU.
    """

    def __init__(self, context: "trt.IExecutionContext", images: torch.Tensor, output: str) -> None:
        import tensorrt as trt

        self.context, self.stream = context, torch.cuda.Stream()
        engine = context.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.input, self.output = inputs[0], output
        self.source = images.pin_memory()
        self.images = torch.empty(images.shape, dtype=images.dtype, device="cuda")
        if not context.set_input_shape(self.input, tuple(images.shape)):
            raise BuildError(f"this TensorRT engine does not accept images of shape {tuple(images.shape)}")
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
            trt.DataType.BOOL: torch.bool,
        }
        self.buffers: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in inputs:
                dims = context.get_tensor_shape(name)
                shape = tuple(dims[axis] for axis in range(len(dims)))
                dtype = types[engine.get_tensor_dtype(name)]
                self.buffers[name] = torch.empty(shape, dtype=dtype, device="cuda")
        self.result = torch.empty_like(self.buffers[output], device="cpu").pin_memory()
        torch.cuda.current_stream().synchronize()  # the buffers were allocated on it and are used on another

    def copy_in(self) -> None:
        """Starts the transfer of the images to the GPU."""
        with torch.cuda.stream(self.stream):
            self.images.copy_(self.source, non_blocking=True)

    def execute(self) -> None:
        """Starts the engine. Raises BuildError.

        Binds shapes and addresses each time, because another call may have used the context in between.
        """
        bound = (
            self.context.set_input_shape(self.input, tuple(self.images.shape))
            and self.context.set_tensor_address(self.input, self.images.data_ptr())
            and all(self.context.set_tensor_address(name, one.data_ptr()) for name, one in self.buffers.items())
        )
        if not bound or not self.context.execute_async_v3(self.stream.cuda_stream):
            raise BuildError("TensorRT could not start the engine; see its .log file in the output folder")

    def captured(self) -> Callable[[], None]:
        """Captures the engine's kernels as one CUDA graph and returns its replay. Raises BuildError."""
        self.execute()  # the first call also allocates, which cannot be captured
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.execute()
        except Exception as error:  # the capture raises its own type for a failure inside it
            raise BuildError(
                f"the engine cannot be captured as a CUDA graph ({error}); leave --cuda-graph out"
            ) from error

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return replay

    def copy_out(self) -> torch.Tensor:
        """Returns the logits in host memory, after the GPU is done."""
        with torch.cuda.stream(self.stream):
            self.result.copy_(self.buffers[self.output], non_blocking=True)
        self.stream.synchronize()
        return self.result


def in_float32(layers: Sequence[EngineLayer], exported: Exported) -> list[str]:
    """Returns the weighted nodes of a half-precision file that the engine runs in float32; none for other files.

    A node may be part of several layers, for example if a cast was fused; one layer in half precision is enough. Layers
    without reported types are not counted. 8-bit files are not checked: their other products are float32, and a fused
    layer reports the types at its ends only.
    """
    if exported.precision not in ("fp16", "bf16"):
        return []
    widened = []
    for weight in file_weights(onnx.load(exported.onnx)):
        holders = [layer for layer in layers if weight.node in layer.onnx and layer.types]
        if holders and not any(layer.in_half_precision for layer in holders):
            widened.append(weight.node)
    return widened
