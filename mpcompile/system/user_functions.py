"""Imports a function that the user names as `pkg.mod:name`. The working folder is importable, as with `python -m`."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpcompile.errors import LoadError, first_line


def is_function_name(text: str) -> bool:
    """Whether a text has the form `pkg.mod:name`."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


@contextlib.contextmanager
def working_folder_importable() -> Iterator[None]:
    """Modules of the working folder can be imported, and what they print goes to standard error."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            yield
    finally:
        if added:
            sys.path.remove(here)


def imported_function(name: str) -> Callable[..., Any]:
    """The function `pkg.mod:name`. Importing its module runs code of the user. Raises LoadError."""
    module_name, _, attribute = name.partition(":")
    try:
        with working_folder_importable():
            function = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit on import
        raise LoadError(f"{name} could not be imported: {type(error).__name__}: {first_line(error)}") from error
    if not callable(function):
        raise LoadError(f"{name} is a {type(function).__name__}; it must be a function")
    found: Callable[..., Any] = function
    return found
