"""The line of model code behind a call, for errors that have to name it."""

import linecache
import sys
from pathlib import Path

import torch

LIBRARY_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def source_line() -> str:
    """`file:line` of the innermost frame that is neither torch's nor of this folder."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        # Checks of annotations, which may be around any function, are not the model's code.
        if not file.startswith((*LIBRARY_FOLDERS, "<")) and "/jaxtyping/" not in file:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def in_assertion() -> bool:
    """Whether the call comes from an assertion of torch (`torch._check…`, `torch._assert`), which only raises."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*LIBRARY_FOLDERS, "<")):
        if frame.f_code.co_name.startswith(("_check", "_assert")) and frame.f_code.co_filename == torch.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def with_code(line: str) -> str:
    """A `file:line` with the code that stands there, if the file can be read."""
    file, _, number = line.rpartition(":")
    code = linecache.getline(file, int(number)).strip() if number.isdigit() else ""
    return f"{line}: `{code}`" if code else line
