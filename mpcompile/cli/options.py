"""The options that several commands share beside those of the model, as types of their parameters."""

from pathlib import Path
from typing import Annotated

import typer

from mpcompile.cli.choices import (
    ALPHA,
    DEVICES,
    EXIF,
    HEADS,
    PATTERNS,
    SIGNALS,
    TARGETS,
    completion,
    listed,
)

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of `mpcompile compile`.")]


PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="N:M keeps N of every M weights, such as 2:4. 50% keeps half, in the freest pattern that the target runs "
        "at the same speed. With 2:4x4, four neighbouring rows share one pattern. With 4:8v8, each row takes one of 8 "
        "patterns, in every block of 8 input channels. With 2:4,8:16, the budget chooses one for each layer. "
        "With auto, it chooses from the densities that are fast on the target in this precision; with auto:16, from "
        "all N:16.",
        autocompletion=completion(PATTERNS),
    ),
]


ShareRowsOption = Annotated[
    int | None,
    typer.Option(
        "--share-rows",
        help="Number of neighbouring output channels that share one pattern: 2 or 4. 2:4x4 means the same. "
        "The mask is still legal N:M, faster on some CPUs, and less accurate.",
    ),
]


MacsOption = Annotated[
    float | None,
    typer.Option(
        "--macs",
        help="Fraction of multiply-accumulates to keep, such as 0.6. The budget chooses the layers to mask so "
        "that it is reached. With --tome auto, token merging reaches it instead.",
    ),
]


BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help=f"Score by which the budget chooses layers: {listed(SIGNALS)}. [default: mp]",
        autocompletion=completion(SIGNALS),
    ),
]


IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        help="Also mask, and in int8 quantise, layers with this name (a shell pattern) that are left out by default. "
        "Can be repeated.",
    ),
]


ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        help="Keep the layers with this name (a shell pattern) dense, and in int8 in float. Can be repeated.",
    ),
]


PermuteOption = Annotated[
    bool,
    typer.Option(
        "--permute/--no-permute",
        help="Reorder channels before masking, so that patterns keep more of the important weights.",
    ),
]


ConfidenceOption = Annotated[
    bool,
    typer.Option(
        "--confidence/--no-confidence",
        help="Give the compressed model the dense model's confidence back, by one factor on the logits. It changes no "
        "answer and costs no time. Needs --data.",
    ),
]


PolishOption = Annotated[
    float | None,
    typer.Option(
        metavar="MINUTES",
        help="Train the masked model against the dense one for at most this many minutes, without labels, masks fixed. "
        "Keeps the best weights on validation images, or those it began with. Needs --data.",
    ),
]


StrictOption = Annotated[
    bool,
    typer.Option("--strict", help="Fail (exit code 4) if the channels of a layer to be masked cannot be reordered."),
]


TomeOption = Annotated[
    str | None,
    typer.Option(
        "--tome",
        metavar="R",
        help="Merge tokens after each attention. 8: merge 8 after each. 8:decreasing: from 16 down to 0. "
        "0,0,4,8: one number for each. auto: as many as --macs requires.",
    ),
]


TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help=f"Runtime to build for: {'; '.join(f'{name} ({text})' for name, text in TARGETS.items())}. [default: ort]",
        autocompletion=completion(TARGETS),
    ),
]


DataOption = Annotated[
    str | None,  # no path: that would turn wds//folder into wds/folder
    typer.Option(
        "--data",
        help="Folder of images, an .npz file, or a dataset as in timm: wds/FOLDER of shards, hfds/NAME, hfids/NAME, "
        "tfds/NAME. Or PKG.MOD:FN, a function that returns (inputs, target) pairs or a torch Dataset.",
    ),
]


ClassesOption = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        metavar="FILE",
        help="File with the class folder of each output: one name a line, or JSON such as class_to_idx.json.",
    ),
]


ExifOption = Annotated[
    str | None,
    typer.Option(
        "--exif",
        help=f"EXIF orientation of image files: {'; '.join(f'{name} ({text})' for name, text in EXIF.items())}. "
        "[default: apply]",
        autocompletion=completion(EXIF),
    ),
]


AlphaOption = Annotated[
    str | None,
    typer.Option(
        "--alpha",
        help=f"Transparency of image files: {'; '.join(f'{name} ({text})' for name, text in ALPHA.items())}. "
        "[default: drop]",
        autocompletion=completion(ALPHA),
    ),
]


SkipBrokenOption = Annotated[
    bool,
    typer.Option(
        "--skip-broken",
        help="Leave out image files that cannot be read, and count them. Every file is read once first.",
    ),
]


HeadOption = Annotated[
    str | None,
    typer.Option(
        "--head",
        help=f"How outputs become a decision: {listed(HEADS)}. auto takes sigmoid for one output and softmax for "
        "several. It takes values for an output with more axes or the name of an embedding. sigmoid:0.3 sets the "
        "threshold as a probability. [default: auto, threshold 0.5]",
        autocompletion=completion(HEADS),
    ),
]


CalibrationOption = Annotated[
    int | None, typer.Option("--calibration", help="Number of calibration images. [default: 256]")
]


SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Random seed, such as for the choice of images. [default: 0]")
]


DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where passes run: auto (a CUDA GPU if there is one), cpu, cuda or cuda:N. Engines run where the target "
        "does. [default: auto]",
        autocompletion=completion(DEVICES),
    ),
]


MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Memory that the process may use, such as 4GiB. Activations beyond it go to files beside the output. "
        "[default: three quarters of what is free]",
        metavar="SIZE",
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]


VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log more; -vv logs everything.")
]


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only: no progress and no table.")]
