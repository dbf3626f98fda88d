"""Reads the report of an output folder. Nothing else of the folder is opened, and nothing is unpickled."""

from pathlib import Path

from pydantic import ValidationError

from mpcompile.errors import LoadError
from mpcompile.recipe.schema import explained
from mpcompile.report.report_hashes import require_unchanged
from mpcompile.report.schema import Report

NAME = "report.json"


def read_report(folder: Path) -> Report:
    """The report in a folder. Raises LoadError if it cannot be read or is not of this version."""
    path = folder / NAME
    try:
        return Report.read(folder)
    except ValidationError as error:
        raise LoadError(f"{path} is not a report of this version: {explained(error)}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error


def read_checked_report(folder: Path) -> Report:
    """The report in a folder, after a check that it is the one that was written.

    Only report.json is needed. If report.sha256 is beside it, its hash is checked. Raises LoadError.
    """
    try:
        found = (folder / NAME).is_file()
    except (OSError, ValueError) as error:  # too long, no permission, or a byte that names cannot have
        raise LoadError(f"{folder} cannot be looked up: {error}") from error
    if not found:
        raise LoadError(f"{folder} has no {NAME}; give an output folder of mpcompile")
    require_unchanged(folder, (NAME,))
    return read_report(folder)
