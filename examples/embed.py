"""Compress a model from your own program, with progress messages and an accuracy gate.

    python examples/embed.py OUTPUT

Tries a sparse pattern first. If top-1 falls by more than the gate allows, tries a less sparse one.
"""

import sys
from pathlib import Path

from mpcompile import NM, Artifact, MpcompileError, Progress, Recipe, compile
from mpcompile.errors import AccuracyError
from mpcompile.passes import Certify, NMMask
from mpcompile.recipe.schema import BenchOptions, DataChoice, Gates

EXAMPLE = Path(__file__).parent / "fashion_vit"
RECIPE = Recipe(
    target="ort",
    gates=Gates(max_drop=1.0),  # percentage points of top-1 on held-out images
    data=DataChoice(calibration=64, held_out=500),
    bench=BenchOptions(batches=(1,), seconds=0.2),
)


def show(at: Progress) -> None:
    """Prints one line per stage. Within a stage, `at.step` is `at.done` of `at.total` steps, for a progress bar."""
    if at.step is None:
        print(at, file=sys.stderr)


def compress(output: Path) -> Artifact:
    """Returns the sparser of two models that passes the gate. Raises AccuracyError if neither does."""
    patterns = [NM(1, 64), NM(2, 4)]
    for pattern in patterns:
        folder = output / str(pattern).replace(":", "x")
        try:
            return compile(
                EXAMPLE / "model.safetensors",
                RECIPE,
                passes=[NMMask(pattern), Certify()],
                data=EXAMPLE / "images.npz",
                output=folder,
                observe=show,
            )
        except AccuracyError as error:  # the folder is written nevertheless: Artifact.open(folder)
            print(error, file=sys.stderr)
            if pattern == patterns[-1]:
                raise
    raise AssertionError("unreachable")


if __name__ == "__main__":
    try:
        artifact = compress(Path(sys.argv[1]))
    except MpcompileError as failure:  # each class has the exit code that the command line uses
        print(failure, file=sys.stderr)
        raise SystemExit(failure.exit_code) from None
    print(artifact.folder, *artifact.report.verdict, sep="\n")
