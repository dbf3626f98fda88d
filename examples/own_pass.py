"""Write your own pass: a frozen dataclass, checked against the contract of passes, then used to compile a model.

python examples/own_pass.py OUTPUT
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from mpcompile import NM, Data, Effect, Model, PassManager, Recipe, compile, tracked
from mpcompile.errors import on_layer
from mpcompile.passes import NMMask
from mpcompile.recipe.schema import BenchOptions
from mpcompile.testing import check_contract, tiny_vit


@dataclass(frozen=True, slots=True)
class ClipOutliers:
    """Clips weights to ± `deviations` standard deviations of their layer, which helps low-precision formats."""

    name: ClassVar[str] = "clip-outliers"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    deviations: float = 4.0

    @torch.no_grad()
    def __call__(self, model: Model, data: Data) -> Model:
        """Returns the model with clipped weights. Zeros stay zero, so masks remain valid."""
        layers = dict(model.layers())
        for name in tracked(layers):  # reports progress
            with on_layer(name):  # errors in this block name the layer
                weight = layers[name].weight
                limit = self.deviations * float(weight.std())
                weight.clamp_(-limit, limit)
        return model


def main(output: Path) -> None:
    """Checks the pass, runs it alone, then compiles with it."""
    check_contract(ClipOutliers(deviations=3.0), tiny_vit())

    _, [record] = PassManager([ClipOutliers()]).run(tiny_vit(), Data())
    print(f"{record.name} changed the outputs by {record.drift:.1%} of the largest output")

    artifact = compile(
        Path(__file__).parent / "fashion_vit" / "model.safetensors",
        Recipe(target="eager", bench=BenchOptions(batches=(1,), seconds=0.2)),
        passes=[ClipOutliers(), NMMask(NM(2, 4))],
        output=output,
    )
    print(artifact.recipe.passes[0], artifact.report.environment["pass clip-outliers"], sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
