"""Compress a model as one step of your own program: shows progress, and handles a gate that fails.

    python examples/embed.py OUTPUT

Tries a sparse pattern first, and a less sparse one if accuracy falls by more than the gate allows.
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
    gates=Gates(max_drop=1.0),  # points of top-1 on held-out images
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
        except AccuracyError as error:  # the folder is written all the same: Artifact.open(folder)
            print(error, file=sys.stderr)
            if pattern == patterns[-1]:
                raise
    raise AssertionError("unreachable")


if __name__ == "__main__":
    try:
        artifact = compress(Path(sys.argv[1]))
    except MpcompileError as failure:  # each class has the exit code of the command line
        print(failure, file=sys.stderr)
        raise SystemExit(failure.exit_code) from None
    print(artifact.folder, *artifact.report.verdict, sep="\n")
