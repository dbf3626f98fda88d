"""What the command line takes: its options, once each, and text -> values."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(help="A file of weights, timm:NAME, or pkg.mod:factory.")]


ArchOption = Annotated[
    str | None, typer.Option("--arch", help="Architecture of a file of weights: timm name or pkg.mod:factory.")
]


ArchArgOption = Annotated[
    list[str] | None, typer.Option("--arch-arg", metavar="KEY=VALUE", help="An argument of the architecture.")
]


PretrainedOption = Annotated[bool, typer.Option("--pretrained", help="With timm:NAME, fetch the hub's weights.")]


AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Run the code in a pickled model. Trust it first.")
]


InputSizeOption = Annotated[
    str | None, typer.Option("--input-size", metavar="CxHxW", help="Shape of an image, such as 3x224x224.")
]


MeanOption = Annotated[
    str | None, typer.Option("--mean", metavar="M,M,M", help="Mean of pixels in [0, 1], a channel each.")
]


StdOption = Annotated[str | None, typer.Option("--std", metavar="S,S,S", help="Standard deviation likewise.")]


LeafOption = Annotated[
    list[str] | None, typer.Option("--leaf", metavar="NAME", help="Keep this module whole when tracing.")
]


PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="N:M, N kept of every M; 2:4x4: four rows share one pattern. Several, as 2:4,8:16, or auto or auto:16 "
        "(all N:16), for the budget to choose from.",
    ),
]


ShareRowsOption = Annotated[
    int | None,
    typer.Option(
        "--share-rows",
        help="Let 2 or 4 neighbouring output channels share one pattern, as 2:4x4 does: still legal N:M, faster on "
        "some CPUs, dearer in accuracy.",
    ),
]


MacsOption = Annotated[
    float | None,
    typer.Option(
        "--macs",
        help="The share of multiply-accumulates to leave; the budget decides where, or with --tome auto the merging.",
    ),
]


BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", help="What it goes by: mp, magnitude, std, uniform, lamp, owl or sensitivity. [default: mp]"
    ),
]


IncludeOption = Annotated[
    list[str] | None, typer.Option("--include", help="Mask these layers too (shell pattern on names).")
]


ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", help="Keep these layers dense (shell pattern on names).")
]


PermuteOption = Annotated[
    bool, typer.Option("--permute/--no-permute", help="Reorder channels, so that the pattern keeps more.")
]


StrictOption = Annotated[
    bool, typer.Option("--strict", help="Fail (4) where the channels of a masked layer cannot be reordered.")
]


TomeOption = Annotated[
    str | None,
    typer.Option(
        "--tome",
        metavar="R",
        help="Merge tokens: 8 after each attention; 8:decreasing, from 16 down to none; 0,0,4,8, each its own; auto, "
        "shared out so that --macs is reached.",
    ),
]


TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="The runtime: ort or ort-cuda (ONNX Runtime), trt (TensorRT), rtx (TensorRT for RTX, compiled without a "
        "GPU) or eager (PyTorch). [default: ort]",
    ),
]


DataOption = Annotated[Path | None, typer.Option("--data", help="A folder of images, or an .npz file.")]


CalibrationOption = Annotated[int | None, typer.Option("--calibration", help="Images for calibration. [default: 256]")]


SeedOption = Annotated[int | None, typer.Option("--seed", help="Chooses the images. [default: 0]")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]


VerboseOption = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice: everything.")]


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table; errors only.")]
