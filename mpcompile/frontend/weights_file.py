"""Reads a file of weights without running pickled code; its bytes, not its suffix, decide the format."""

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import LoadError, first_line
from mpcompile.frontend.sharded_weights import is_index, read_shards

log = logging.getLogger(__name__)

MODULE_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module", "net")  # averaged ones first
MOST_REPEATED = 2**24  # values that expand() may add to a buffer, beyond those in the file
SAFE_WAYS = (
    "save a state dict (torch.save(model.state_dict(), …)) or safetensors and name its --arch, or pass "
    "--allow-pickle if you trust the file with running code on this machine"
)


ALL_SHARDS = "give the index beside it, such as model.safetensors.index.json, or the folder"
SHARD = re.compile(r"-(\d{1,6})-of-(\d{1,6})\.\w+$")


def shard_of(path: Path) -> str | None:
    """What a file is by its name if it is a shard of several, such as `shard 1 of 2`; None for another name."""
    found = SHARD.search(path.name)
    return f"shard {int(found[1])} of {int(found[2])}" if found and int(found[2]) > 1 else None


def read(path: Path, allow_pickle: bool) -> Any:
    """The content of a weights file: a state dict or checkpoint as a mapping, or, if `allow_pickle`, a pickled module.

    Raises LoadError if the file is in no known format, damaged, or needs pickled code that is not allowed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise LoadError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise LoadError(f"{path} is a Git LFS pointer, not the file; fetch it with git lfs pull")
    if is_index(path):
        return read_shards(path, lambda shard: read(shard, allow_pickle=False))
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if _is_zip(path):
        return _read_torch_zip(path, allow_pickle)
    if head.startswith(b"PK"):
        raise LoadError(f"{path} is a torch archive that is cut short or damaged; copy it again")
    if head[0] == 0x80:  # pickle's protocol mark: torch before 1.6
        return _read_torch(path, allow_pickle)
    raise LoadError(
        f"{path} is none of safetensors, torch state dict or torch checkpoint (it begins with {head[:8]!r}); "
        "for an ONNX model give the PyTorch model it was made from"
    )


def _is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, even a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:  # SafetensorError, and KeyError, RuntimeError … for JSON that is no safetensors header
        raise LoadError(f"{path} is not a valid safetensors file ({first_line(error)}); it may be cut short") from error


def _read_torch_zip(path: Path, allow_pickle: bool) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked = sum(record.file_size for record in archive.infolist())
    except Exception as error:  # BadZipFile, NotImplementedError, UnicodeDecodeError …
        raise LoadError(f"{path} is a torch archive that is cut short or damaged ({first_line(error)})") from error
    if any("/code/" in name for name in names):
        raise LoadError(
            f"{path} is a TorchScript archive, whose compiled graph is not read; export the original module with "
            f"torch.export.save, or save its weights with torch.save(torch.jit.load({path.name!r}).state_dict(), "
            "'weights.pt') and name the module with --arch pkg.mod:factory"
        )
    size = path.stat().st_size
    if unpacked > size:  # torch never compresses tensors; a small file must not fill the memory
        raise LoadError(
            f"{path} is compressed, from {unpacked:,} to {size:,} bytes, which torch never does; save it again"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise LoadError(f"{path} is a zip file without torch data in it")
    return _read_torch(path, allow_pickle)


def _read_torch(path: Path, allow_pickle: bool) -> Any:
    """A torch file, read with weights_only=True, which runs no code; with pickle only if `allow_pickle`."""
    try:
        # timm's checkpoints hold their command line as an argparse.Namespace, which is plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights only" not in str(error).lower():
            raise LoadError(f"{path} cannot be unpickled: {error}") from error
        if not allow_pickle:
            raise LoadError(f"{path} holds pickled code besides tensors, which was not run; {SAFE_WAYS}") from error
        content = _read_pickle(path)
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError … on damaged files
        raise LoadError(f"{path} is damaged or no torch file ({type(error).__name__}: {first_line(error)})") from error
    if isinstance(content, Mapping):
        return content
    if isinstance(content, nn.Module):
        return content
    raise LoadError(
        f"{path} holds a {type(content).__name__}; it must hold a state dict, or a module with --allow-pickle"
    )


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise LoadError(
            f"{path} was pickled with code that cannot be imported here ({type(error).__name__}: {first_line(error)})"
        ) from error


def module_in(content: Mapping[Any, Any], path: Path, key: str | None) -> nn.Module | None:
    """The pickled module in a checkpoint: that under `key`, or the first one of the usual keys; None if there is none.

    Of several, the log names the one that is taken.
    """
    modules = {str(name): value for name, value in content.items() if isinstance(value, nn.Module)}
    if key is not None:
        return modules.get(key)
    usual = [name for name in MODULE_KEYS if name in modules]
    if not usual:
        return None
    if len(usual) > 1:
        log.warning(
            "%s: module %r was taken; --weights-key takes another of %s", path.name, usual[0], ", ".join(modules)
        )
    return modules[usual[0]]


def require_plain(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises LoadError if a tensor of a state dict is not dense, finite and in memory."""
    for name, value in state.items():
        if found := _unusual(value):
            raise LoadError(f"{path}: {name} is {found}; needed are plain tensors")
        if value.is_floating_point() and not value.float().isfinite().all():
            bad = int((~value.float().isfinite()).sum())
            raise LoadError(f"{path}: {name} has {bad} of {value.numel()} values that are NaN or infinite")


def _unusual(value: Tensor) -> str | None:
    """Why a tensor cannot be read as dense numbers in memory, as part of a sentence; None if it can."""
    if value.is_nested or value.layout is not torch.strided:
        return "nested" if value.is_nested else f"of the layout {str(value.layout).removeprefix('torch.')}"
    if value.is_quantized or value.device.type != "cpu":
        return "quantised" if value.is_quantized else "without values"
    held, claimed = value.untyped_storage().nbytes() // max(1, value.element_size()), value.numel()
    if claimed > held + MOST_REPEATED:  # strides let a few bytes claim to be terabytes
        return f"of {claimed:,} values, of which the file holds {held:,}"
    try:
        if value.is_floating_point():
            value.flatten()[:1].float()
    except (RuntimeError, NotImplementedError):  # packed types, such as float4
        return f"of the type {str(value.dtype).removeprefix('torch.')}, which cannot be read as numbers"
    return None
