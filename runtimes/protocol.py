"""The protocols of a runtime and of an engine, and the values that they exchange with the harness.

Every runtime implements `Runtime`, every engine `Engine`. The other protocols are optional; the harness looks for their
methods and works without them. Of a runtime: `RunsGraph`, `LoadsFile`, `ShipsFile`, `PredictsSpeed`,
`HasQuantizedBaselines`, `RunsQuantized` (runtimes/quantized.py). Of an engine: `TimesDevice`, `ReportsKernels`,
`ReportsQuantizedLayers`, `ReportsReference`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpcompile.export.mask_check import ProvenMask
from mpcompile.export.onnx_export import Exported
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.quantized_layer import QuantizedLayer
from mpcompile.measure.timing import Speedup
from mpcompile.system.moved_modules import renamed_names

NO_KERNELS = "none: masked layers run as dense"


class WithoutKernels:
    """A base class for runtimes without sparse kernels: implements `kernels`, `has_kernel` and `auto_patterns`."""

    def kernels(self) -> str:
        """The text "none: masked layers run as dense"."""
        return NO_KERNELS

    def has_kernel(self, pattern: NM) -> bool:
        """False for every pattern."""
        return False

    def auto_patterns(self) -> tuple[NM, ...]:
        """No patterns."""
        return ()


@dataclass(frozen=True, slots=True)
class Build:
    """Options of one engine build.

    Attributes:
        threads: CPU threads; None leaves the number to the runtime.
        sparse: whether the engine may use sparse kernels.
        batches: the batch sizes that will be run. An engine with fixed shapes is built for these if the file leaves the
            batch free.
        folder: where the runtime writes its own files; None if nothing is to be kept.
    """

    threads: int | None = None
    sparse: bool = True
    batches: tuple[int, ...] = (1, 8)
    folder: Path | None = None

    def profile(self, exported: Exported) -> tuple[tuple[int, ...], ...] | None:
        """The smallest, median and largest input shape (b, c, h, w), or None if the file's batch is fixed."""
        if exported.batch is not None:
            return None
        ordered = sorted(self.batches)
        sizes = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
        return tuple((size, *exported.image_shape) for size in sizes)

    def file_stem(self, exported: Exported) -> str:
        """A file name without suffix that differs between engines of one model: model, pattern, precision, batches."""
        patterns = sorted({mask.pattern for mask in exported.masks})
        pattern = "mixed" if len(patterns) > 1 else patterns[0].replace(":", "x") if patterns else exported.onnx.stem
        pattern += "-merged" if exported.merges else ""
        unused = "-unused" if patterns and not self.sparse else ""
        smallest, largest = min(self.batches), max(self.batches)
        batches = exported.batch or (largest if smallest == largest else f"{smallest}-{largest}")
        name = re.sub(r"[^A-Za-z0-9_.]+", "_", exported.arch)
        return f"{name}-{pattern}{unused}-{exported.precision}-bs{batches}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a runtime reports about a file without running it.

    Attributes:
        verdicts: one per masked layer.
        notes: sentences for the report.
        commands: command lines that build and measure the engine on the target machine.
    """

    verdicts: tuple[LayerVerdict, ...] = ()
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GemmShape:
    """The shape of one masked matrix product: (tokens, in) times the transposed weight (out, in), and its pattern."""

    out: int
    in_: int
    tokens: int
    pattern: NM


@runtime_checkable
class Engine(Protocol):
    """A model that is ready to run. The harness times calls of it and compares what it returns."""

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The primary output, such as logits (b, outputs), of images (b, c, h, w), both float32.

        An engine for models with several inputs takes the others after the images (`TakesInputs`).
        """
        ...

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """One row for each layer that the engine executes, as far as the runtime reports its layers."""
        ...

    @property
    def device(self) -> str:
        """The name of the device that it runs on, for reports."""
        ...


@runtime_checkable
class TakesInputs(Protocol):
    """A runtime whose engines take further inputs after the images. Others refuse models with several inputs."""

    several_inputs: ClassVar[bool]


@runtime_checkable
class TimesDevice(Protocol):
    """An engine on a device of its own, such as a GPU, whose work can be timed without the transfers."""

    def staged(self, images: NDArray[np.float32], *, transfers: bool, graph: bool) -> Callable[[], object]:
        """A function that runs one call and returns when the device has finished. This function is what is timed.

        Args:
            images: (b, c, h, w), float32.
            transfers: whether a call copies images to the device and logits back.
            graph: whether the device's work is recorded once as a CUDA graph and then launched as a whole.

        Raises BuildError if the engine cannot do this.
        """
        ...


@runtime_checkable
class ReportsKernels(Protocol):
    """An engine that reports which kernel it chose for each masked layer."""

    def judged(
        self,
        verdicts: Sequence[LayerVerdict],
        masks: Sequence[ProvenMask],
        images: NDArray[np.float32],
        unused: Any = None,
    ) -> tuple[LayerVerdict, ...]:
        """The verdicts with chosen kernels and times filled in.

        Args:
            verdicts: those of `Runtime.prepare`.
            masks: the masks in the engine's file.
            images: a batch to profile with, (b, c, h, w), float32.
            unused: an engine of the same kind, built from the same file without sparse kernels, for times to compare
                with; None if there is none.
        """
        ...


@runtime_checkable
class ReportsQuantizedLayers(Protocol):
    """An engine that reports which layers of an 8-bit file it runs on 8-bit kernels."""

    def quantised_layers(self, images: NDArray[np.float32]) -> tuple[QuantizedLayer, ...]:
        """One row for each quantised layer of the engine's file; empty if the file has none.

        `images` is a batch to profile with, (b, c, h, w), float32.
        """
        ...


@runtime_checkable
class ReportsReference(Protocol):
    """An engine that reports whether it is the reference of parity checks: the ONNX file in ONNX Runtime on the CPU."""

    @property
    def is_reference(self) -> bool:
        """If True, the engine is not compared with the reference. Engines without this property are compared."""
        ...


@runtime_checkable
class PredictsSpeed(Protocol):
    """A runtime that predicts the speedup of masked products by timing products of the same shape."""

    def predicted(self, products: Mapping[str, GemmShape]) -> Mapping[str, Speedup]:
        """The measured speedup over dense by layer name; products that it cannot time are left out."""
        ...


@runtime_checkable
class HasQuantizedBaselines(Protocol):
    """A runtime that can quantise the dense model: the alternative to pruning, as a baseline for `tune`."""

    def references(
        self, exported: Exported, build: Build, images: NDArray[np.float32], folder: Path
    ) -> "Mapping[str, QuantizedBaseline | str]":
        """For each kind of quantisation the best engine, or the reason why there is none.

        Args:
            exported: the dense ONNX file.
            build: options of the engines.
            images: the calibration set, (b, c, h, w), float32.
            folder: where files are written.
        """
        ...


@dataclass(frozen=True, slots=True)
class QuantizedBaseline:
    """An engine of the quantised dense model. `method` describes the quantisation and its reason, within a sentence."""

    engine: Engine
    method: str


@runtime_checkable
class ShipsFile(Protocol):
    """A runtime that writes a file of its own into the output folder when a model is compiled."""

    def shipped(self, exported: Exported, threads: int | None) -> "tuple[Path, Engine] | None":
        """The file, in the folder of `exported.onnx`, and an engine that runs it.

        None if there is no such file or it cannot run on this machine.
        """
        ...


@runtime_checkable
class LoadsFile(Protocol):
    """A runtime that runs the files of an output folder as they are.

    `Artifact.load("engine")` then loads the file instead of building a new engine.
    """

    def load_file(self, exported: Exported, threads: int | None) -> Engine:
        """An engine on the file that was written at compile time. Raises RuntimeMissing or BuildError."""
        ...


@runtime_checkable
class RunsGraph(Protocol):
    """A runtime that runs the captured graph in memory. An ONNX file alone is not enough for it.

    `mpcompile bench` refuses such a target. `Artifact.load("engine")` rebuilds and captures the module for it.
    """

    def graph_engine(self, model: Model) -> Engine:
        """An engine that runs the graph of `model`."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """Software that executes models, whether or not it is installed on this machine."""

    name: ClassVar[str]
    offline: ClassVar[bool]  # whether files are prepared and checked for it although it is missing on this machine

    def kernels(self) -> str:
        """The patterns that it has sparse kernels for, for people to read. Other patterns run as dense."""
        ...

    def has_kernel(self, pattern: NM) -> bool:
        """Whether it has a sparse kernel for this pattern."""
        ...

    def auto_patterns(self) -> tuple[NM, ...]:
        """The patterns that `--pattern auto` lets a budget choose from; empty if there are no sparse kernels."""
        ...

    def missing(self) -> str | None:
        """What to install, or None if nothing is missing. The command line, `doctor` and skipped tests show it."""
        ...

    def idle(self) -> str | None:
        """Why its engines do not run on this machine although nothing is missing, as a sentence, or None."""
        ...

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Why it cannot run with these options, or None. An option is never ignored silently."""
        ...

    def versions(self) -> Mapping[str, str]:
        """The versions of the software that its speed depends on, by name."""
        ...

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """What is known of a file without running it. The target's files are written to `folder`. Raises BuildError."""
        ...

    def build(self, exported: Exported, build: Build) -> Engine:
        """An engine for a model. Raises RuntimeMissing or BuildError."""
        ...


# Class names of version 0.1.
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "Judging": "ReportsKernels",
        "Predicting": "PredictsSpeed",
        "Product": "GemmShape",
        "Referring": "HasQuantizedBaselines",
        "Shipping": "ShipsFile",
        "Staging": "TimesDevice",
    }
)
__getattr__ = renamed_names(__name__, RENAMED)
