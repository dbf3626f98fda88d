"""Comparison of engines: parity with ONNX Runtime on the CPU, and interleaved timing on the same images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.data.images import Split
from mpcompile.errors import UsageError
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.parity import PARITY_QUANTILE, TOLERANCE, relative_difference, require_parity
from mpcompile.ir.precision import QUANTIZED
from mpcompile.measure.timing import Call, sample
from mpcompile.report.schema import Parity
from mpcompile.runtimes import Engine, TimesDevice
from mpcompile.runtimes.ort.session import cpu_engine

Arrays = tuple[NDArray[Any], ...]  # the inputs of an engine, the images first
SECONDS = 4.0  # of timing for each batch size


@dataclass(frozen=True, slots=True)
class Settings:
    """How to time.

    Attributes:
        target: None is the recipe's.
        batches: batch sizes to time; None is the recipe's.
        threads: CPU threads; None leaves the number to the runtime.
        seconds: of timing for each batch size.
        transfers: whether copies to and from a GPU are timed.
        graph: whether the GPU kernels are recorded as one CUDA graph and launched together.
    """

    target: str | None = None
    batches: tuple[int, ...] | None = None
    threads: int | None = None
    seconds: float = SECONDS
    transfers: bool = True
    graph: bool = False


def arrays(inputs: Sequence[Tensor]) -> Arrays:
    """The inputs of an engine as NumPy arrays, the images first."""
    return tuple(np.ascontiguousarray(one.numpy()) for one in inputs)


def engine_parity(engine: Engine, exported: Exported, inputs: Arrays, what: str) -> Parity:
    """The parity of an engine with ONNX Runtime on the CPU, both on the same inputs, the images (b, c, h, w) first.

    `exported` is the ONNX file that the engine was built from; `what` names the engine in the report and in errors.
    Raises ParityError if the outputs differ by more than the tolerance of the file's precision.
    """
    return parity_of(
        cpu_engine(exported)(*inputs), engine(*inputs), exported, f"{what} against {_reference_name(exported)}"
    )


def parity_of(expected: NDArray[np.float32], outputs: NDArray[np.float32], exported: Exported, what: str) -> Parity:
    """The report's row for two outputs (b, outputs) of one model, `expected` from the reference.

    `exported` gives the precision and whether tokens are merged; `what` names the comparison. Raises ParityError if the
    outputs differ by more than the tolerance of the precision.
    """
    difference = require_parity(expected, outputs, exported.precision, what, exported.merges)
    if exported.merges or exported.precision in QUANTIZED:
        largest = relative_difference(expected, outputs)
        cause = "which tokens merge" if exported.merges else "a rounding to 8 bits"
        what += f", {PARITY_QUANTILE:.0%} of the images"
        what += f" (rounding can change {cause}; the largest difference is {largest:.1e})"
    return Parity(what=what, difference=difference, tolerance=TOLERANCE[exported.precision], images=len(expected))


def _reference_name(exported: Exported) -> str:
    """How the reference runs a file of this precision."""
    if exported.precision == "bf16":
        return "ONNX Runtime on the CPU, in float32 on the rounded weights"
    if exported.precision in QUANTIZED:
        return "ONNX Runtime on the CPU, without 8-bit kernels"
    return "ONNX Runtime on the CPU"


def call_of(engine: Engine, inputs: Arrays, settings: Settings) -> Call:
    """A function that runs the engine once on the inputs, to be timed.

    Raises UsageError if the settings need a GPU and the engine has none.
    """
    if isinstance(engine, TimesDevice):
        return engine.staged(inputs[0], transfers=settings.transfers, graph=settings.graph)
    if settings.graph or not settings.transfers:
        raise UsageError("a CPU has no CUDA graph and no transfers; leave --cuda-graph and --no-transfers out")
    return partial(engine, *inputs)


def interleaved_times_ms(
    engines: Mapping[str, Engine], images: Split, example: Arrays, batch: int, seconds: float
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds per call of each engine (rounds,), measured in interleaved rounds for `seconds`.

    All engines get the same `batch` images: those of `images`, or copies of `example` if there are too few.
    """
    inputs = inputs_for(images, example, batch)
    return sample({name: call_of(engine, inputs, Settings()) for name, engine in engines.items()}, seconds)


def inputs_for(images: Split, example: Arrays, batch: int) -> Arrays:
    """The inputs of a batch to time, the images (b, c, h, w) first: real ones, or copies of the example if too few."""
    if len(images) >= batch:
        return arrays(images.first_inputs(batch))
    return tuple(np.ascontiguousarray(np.resize(one, (batch, *one.shape[1:]))) for one in example)
