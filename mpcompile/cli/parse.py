"""Text of options -> values; each mistake is a UsageError that shows a right one."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM

if TYPE_CHECKING:
    from mpcompile.frontend.load_model import Request


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
) -> "Request":
    """The model that the options name."""
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
    )


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
    from mpcompile.driver.run_plan import auto_patterns

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
