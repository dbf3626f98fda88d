"""The errors that a user can meet, each with the exit code of the command line: all are MpcompileErrors.

Only Recipe(…) raises pydantic's ValidationError; Recipe.checked and read_recipe make a UsageError of that.

A message says what was found, what was needed, and what to do. Deep code states the fact; the front door and
the pass manager add the caller's context once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "AccuracyError",
    "BuildError",
    "CaptureError",
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


LONGEST_LINE = 1000


class MpcompileError(Exception):
    """Any failure that mpcompile explains; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(MpcompileError):
    """An option or a recipe that cannot be followed."""

    exit_code = 2


class LoadError(MpcompileError):
    """A model or images that cannot be read."""

    exit_code = 3


class CaptureError(MpcompileError):
    """A model that torch.fx cannot trace, or whose traced graph does not compute the same."""

    exit_code = 3


class PassError(MpcompileError):
    """A pass that failed or broke its promise."""

    exit_code = 4


class ParityError(MpcompileError):
    """Two forms of one model whose outputs differ by more than the stated tolerance."""

    exit_code = 5


class MaskError(MpcompileError):
    """A mask that does not hold, or that was lost on the way to the file."""

    exit_code = 5


class AccuracyError(MpcompileError):
    """A compressed model that lost more than the recipe's gate allows; its folder is written all the same."""

    exit_code = 6


class RuntimeMissing(MpcompileError):
    """A runtime that is not installed here; the text says what to install."""

    exit_code = 7


class BuildError(MpcompileError):
    """A runtime that is here and could not build or run the model."""

    exit_code = 7


class ResourceError(MpcompileError):
    """A disk or a memory that did not suffice."""


class LayerFailure(Exception):
    """Marks which layer a pass was working on; the pass manager unwraps it."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


@contextmanager
def on_layer(name: str) -> Iterator[None]:
    """Inside, any failure is remembered as having happened on layer `name`."""
    try:
        yield
    except Exception as error:
        raise LayerFailure(name) from error


def one_line(error: BaseException) -> str:
    """An error and its notes as one line for a terminal: text from files may hold breaks and control characters."""
    words = " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)
    return (
        text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} … ({len(text) - LONGEST_LINE:,} more characters)"
    )


def cause_of(error: BaseException) -> str:
    """The first line of the innermost reason: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
