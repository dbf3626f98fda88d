"""What the command line takes: its options, once each, and text -> values."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcompile.errors import UsageError
from mpcompile.model import NM

# ---- which model

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

# ---- what to do to it

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

# ---- on which images

DataOption = Annotated[Path | None, typer.Option("--data", help="A folder of images, or an .npz file.")]
CalibrationOption = Annotated[int | None, typer.Option("--calibration", help="Images for calibration. [default: 256]")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Chooses the images. [default: 0]")]

# ---- how to tell

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
VerboseOption = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice: everything.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table; errors only.")]


# ---- text -> values


def batch(text: str | None) -> tuple[str | int | None, tuple[int, ...] | None]:
    """The batch of the file, fixed or `dynamic`, and the batches to build for and to time, where they are said."""
    if text is None or text == "dynamic":
        return text, None
    try:
        sizes = batches(text) or ()
    except UsageError as error:
        raise UsageError(f"{error}; it may also be dynamic, or one number, which is then fixed") from None
    return (sizes[0], None) if len(sizes) == 1 else ("dynamic", sizes)


def batches(text: str | None) -> tuple[int, ...] | None:
    """Batch sizes, separated by commas."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise UsageError(f"--batch {text!r} is not a list of batch sizes, such as 1,8,64")
    return tuple(int(part) for part in parts)


def size(text: str | None) -> tuple[int, int, int] | None:
    """Channels, height and width."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(
        part.isdecimal() and part.isascii() and len(part) < 10 and int(part) for part in parts
    ):
        raise UsageError(f"--input-size {text!r} is not CxHxW, such as 3x224x224")
    channels, height, width = map(int, parts)
    return channels, height, width


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """A number a channel."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a number a channel, such as 0.5,0.5,0.5") from None


def key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value read as JSON where it is JSON and as text where not."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--arch-arg {text!r} is not KEY=VALUE, such as img_size=384")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def shared_macs(macs: float | None, tome: str | None, pattern: str | None) -> tuple[float | None, float | None]:
    """--macs for the budget and for token merging, of which one goes by it."""
    if tome != "auto":
        return macs, None
    if macs is None:
        raise UsageError("--tome auto shares merges out and needs something to reach; give --macs too")
    if pattern is not None and ("," in pattern or pattern.startswith("auto")):
        raise UsageError(
            f"--tome auto and --pattern {pattern} would both go by --macs; give one pattern, or say in a recipe what "
            "each is to reach"
        )
    return None, macs


def patterns(text: str | None, target: str, macs: float | None, rows: int | None = None) -> tuple[str, ...]:
    """The patterns that --pattern names, spelt out, shared by so many rows; `auto` goes by what the target has kernels
    for.
    """
    from mpcompile.resolve import auto_patterns

    if text is None:
        return ()
    if text.split(":")[0] != "auto":
        return tuple(str(_shared(NM.parse(part), rows)) for part in text.split(","))
    group = text.partition(":")[2]
    if text != "auto" and not (group.isdecimal() and len(group) < 10):
        raise UsageError(f"--pattern {text!r} is neither auto nor auto:M, such as auto:16")
    if macs is None:
        raise UsageError(f"--pattern {text} chooses between patterns and needs something to reach; give --macs too")
    return tuple(str(_shared(pattern, rows)) for pattern in auto_patterns(target, int(group) if group else None))


def _shared(pattern: NM, rows: int | None) -> NM:
    """The pattern with its rows as --share-rows says."""
    if rows is None:
        return pattern
    if pattern.rows not in (1, rows):
        raise UsageError(f"--share-rows {rows} and the pattern {pattern} say two things; leave one of them out")
    return replace(pattern, rows=rows)
