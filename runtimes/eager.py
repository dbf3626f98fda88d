"""Target `eager`: the captured graph in PyTorch, the reference for every other runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import Exported, Lowered
from mpcompile.ir.model import Model
from mpcompile.runtimes.protocol import Build, Prepared, WithoutKernels


@dataclass(frozen=True)
class EagerEngine:
    """Runs the captured graph in float32."""

    model: Model

    def __call__(self, images: NDArray[np.float32], *others: NDArray[Any]) -> NDArray[np.float32]:
        """Returns the primary output, such as logits (b, outputs), of images (b, c, h, w) and further inputs."""
        output: NDArray[np.float32] = self.model(tuple(map(torch.from_numpy, (images, *others)))).numpy()
        return output

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """Returns one row per node of the graph."""
        return [{"name": node.name, "op": node.op, "target": str(node.target)} for node in self.model.graph.graph.nodes]

    @property
    def device(self) -> str:
        return "cpu"


@dataclass(frozen=True)
class Eager(WithoutKernels):
    """The target `eager`. It has no sparse kernels and always runs in float32."""

    name: ClassVar[str] = "eager"
    several_inputs: ClassVar[bool] = True
    offline: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Returns None: mpcompile requires PyTorch."""
        return None

    def idle(self) -> str | None:
        """Returns None: it runs wherever PyTorch does."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """Returns why it cannot use a precision other than fp32, or `--threads`."""
        if precision != "fp32":
            return f"it runs the float32 graph and not the file, so {precision} would not be measured; use --target ort"
        if threads is not None:
            return "it runs on the threads of the process; leave --threads out"
        return None

    def versions(self) -> Mapping[str, str]:
        return {"torch": str(torch.__version__)}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Returns nothing: it does not use the file."""
        return Prepared()

    def build(self, exported: Exported, build: Build) -> EagerEngine:
        """Returns the engine. Raises BuildError for an output folder, which has a file and no graph."""
        if not isinstance(exported, Lowered):
            raise BuildError("target eager runs the captured graph, and an output folder has none; use --target ort")
        return self.graph_engine(exported.model)

    def graph_engine(self, model: Model) -> EagerEngine:
        """The engine of a captured model."""
        return EagerEngine(model)
