"""What a runtime and an engine are: the protocols that every file beside this one fulfils, and what passes between."""

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
from mpcompile.ir.pattern import NM
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.timing import Speedup
from mpcompile.system.moved_modules import renamed_names

NO_KERNELS = "none: masked layers run as dense"


class WithoutKernels:
    """What a runtime says that has no kernels for any pattern."""

    def kernels(self) -> str:
        """None."""
        return NO_KERNELS

    def has_kernel(self, pattern: NM) -> bool:
        """No."""
        return False

    def auto_patterns(self) -> tuple[NM, ...]:
        """None."""
        return ()


@dataclass(frozen=True, slots=True)
class Build:
    """How an engine is built. `batches` are those that will be run, which an engine that has to know its shapes is made
    for where the file leaves the batch free. `sparse` lets it use sparse kernels. `folder` is where files of its own
    go, if any.
    """

    threads: int | None = None
    sparse: bool = True
    batches: tuple[int, ...] = (1, 8)
    folder: Path | None = None

    def profile(self, exported: Exported) -> tuple[tuple[int, ...], ...] | None:
        """The smallest, usual and largest shape of the images, or None where the file has one only."""
        if exported.batch is not None:
            return None
        ordered = sorted(self.batches)
        sizes = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
        return tuple((size, *exported.image_shape) for size in sizes)

    def file_stem(self, exported: Exported) -> str:
        """What tells the engines of a model apart, for the names of files: model, pattern, precision, batches."""
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
    """What a runtime makes of a file without running it: what becomes of each masked layer, sentences for the report,
    and the commands that build and measure it where it can run.
    """

    verdicts: tuple[LayerVerdict, ...] = ()
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GemmShape:
    """A product of `tokens` rows with a weight (out, in_) of a pattern."""

    out: int
    in_: int
    tokens: int
    pattern: NM


@runtime_checkable
class PredictsSpeed(Protocol):
    """A runtime that can say beforehand how fast a masked product will be, by trying one like it."""

    def predicted(self, products: Mapping[str, GemmShape]) -> Mapping[str, Speedup]:
        """The measured speedup of each over dense, by name; those that it cannot try are left out."""
        ...


@runtime_checkable
class HasQuantizedBaselines(Protocol):
    """A runtime that can run the dense model quantised, as a user would try it instead of pruning."""

    def references(
        self, exported: Exported, build: Build, images: NDArray[np.float32], folder: Path
    ) -> "Mapping[str, QuantizedBaseline | str]":
        """The best by kind of quantisation, or why there is none; `images` calibrate it, files go to `folder`."""
        ...


@runtime_checkable
class ShipsFile(Protocol):
    """A runtime whose output holds a file of its own, made when the model was compiled."""

    def shipped(self, exported: Exported, threads: int | None) -> "tuple[Path, Engine] | None":
        """That file, which lies beside `exported.onnx`, and its engine; None where there is none, or it cannot run."""
        ...


@runtime_checkable
class Engine(Protocol):
    """A model that runs: the harness times this call and compares what it returns."""

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (b, outputs) of images (b, c, h, w), both float32."""
        ...

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """A row a layer of what the engine will really execute, as far as the runtime tells."""
        ...

    @property
    def device(self) -> str:
        """What it runs on, for people to read."""
        ...


@dataclass(frozen=True, slots=True)
class QuantizedBaseline:
    """The dense model quantised: an engine, and how it was quantised and why so, as part of a sentence."""

    engine: Engine
    method: str


@runtime_checkable
class TimesDevice(Protocol):
    """An engine on a device of its own, whose work can be timed apart from transfers."""

    def staged(self, images: NDArray[np.float32], *, transfers: bool, graph: bool) -> Callable[[], object]:
        """One call as it is timed: it returns when the device is done. With `graph` its work is recorded once and
        started whole. Raises BuildError where that cannot be done.
        """
        ...


@runtime_checkable
class ReportsKernels(Protocol):
    """An engine that tells what it chose for each masked layer."""

    def judged(
        self,
        verdicts: Sequence[LayerVerdict],
        masks: Sequence[ProvenMask],
        images: NDArray[np.float32],
        unused: Any = None,
    ) -> tuple[LayerVerdict, ...]:
        """The verdicts, completed; `unused` is an engine of the same kind and file without sparse kernels, if any."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """Something that executes models, whether or not it is installed here."""

    name: ClassVar[str]
    offline: ClassVar[bool]  # whether files are prepared and checked for it where it is missing

    def kernels(self) -> str:
        """For which patterns it has kernels, for people to read; any other runs as dense."""
        ...

    def has_kernel(self, pattern: NM) -> bool:
        """Whether it has one for this pattern."""
        ...

    def auto_patterns(self) -> tuple[NM, ...]:
        """The patterns that a budget chooses from with `--pattern auto`; none where it has no kernels."""
        ...

    def missing(self) -> str | None:
        """What to install to use it here, or None: the one text for the command line, `doctor` and the tests."""
        ...

    def idle(self) -> str | None:
        """Why what it makes does not run here although nothing is missing, as a sentence, or None."""
        ...

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Why it cannot run so, or None: nothing that was asked for is left out silently."""
        ...

    def versions(self) -> Mapping[str, str]:
        """The versions of the software that decides how fast it is."""
        ...

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """What can be said and made of a file without running it; files go into `folder`. Raises BuildError."""
        ...

    def build(self, exported: Exported, build: Build) -> Engine:
        """An engine for a model. Raises RuntimeMissing or BuildError."""
        ...


# Names of version 0.1.
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
