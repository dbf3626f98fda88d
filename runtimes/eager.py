"""PyTorch running the captured graph: the reference that every other runtime is compared with."""

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
    """The graph itself, in float32."""

    model: Model

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch."""
        logits: NDArray[np.float32] = self.model(torch.from_numpy(images)).numpy()
        return logits

    def layers(self) -> Sequence[Mapping[str, Any]]:
        """One row a node of the graph."""
        return [{"name": node.name, "op": node.op, "target": str(node.target)} for node in self.model.graph.graph.nodes]

    @property
    def device(self) -> str:
        return "cpu"


@dataclass(frozen=True)
class Eager(WithoutKernels):
    """Target `eager`. It has no sparse kernels, and always runs in float32."""

    name: ClassVar[str] = "eager"
    offline: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Nothing: PyTorch is what mpcompile stands on."""
        return None

    def idle(self) -> str | None:
        """It runs wherever PyTorch does."""
        return None

    def refuses(self, precision: str, threads: int | None) -> str | None:
        """It runs the captured graph as it is, in the process that it is in."""
        if precision != "fp32":
            return f"it runs the float32 graph, and not the file, so {precision} would not be measured"
        if threads is not None:
            return "it runs on the threads of the process; leave --threads out"
        return None

    def versions(self) -> Mapping[str, str]:
        return {"torch": str(torch.__version__)}

    def prepare(self, exported: Exported, folder: Path, build: Build) -> Prepared:
        """Nothing: it does not look at the file."""
        return Prepared()

    def build(self, exported: Exported, build: Build) -> EagerEngine:
        """The engine. Raises BuildError where there is only a file."""
        if not isinstance(exported, Lowered):
            raise BuildError("target eager runs the captured graph, and an output folder holds none; use --target ort")
        return EagerEngine(exported.model)
