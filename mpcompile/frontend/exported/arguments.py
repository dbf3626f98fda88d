"""Arguments of calls in a .pt2 program, in torch's serialised form."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from mpcompile.frontend.exported.raw_tensors import STRIDED, dtype_of
from mpcompile.frontend.exported.refusal import (
    ProgramRefused,
    boolean,
    integer,
    mapping,
    name,
    number,
    sequence,
    shown,
    text,
    union,
)

MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
Nodes = Mapping[str, fx.Node]
REFUSED_KINDS = {
    "as_custom_obj": "an object of a custom class",
    "as_operator": "an operator as an argument",
    "as_graph": "a part of itself as an argument, such as torch.cond",
    "as_complex": "a complex number as an argument",
    "as_string_to_argument": "a dict as an argument",
}


def node_named(value: object, nodes: Nodes, where: str) -> fx.Node:
    """The node that a name stands for."""
    found = nodes.get(name(value, where))
    if found is None:
        raise ProgramRefused(f"uses {shown(value)} in {where}, which no earlier call gives")
    return found


def _tensor(value: object, nodes: Nodes, where: str) -> fx.Node:
    return node_named(mapping(value, where, ("name",)).get("name"), nodes, where)


def _optional_tensor(value: object, nodes: Nodes, where: str) -> fx.Node | None:
    kind, content = union(value, where)
    if kind == "as_none":
        return None
    if kind != "as_tensor":
        raise ProgramRefused(f"has {shown(value)} in {where}; a tensor or none is needed")
    return _tensor(content, nodes, where)


def _symbolic(literal: Callable[[object, str], Any], key: str) -> Callable[[object, Nodes, str], Any]:
    """A reader of an integer, float or bool that may also be the result of an earlier node."""

    def read(value: object, nodes: Nodes, where: str) -> Any:
        kind, content = union(value, where)
        if kind == "as_name":
            return node_named(content, nodes, where)
        if kind != key:
            raise ProgramRefused(f"has {shown(value)} in {where}; {key} or as_name is needed")
        return literal(content, where)

    return read


def _plain(literal: Callable[[object, str], Any]) -> Callable[[object, Nodes, str], Any]:
    return lambda value, nodes, where: literal(value, where)


def _listed(read: Callable[[object, Nodes, str], Any]) -> Callable[[object, Nodes, str], Any]:
    return lambda value, nodes, where: [read(part, nodes, where) for part in sequence(value, where)]


def _memory_format(value: object, where: str) -> torch.memory_format:
    if integer(value, where) not in MEMORY_FORMATS:
        raise ProgramRefused(f"has the memory format {value} in {where}, which mpcompile does not know")
    return MEMORY_FORMATS[integer(value, where)]


def _layout(value: object, where: str) -> torch.layout:
    if integer(value, where) != STRIDED:
        raise ProgramRefused(f"has the layout {value} in {where}; dense tensors are needed")
    return torch.strided


def _device(value: object, where: str) -> torch.device:
    """The CPU, on which every model is captured, whatever device the program names."""
    found = mapping(value, where, ("type", "index"))
    text(found.get("type"), where)
    return torch.device("cpu")


SCALARS: Mapping[str, Callable[[object, Nodes, str], Any]] = {
    "as_tensor": _tensor,
    "as_int": _plain(integer),
    "as_float": _plain(number),
    "as_string": _plain(text),
    "as_bool": _plain(boolean),
    "as_sym_int": _symbolic(integer, "as_int"),
    "as_sym_float": _symbolic(number, "as_float"),
    "as_sym_bool": _symbolic(boolean, "as_bool"),
    "as_optional_tensor": _optional_tensor,
}
READERS: Mapping[str, Callable[[object, Nodes, str], Any]] = {
    **SCALARS,
    **{f"{kind}s": _listed(read) for kind, read in SCALARS.items()},
    "as_none": lambda value, nodes, where: None,
    "as_scalar_type": _plain(dtype_of),
    "as_memory_format": _plain(_memory_format),
    "as_layout": _plain(_layout),
    "as_device": _plain(_device),
    "as_nested_tensors": _listed(_listed(_tensor)),
    "as_int_lists": _listed(_listed(_plain(integer))),
    "as_float_lists": _listed(_listed(_plain(number))),
}


def value_of(argument: object, nodes: Nodes, where: str) -> Any:
    """The value of an argument: a node, a number, a text, a type, or a list. Raises ProgramRefused for others."""
    kind, content = union(argument, where)
    if kind in REFUSED_KINDS:
        raise ProgramRefused(f"passes {REFUSED_KINDS[kind]} in {where}, which is not read")
    if kind not in READERS:
        raise ProgramRefused(f"has an argument of the kind {shown(kind)} in {where}, which mpcompile does not know")
    return READERS[kind](content, nodes, where)


def constant_of(value: object, where: str) -> object:
    """The value of an input that is no tensor: None, a number, a bool or a text."""
    kind, content = union(value, where)
    if kind not in ("as_none", "as_int", "as_float", "as_string", "as_bool"):
        raise ProgramRefused(f"has {shown(value)} as {where}; a number, a text or none is needed")
    return READERS[kind](content, {}, where)
