"""Loads .pt2 files: what mpcompile takes from an exported program, and the errors if it does not take one."""

import io
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from mpcompile.errors import LoadError, first_line
from mpcompile.frontend.exported.archive import is_exported
from mpcompile.frontend.exported.lift import lift
from mpcompile.frontend.exported.program import Program, program_of
from mpcompile.frontend.exported.read_program import read_program
from mpcompile.frontend.exported.refusal import ProgramRefused

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """The model of a .pt2 file.

    Attributes:
        module: the lifted program, in evaluation mode.
        image_size: (channels, height, width) that it was exported for; None if its first input is no batch of images.
    """

    module: fx.GraphModule
    image_size: tuple[int, int, int] | None


def is_exported_file(path: Path) -> bool:
    """Whether a file is an archive of torch.export.save, by its content."""
    try:
        with zipfile.ZipFile(path) as archive:
            return is_exported(archive.namelist())
    except Exception:  # no zip file, or a damaged one
        return False


def load_exported(path: Path, allow_pickle: bool = False) -> ExportedModel:
    """The model of a .pt2 file, read without running what the file holds.

    With `allow_pickle`, a file that the reader refuses is loaded by torch.export.load, which may run code of the file.
    Raises LoadError.
    """
    program = _program(path, allow_pickle)
    try:
        module = lift(program)
    except ProgramRefused as reason:
        raise LoadError(f"{path} {reason}") from reason
    except Exception as error:  # operators fail in many ways on arguments that a damaged file states
        raise LoadError(
            f"{path} holds a program that does not run ({type(error).__name__}: {first_line(error)[:300]}); export the "
            "model again"
        ) from error
    shape = program.inputs[0].shape if program.inputs else None
    size = (shape[1], shape[2], shape[3]) if shape is not None and len(shape) == 4 else None
    return ExportedModel(module, size)


def exported_weights(path: Path, allow_pickle: bool = False) -> Mapping[str, Tensor]:
    """The state dict in a .pt2 file, for an architecture that the user names. Raises LoadError."""
    program = _program(path, allow_pickle)
    return {name: value.detach() for name, value in program.tensors.items() if name not in program.transient}


def _program(path: Path, allow_pickle: bool) -> Program:
    """The program of a file, by the reader that runs nothing, or by torch if that is allowed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return read_program(content)
    except Exception as error:  # damaged files fail in many ways
        is_reason = isinstance(error, ProgramRefused)
        reason = str(error) if is_reason else f"is damaged ({type(error).__name__}: {first_line(error)[:300]})"
        if not allow_pickle:
            raise LoadError(
                f"{path} {reason}. It was not loaded; export the model again, or pass --allow-pickle if you trust the "
                "file with running code on this machine"
            ) from error
        log.warning("%s %s; it is loaded by torch.export.load, as --allow-pickle says", path, reason)
    try:
        return program_of(torch.export.load(io.BytesIO(content)))
    except ProgramRefused as reason:
        raise LoadError(f"{path} {reason}") from reason
    except Exception as error:
        raise LoadError(
            f"{path} cannot be loaded by torch.export.load ({type(error).__name__}: {first_line(error)[:300]})"
        ) from error
