"""Times one masked GEMM as a model of one node, native and dense in turns, and finds the input shapes of GEMMs."""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as with_fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpcompile.errors import BuildError, cause_of
from mpcompile.export.onnx_export import INLINE_LIMIT_BYTES
from mpcompile.measure.timing import Call, Speedup, Timing, sample, speedup, timing
from mpcompile.runtimes.native.conv_op import RESIDUAL, following, limits, weight_of
from mpcompile.runtimes.native.custom_op import OLDEST_OPSET
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm, replace
from mpcompile.runtimes.native.packing import Packed
from mpcompile.runtimes.session_settings import STOP_SPINNING

if TYPE_CHECKING:
    import onnxruntime

Samples = Mapping[str, NDArray[np.float64]]  # milliseconds per turn of each call (rounds,)
Judgement = TypeVar("Judgement")

PROVIDER = "CPUExecutionProvider"
DEVICE = "cpu"
BASELINE = "ONNX Runtime's dense kernel"
BLOCK_MS = 2.0
BLOCK_SIZING_CALLS = 3


def measure(
    product: MaskedGemm,
    weight: Packed,
    x: tuple[int, ...],
    library: Path,
    threads: int | None,
    seconds: float,
) -> tuple[Timing, Timing, Speedup]:
    """Returns the times of the dense node and of the native one, and the speedup. `x` is the shape of the input.

    Raises BuildError.
    """
    return compared(
        one_node(dense_node(product), product, x, None, threads),
        one_node(native_node(product, weight), product, x, library, threads),
        x[0],
        seconds,
    )


def compared(dense: Call, native: Call, batch: int, seconds: float) -> tuple[Timing, Timing, Speedup]:
    """Returns the times of two ways to compute the same, and the speedup of the second.

    The two are timed in turns of as many calls as take BLOCK_MS. If the speedup's interval includes 1, as many rounds
    are added once more, so that a short load of the machine does not decide.
    """
    runs = {"dense": dense, "native": native}
    repeats = calls_per_block(runs["dense"])
    turns = {name: partial(repeated, run, repeats) for name, run in runs.items()}
    samples, ratio = judged(
        turns,
        seconds,
        lambda found: speedup(found["dense"], found["native"], BASELINE),
        lambda found: not found.undecided,
    )
    first, second = (timing(samples[name] / repeats, batch, DEVICE) for name in runs)
    return first, second, ratio


def judged(
    turns: Mapping[str, Call],
    seconds: float,
    judge: Callable[[Samples], Judgement],
    decided: Callable[[Judgement], bool],
) -> tuple[Samples, Judgement]:
    """Returns the samples of the calls, timed in turns, and what `judge` makes of them.

    If that is not decided, as many rounds are added once more, so that a short load of the machine does not decide.
    """
    samples: Samples = sample(turns, seconds)
    judgement = judge(samples)
    if not decided(judgement):
        more = sample(turns, seconds)
        samples = {name: np.concatenate([first, more[name]]) for name, first in samples.items()}
        judgement = judge(samples)
    return samples, judgement


def calls_per_block(run: Call) -> int:
    """Returns how many calls take BLOCK_MS. A single call of microseconds would be dominated by other load."""
    run()
    calls_ns = []
    for _ in range(BLOCK_SIZING_CALLS):  # a single call may have been stalled
        started = time.perf_counter_ns()
        run()
        calls_ns.append(time.perf_counter_ns() - started)
    return max(1, math.ceil(BLOCK_MS * 1e6 / max(min(calls_ns), 1)))


def repeated(run: Call, count: int) -> None:
    """Runs a call `count` times."""
    for _ in range(count):
        run()


def dense_node(product: MaskedGemm) -> onnx.ModelProto:
    """Returns the product in standard ONNX operators, as a model x -> y; also of `residual` if it adds one."""
    weight, done = product.weight, product.convolution
    stored, given = {"b": product.bias}, ["x"]
    if done is None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["y"])]
        stored["w"] = np.ascontiguousarray(weight.T)
    else:
        residual = None if done.residual is None else RESIDUAL
        after = following("conv", "y", done.activation, residual)
        conv = helper.make_node("Conv", ["x", "w", "b"], ["conv" if after else "y"])
        conv.attribute.extend(helper.make_attribute(name, value) for name, value in done.window.attributes().items())
        nodes = [conv, *after]
        stored["w"] = weight_of(weight, done.window)
        if done.activation == "Relu6":
            stored |= limits()
        given += [] if residual is None else [residual]
    graph = helper.make_graph(
        nodes,
        "dense",
        [_float(name) for name in given],
        [_float("y")],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OLDEST_OPSET)], ir_version=8)


def native_node(product: MaskedGemm, weight: Packed) -> onnx.ModelProto:
    """Returns the product as the native operator, as a model with the inputs of the dense one."""
    dense = dense_node(product)
    nodes = tuple(node.output[0] for node in dense.graph.node)
    dense.graph.node[0].name = "product"
    done = product.convolution
    if done is not None and done.residual is not None:
        done = with_fields(done, residual=RESIDUAL)
    inner = with_fields(product, name="product", x="x", y="y", nodes=nodes, convolution=done)
    return replace(dense, [inner], {inner.prefix: weight})


def _float(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def session(model: onnx.ModelProto, library: Path | None, threads: int | None) -> "onnxruntime.InferenceSession":
    """Returns a session on a model in memory, with the kernel's operators if `library` is given.

    A model that is too large for one protobuf message goes through a temporary file with external data.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*STOP_SPINNING)
    if threads:
        options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    if model.ByteSize() <= INLINE_LIMIT_BYTES:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
    with tempfile.TemporaryDirectory() as folder:
        path, copy = Path(folder) / "model.onnx", onnx.ModelProto()
        copy.CopyFrom(model)  # saving moves the tensors out of what is saved
        onnx.save_model(copy, path, save_as_external_data=True)
        return onnxruntime.InferenceSession(path, options, providers=[PROVIDER])


class OneNode:
    """A session on a model of one node with bound input and output arrays, so that a call times the node alone."""

    def __init__(self, model: onnx.ModelProto, library: Path | None, threads: int | None) -> None:
        self._session = session(model, library, threads)
        self._binding = self._session.io_binding()

    def bind(self, x: NDArray[Any], y: NDArray[Any], residual: NDArray[Any] | None = None) -> None:
        """Binds the arrays that calls read and write."""
        self._arrays = (x, y, residual)
        self._binding.bind_cpu_input("x", x)
        if residual is not None:
            self._binding.bind_cpu_input(RESIDUAL, residual)
        self._binding.bind_output("y", "cpu", 0, y.dtype, y.shape, y.ctypes.data)

    def __call__(self) -> None:
        """Runs the model on the bound arrays."""
        self._session.run_with_iobinding(self._binding)


def one_node(
    model: onnx.ModelProto, product: MaskedGemm, x: tuple[int, ...], library: Path | None, threads: int | None
) -> OneNode:
    """Returns a session on one node, bound to random input of shape `x`. Raises BuildError."""
    try:
        node = OneNode(model, library, threads)
    except Exception as error:
        raise BuildError(f"{product.name}: ONNX Runtime cannot load it as a model of its own: {error}") from error
    rng, y = np.random.default_rng(0), output_shape(product, x)
    residual = None
    given = rng.standard_normal(x, dtype=np.float32)
    if product.convolution is not None and product.convolution.residual is not None:
        residual = rng.standard_normal(y, dtype=np.float32)
    node.bind(given, np.empty(y, np.float32), residual)
    return node


def output_shape(product: MaskedGemm, x: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a product's result for an input of shape `x`."""
    rows, done = len(product.weight), product.convolution
    if done is None:
        return (*x[:-1], rows)
    return (x[0], rows, *(done.window.outputs(*x[2:]) if len(x) == 4 else x[2:]))


def input_shapes(
    file: onnx.ModelProto, products: Sequence[MaskedGemm], images: NDArray[np.float32]
) -> dict[str, tuple[int, ...]]:
    """Returns the input shape of each product, by tensor name, for a batch like `images`.

    Takes fixed shapes from the file. If the file leaves one free, runs the file on `images`; raises BuildError if that
    fails.
    """
    known: dict[str, tuple[int, ...]] = {}
    for value in (*file.graph.input, *file.graph.value_info):
        sizes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in sizes):
            known[value.name] = tuple(size.dim_value for size in sizes)
    inputs = {product.x for product in products}
    if missing := sorted(inputs - set(known)):
        known |= _shapes_from_run(file, missing, images)
    return {name: known[name] for name in inputs}


def _shapes_from_run(
    file: onnx.ModelProto, names: Sequence[str], images: NDArray[np.float32]
) -> dict[str, tuple[int, ...]]:
    """Runs the file on `images` with the named tensors as outputs, and returns their shapes. Raises BuildError."""
    model = onnx.ModelProto()
    model.CopyFrom(file)
    inputs, outputs = {value.name for value in file.graph.input}, {value.name for value in file.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in inputs | outputs)
    computed = [name for name in names if name not in inputs]
    try:
        arrays = session(model, None, None).run(computed, {file.graph.input[0].name: images})
    except Exception as error:  # ONNX Runtime raises its own types, and any of them can occur here
        raise BuildError(
            f"ONNX Runtime cannot run the file on images of shape {images.shape}: {cause_of(error)}"
        ) from error
    shapes = {name: tuple(array.shape) for name, array in zip(computed, arrays, strict=True)}
    return {**shapes, **{name: tuple(images.shape) for name in names if name in inputs}}
