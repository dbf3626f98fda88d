"""Tensors of a .pt2 archive, from their raw bytes and the places that its JSON states."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpcompile.frontend.exported.expressions import size_of
from mpcompile.frontend.exported.refusal import ProgramRefused, boolean, integer, mapping, path, sequence, shown, text

# torch's ScalarType numbers of the schema.
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
STRIDED = 7  # the schema's number of the layout
META_FIELDS = ("dtype", "sizes", "requires_grad", "device", "strides", "storage_offset", "layout")
PAYLOAD_FIELDS = ("path_name", "is_param", "use_pickle", "tensor_meta")


def tensors_of(config: object, members: Mapping[str, bytes], folder: str) -> dict[str, Tensor]:
    """The tensors that a config lists, by name; names of one tied tensor hold one object. Raises ProgramRefused."""
    entries = mapping(mapping(config, folder, ("config",)).get("config"), folder)
    stored: dict[tuple[str, torch.dtype], Tensor] = {}
    made: dict[tuple[object, ...], Tensor] = {}
    tensors = {}
    for key, value in entries.items():
        where = f"the entry of {path(key, folder)} in {folder}"
        entry = mapping(value, where, PAYLOAD_FIELDS)
        if entry.get("use_pickle") is not False:
            raise ProgramRefused(f"holds {key} as a pickle, which loading would run")
        member = f"{folder}/{text(entry.get('path_name'), where)}"
        if member not in members:
            raise ProgramRefused(f"lacks {member!r}, the values of {key}")
        dtype, sizes, strides, offset, requires_grad = _place(entry.get("tensor_meta"), where)
        flat = stored.setdefault((member, dtype), _flat(members[member], dtype, where))
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if math.prod(sizes) and last >= len(flat):
            raise ProgramRefused(f"holds {len(flat):,} values of {key}, and its shape {sizes} needs more")
        if math.prod(sizes) > len(flat):
            raise ProgramRefused(f"repeats the values of {key}; needed are plain tensors")
        is_parameter = boolean(entry.get("is_param"), where)
        place = (member, dtype, sizes, strides, offset, is_parameter)
        if place not in made:
            view = torch.as_strided(flat, sizes, strides, offset)
            can_learn = dtype.is_floating_point and requires_grad
            made[place] = nn.Parameter(view, requires_grad=can_learn) if is_parameter else view
        tensors[key] = made[place]
    return tensors


def _flat(content: bytes, dtype: torch.dtype, where: str) -> Tensor:
    """All values of a member; those of an empty one are none."""
    if len(content) % dtype.itemsize:
        raise ProgramRefused(f"has {len(content):,} bytes for {where}, no multiple of {dtype.itemsize}")
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _place(meta: object, where: str) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int, bool]:
    """Type, sizes, strides, offset and requires_grad that a tensor's description states."""
    found = mapping(meta, where, META_FIELDS)
    dtype = dtype_of(found.get("dtype"), where)
    if found.get("layout") != STRIDED:
        raise ProgramRefused(f"has the layout {shown(found.get('layout'))} in {where}; dense tensors are needed")
    sizes, strides = (
        tuple(_fixed(size, where) for size in sequence(found.get(key), where)) for key in ("sizes", "strides")
    )
    if len(sizes) != len(strides) or len(sizes) > 32:
        raise ProgramRefused(f"has {len(sizes)} sizes and {len(strides)} strides in {where}")
    return dtype, sizes, strides, _fixed(found.get("storage_offset"), where), boolean(found.get("requires_grad"), where)


def _fixed(value: object, where: str) -> int:
    """A size of a stored tensor: a number that is not negative."""
    size, symbolic = size_of(value, where)
    if symbolic or size is None or size < 0 or size > 2**40:
        raise ProgramRefused(f"has the size {shown(value)} in {where}; a number is needed")
    return size


def dtype_of(value: object, where: str) -> torch.dtype:
    """The type with this number in the schema."""
    number = integer(value, where)
    if number not in DTYPES:
        raise ProgramRefused(f"has values of the type {number} in {where}, which mpcompile does not read")
    return DTYPES[number]
