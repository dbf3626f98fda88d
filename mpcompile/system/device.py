"""The device of a run: where the pass manager places models and images for the passes."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from mpcompile.errors import UsageError

CPU = torch.device("cpu")


def makes_tensors_on(device: torch.device) -> AbstractContextManager[object]:
    """Within the context, torch.zeros and its like make tensors on the device unless they are told another one."""
    return nullcontext() if torch.get_default_device() == device else device


def chosen_device(text: str) -> torch.device:
    """The device of this name (recipe/schema.py); `auto` is the GPU of this process if there is one, else the CPU.

    Under torchrun, `cuda` and `auto` are the GPU of the local rank. Raises UsageError if there is no such GPU.
    """
    kind, _, number = text.partition(":")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise UsageError(
            f"the device {text}: PyTorch {torch.__version__} finds no CUDA device; check the driver with nvidia-smi, "
            "or give cpu"
        )
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    count = torch.cuda.device_count()
    if index >= count:
        raise UsageError(
            f"the device {text}: there {'is' if count == 1 else 'are'} {count} CUDA device"
            f"{'' if count == 1 else 's'}, numbered from 0"
        )
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The device, with the name of its GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
