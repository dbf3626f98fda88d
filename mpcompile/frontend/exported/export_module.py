"""Exports a module with torch.export and lifts the program: the way for modules that capture refuses."""

import copy
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from mpcompile.errors import CaptureError, first_line
from mpcompile.frontend.exported.lift import lift
from mpcompile.frontend.exported.program import program_of
from mpcompile.frontend.exported.refusal import ProgramRefused

LARGEST_BATCH = 2**16
ONE_EXPORT = threading.Lock()  # sys.stderr is replaced meanwhile
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def exported(module: nn.Module, example: Inputs) -> fx.GraphModule:
    """The module's operators as torch.export traces them, with its layers under their own names, for any batch size.

    Args:
        module: the model; it is not changed. Evaluation mode is exported.
        example: a batch, or a tuple of positional inputs, or inputs by keyword, all with the batch as first axis.

    Raises CaptureError if torch.export refuses the module, or if its program depends on the batch size.
    """
    kind = type(module).__name__
    args = (example,) if isinstance(example, Tensor) else example if isinstance(example, tuple) else ()
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    try:
        own = copy.deepcopy(module).eval()
    except Exception as error:
        raise CaptureError(f"{kind} cannot be copied ({first_line(error)})") from error
    reasons = []
    for free in (True, False):
        try:
            with torch.no_grad(), warnings.catch_warnings(), _quiet():
                warnings.simplefilter("ignore")
                program = program_of(_export(own, args, kwargs, free))
            return lift(program, kind)
        except ProgramRefused as reason:
            reasons.append(f"its program {reason}")
        except Exception as error:  # torch.export raises errors of many types
            reasons.append(f"{type(error).__name__}: {first_line(error)[:300]}")
    raise CaptureError(
        f"torch.export cannot trace {kind} ({reasons[-1]}); change the line of its forward that this names, or pass "
        "the part of the model that does not contain it"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what torch.export prints and warns of in this thread: whole programs. The error has what a user needs."""
    thread = threading.get_ident()
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")

    def of_other_threads(record: logging.LogRecord) -> bool:
        return record.thread != thread

    with ONE_EXPORT:
        logger.addFilter(of_other_threads)
        shown = sys.stderr
        sys.stderr = _OfOtherThreads(shown, thread)
        try:
            yield
        finally:
            logger.removeFilter(of_other_threads)
            sys.stderr = shown


class _OfOtherThreads(io.TextIOBase):
    """A stream that drops what one thread writes."""

    def __init__(self, stream: TextIO, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: bool) -> ExportedProgram:
    """The exported program, with a free batch or with that of the example."""
    batch = Dim("batch", min=1, max=LARGEST_BATCH)

    def dims(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) else None

    shapes = (*map(dims, args),) if not kwargs else {key: dims(value) for key, value in kwargs.items()}
    return torch.export.export(module, args, kwargs, dynamic_shapes=shapes if free else None, strict=False)
