"""The texts of errors about modules that cannot be copied or recorded: cause, line of model code, remedy."""

import traceback
from pathlib import Path

import torch
from torch import nn

RECORDING_CODE = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def copy_refusal(module: nn.Module, error: BaseException) -> str:
    """Why a module cannot be deep-copied, in torch's own words."""
    return f"{type(module).__name__} cannot be deep-copied, so it cannot be captured safely: {error}"


def record_refusal(module: nn.Module, error: BaseException) -> str:
    """Why a module that runs cannot be recorded: torch's reason, and the line of model code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(RECORDING_CODE)]
    where = f"{own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`" if own else "an unknown line"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"{type(module).__name__} runs, and cannot be captured: {reason}. At {where}. Keep the module around that line "
        "whole with --leaf NAME"
    )
