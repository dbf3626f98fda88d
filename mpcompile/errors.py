"""The errors that users meet. Each is an MpcompileError with an exit code for the command line.

`Recipe(…)` alone raises pydantic's ValidationError; `Recipe.checked` and `read_recipe` turn that into a UsageError.

A message says what was found, what was needed, and what to do. Low-level code states the fact; the driver and the pass
manager add the context of the call once.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "AccuracyError",
    "BuildError",
    "CaptureError",
    "ConditionError",
    "LoadError",
    "MaskError",
    "MpcompileError",
    "ParityError",
    "PassError",
    "ResourceError",
    "RuntimeMissing",
    "UsageError",
    "on_layer",
]

LONGEST_LINE = 1000  # characters of an error that are shown in a terminal


class MpcompileError(Exception):
    """Any failure that mpcompile explains. `exit_code` is the exit code of the command line."""

    exit_code = 1


class UsageError(MpcompileError):
    """An invalid option or recipe."""

    exit_code = 2


class LoadError(MpcompileError):
    """A model file or images that cannot be read."""

    exit_code = 3


class CaptureError(MpcompileError):
    """A model whose run cannot be recorded as a graph, or whose graph does not compute the same."""

    exit_code = 3


class PassError(MpcompileError):
    """A pass that failed, or that changed more than its declared effect allows."""

    exit_code = 4


class ParityError(MpcompileError):
    """Two forms of one model whose outputs differ by more than the stated tolerance."""

    exit_code = 5


class MaskError(MpcompileError):
    """A weight that is non-zero where its mask is zero, or a mask that is missing in the ONNX file."""

    exit_code = 5


class AccuracyError(MpcompileError):
    """A compressed model that lost more accuracy than the gate allows, or a dense one whose accuracy cannot be right.

    The output folder is still written.
    """

    exit_code = 6


class ConditionError(MpcompileError):
    """A condition of `compare --fail-if` that is true, or that names a metric which was not measured."""

    exit_code = 6


class RuntimeMissing(MpcompileError):
    """A runtime that is not installed. The message says what to install."""

    exit_code = 7


class BuildError(MpcompileError):
    """A runtime that is installed but could not build or run the model."""

    exit_code = 7


class ResourceError(MpcompileError):
    """A full disk, or too little memory."""


class LayerFailure(Exception):
    """Carries the name of the layer that a pass was working on. The pass manager unwraps it."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


@contextmanager
def on_layer(name: str) -> Iterator[None]:
    """A context in which any exception is re-raised as a LayerFailure of layer `name`."""
    try:
        yield
    except Exception as error:
        raise LayerFailure(name) from error


def one_line(error: BaseException) -> str:
    """An error and its notes as one printable line.

    Texts that come from files may hold line breaks and control characters; these are escaped.
    """
    words = " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)
    return (
        text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} … ({len(text) - LONGEST_LINE:,} more characters)"
    )


def cause_of(error: BaseException) -> str:
    """Type and first line of the innermost cause. (torch wraps the cause in pages of advice.)"""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; empty if it has none."""
    return (str(error).strip().splitlines() or [""])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name that is nearest to a misspelt one; empty if none is near."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
