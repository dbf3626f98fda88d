"""Engines side by side: held against ONNX Runtime on the CPU, and called in turns on the same images."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.images import Split
from mpcompile.errors import UsageError
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.parity import PARITY_QUANTILE, TOLERANCE, relative_difference, require_parity
from mpcompile.measure.timing import Call, sample
from mpcompile.report.schema import Parity
from mpcompile.runtimes import Engine, TimesDevice
from mpcompile.runtimes.ort.session import cpu_engine

SECONDS = 4.0  # for each batch


@dataclass(frozen=True, slots=True)
class Settings:
    """How to time. `transfers`: whether copies to and from a GPU count; `graph`: whether a GPU's work is recorded once
    as a CUDA graph and then started whole. None of `batches` and `target` mean the recipe's.
    """

    target: str | None = None
    batches: tuple[int, ...] | None = None
    threads: int | None = None
    seconds: float = SECONDS
    transfers: bool = True
    graph: bool = False


def engine_parity(engine: Engine, exported: Exported, images: NDArray[np.float32], what: str) -> Parity:
    """An engine against ONNX Runtime on the CPU. Raises ParityError."""
    return parity_of(cpu_engine(exported)(images), engine(images), exported, f"{what} against {_reference(exported)}")


def parity_of(expected: NDArray[np.float32], found: NDArray[np.float32], exported: Exported, what: str) -> Parity:
    """The row for two forms of a model on the same images. Raises ParityError."""
    difference = require_parity(expected, found, exported.precision, what, exported.merges)
    if exported.merges:
        largest = relative_difference(expected, found)
        what += f", {PARITY_QUANTILE:.0%} of the images"
        what += f" (rounding can merge other tokens; the largest is {largest:.1e})"
    return Parity(what=what, difference=difference, tolerance=TOLERANCE[exported.precision], images=len(expected))


def _reference(exported: Exported) -> str:
    """What a file runs as on the CPU."""
    if exported.precision == "bf16":
        return "ONNX Runtime on the CPU, in float32 on the rounded weights"
    return "ONNX Runtime on the CPU"


def call_of(engine: Engine, images: NDArray[np.float32], settings: Settings) -> Call:
    """One call as it is timed. Raises UsageError where there is nothing to leave out."""
    if isinstance(engine, TimesDevice):
        return engine.staged(images, transfers=settings.transfers, graph=settings.graph)
    if settings.graph or not settings.transfers:
        raise UsageError("a CPU has no CUDA graph and no transfers; leave --cuda-graph and --no-transfers out")
    return partial(engine, images)


def in_turns(
    engines: Mapping[str, Engine], images: Split, example: NDArray[np.float32], batch: int, seconds: float
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each engine at a batch size, round by round, all on the same images."""
    chosen = images_for(images, example, batch)
    return sample({name: call_of(engine, chosen, Settings()) for name, engine in engines.items()}, seconds)


def images_for(images: Split, example: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """A batch to time: real images where there are enough, else the example over and over."""
    if len(images) >= batch:
        return np.ascontiguousarray(images.first(batch).numpy())
    return np.ascontiguousarray(np.resize(example, (batch, *example.shape[1:])))
