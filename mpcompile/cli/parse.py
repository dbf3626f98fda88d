"""Parses the text of options into values. A wrong text raises a UsageError that shows a correct one."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpcompile.errors import UsageError, did_you_mean
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import Alternatives, parse_choice, parse_density, patterns_in, with_rows

if TYPE_CHECKING:
    from mpcompile.frontend.load_model import Request
    from mpcompile.ir.precision import Precision


def request_of(
    model: str,
    arch: str | None,
    arch_arg: list[str] | None,
    pretrained: bool,
    allow_pickle: bool,
    input_size: str | None,
    mean: str | None,
    std: str | None,
    leaf: list[str] | None,
    preprocess: str | None = None,
    resize: str | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    channel_order: str | None = None,
    weights_key: str | None = None,
    inputs: list[str] | None = None,
    output_name: str | None = None,
) -> "Request":
    """The model, its architecture and its preprocessing, as the options name them. Raises UsageError."""
    from mpcompile.frontend.call_inputs import InputSpec
    from mpcompile.frontend.load_model import Request

    return Request(
        model=model,
        arch=arch,
        arch_args=dict(key_value(text) for text in arch_arg or ()),
        pretrained=pretrained,
        allow_pickle=allow_pickle,
        input_size=size(input_size),
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        leaves=tuple(leaf or ()),
        preprocess=preprocess,
        resize=sides(resize),
        crop_pct=crop_pct,
        interpolation=interpolation,
        channel_order=channel_order,
        weights_key=weights_key,
        inputs={name: InputSpec.parse(shape) for name, shape in map(input_shape, inputs or ())},
        output_name=output_name,
    )


def reading(classes: Path | None, exif: str | None, alpha: str | None, skip_broken: bool) -> dict[str, Any]:
    """How folders of images are read: values of the recipe's section `data`; None for an option that is not given."""
    return {
        "classes": str(classes) if classes else None,
        "exif": exif,
        "alpha": alpha,
        "skip_broken": skip_broken or None,
    }


def drop_limits(text: str | None) -> dict[str, float | None]:
    """The limits of --max-drop as values of the recipe's section `gates`: a number of points, or NAME=NUMBER pairs.

    Raises UsageError.
    """
    names = {"top1": "max_drop", "ece": "max_ece", "kl": "max_kl"}
    limits: dict[str, float | None] = dict.fromkeys(names.values())
    if text is None:
        return limits
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        name = name.strip() or "top1"
        if name not in names:
            raise UsageError(_no_limits(text) + did_you_mean(name, names))
        if limits[names[name]] is not None:
            raise UsageError(f"{_no_limits(text)}; {name} is there twice")
        try:
            limits[names[name]] = float(value)
        except ValueError as error:
            raise UsageError(_no_limits(text)) from error
    return limits


def _no_limits(text: str) -> str:
    return f"--max-drop {text!r} is not a limit; give points of top-1, such as 0.5, or top1=0.5,ece=0.02,kl=0.1"


def head(text: str | None) -> str:
    """The value of --head; `auto` if it is not given. Raises UsageError."""
    from mpcompile.ir.head import HeadChoice  # imports numpy, which --help does without

    try:
        HeadChoice.parse(text or "auto")
    except ValueError as error:
        raise UsageError(f"--head: {error}") from error
    return text or "auto"


def batch(text: str | None) -> tuple[str | int | None, tuple[int, ...] | None]:
    """The batch size of the ONNX file (a number or "dynamic"), and the batch sizes to build for and to time.

    Both are None if not given. Raises UsageError.
    """
    if text is None or text == "dynamic":
        return text, None
    try:
        sizes = batches(text) or ()
    except UsageError as error:
        raise UsageError(f"{error}, one number for a fixed batch, or dynamic") from None
    return (sizes[0], None) if len(sizes) == 1 else ("dynamic", sizes)


def batches(text: str | None) -> tuple[int, ...] | None:
    """The batch sizes in a comma-separated list. Raises UsageError."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise UsageError(f"--batch {text!r} is not a list of batch sizes; give for example 1,8,64")
    return tuple(int(part) for part in parts)


def memory(text: str | None) -> int | None:
    """The bytes of `--memory`, such as 4GiB or 800MB. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UsageError(f"--memory {text!r} is no size; give a number with its unit, such as 4GiB")
    power = "kmgt".index(match[2][0].lower()) + 1
    return int(float(match[1]) * (1024 if "i" in match[2].lower() else 1000) ** power)


def size(text: str | None) -> tuple[int, int, int] | None:
    """The channels, height and width in `3x224x224`. Raises UsageError."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(
        part.isdecimal() and part.isascii() and len(part) < 10 and int(part) for part in parts
    ):
        raise UsageError(f"--input-size {text!r} is not CxHxW; give for example 3x224x224")
    channels, height, width = map(int, parts)
    return channels, height, width


def sides(text: str | None) -> tuple[int, ...] | None:
    """The pixels in `256` (of the shorter side) or `224x224` (height and width). Raises UsageError."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(
        part.isdecimal() and part.isascii() and len(part) < 10 and int(part) for part in parts
    ):
        raise UsageError(f"--resize {text!r} is neither N nor HxW; give for example 256 or 224x224")
    return tuple(map(int, parts))


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """The numbers in a comma-separated list, one for each channel. Raises UsageError."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not one number per channel; give for example 0.5,0.5,0.5") from None


def key_value(text: str) -> tuple[str, Any]:
    """The key and the value in `KEY=VALUE`. The value is read as JSON, else as text. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--arch-arg {text!r} is not KEY=VALUE; give for example img_size=384")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def input_shape(text: str) -> tuple[str, str]:
    """The name and the shape in `NAME=SHAPE`. Raises UsageError."""
    name, equals, shape = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--input {text!r} is not NAME=SHAPE; give for example --input meta=4")
    return name, shape


def macs_by_pass(macs: float | None, tome: str | None, pattern: str | None) -> tuple[float | None, float | None]:
    """The value of --macs as a pair: for the budget and for token merging. One of the two is None.

    With --tome auto, token merging gets the value; otherwise the budget does.

    Raises UsageError if both would have to reach it, or if --tome auto has no --macs.
    """
    if tome != "auto":
        return macs, None
    if macs is None:
        raise UsageError("--tome auto merges as many tokens as --macs requires; give --macs too")
    if pattern is not None and ("," in pattern or pattern.startswith("auto")):
        raise UsageError(
            f"--tome auto and --pattern {pattern} would both have to reach --macs; give one pattern, or a recipe with "
            "macs for each of the two passes"
        )
    return None, macs


def patterns(
    text: str | None, target: str, macs: float | None, rows: int | None = None, precision: str = "fp32"
) -> tuple[NM | Alternatives, ...]:
    """The patterns in `2:4`, `2:4,8:16`, `50%`, `auto` or `auto:16`; empty if none are given.

    `auto` stands for the densities that are fast on the target in this precision, `50%` for the patterns of this
    density that it runs at the same speed. With `rows` (--share-rows), that many
    output channels share each pattern. Raises UsageError.
    """
    if text is None:
        return ()
    if text.split(":")[0] != "auto":
        return tuple(_with_rows(_choice(part, target, precision), rows) for part in text.split(","))
    group = text.partition(":")[2]
    if text != "auto" and not (group.isdecimal() and len(group) < 10):
        raise UsageError(f"--pattern {text!r} is neither auto nor auto:M; give for example auto:16")
    if macs is None:
        raise UsageError(f"--pattern {text} chooses the patterns so that --macs is reached; give --macs too")
    from mpcompile.driver.run_plan import auto_patterns

    found = auto_patterns(target, int(group) if group else None, precision_named(precision), rows or 1)
    return tuple(_with_rows(pattern, rows) for pattern in found)


def precision_named(text: str) -> "Precision":
    """The precision of this name. Raises UsageError."""
    from mpcompile.ir.precision import PRECISIONS

    for precision in PRECISIONS:
        if precision == text:
            return precision
    raise UsageError(f"--precision {text!r} is unknown; give {', '.join(PRECISIONS)}{did_you_mean(text, PRECISIONS)}")


def _choice(text: str, target: str, precision: str) -> NM | Alternatives:
    """One pattern of the list, or what a density stands for on the target. Raises UsageError."""
    density = parse_density(text)
    if density is None:
        return parse_choice(text)
    from mpcompile.driver.run_plan import density_patterns

    return density_patterns(target, density[0], precision_named(precision), density[1])


def _with_rows(choice: NM | Alternatives, rows: int | None) -> NM | Alternatives:
    if rows is None:
        return choice
    if patterns_in(choice)[0].rows not in (1, rows):
        raise UsageError(f"--share-rows {rows} contradicts the pattern {choice}; leave one of them out")
    return with_rows(choice, rows)
