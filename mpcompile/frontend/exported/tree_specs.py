"""Structures of inputs and outputs in a .pt2 program, as tree specs of built-in containers.

torch.export.load looks containers up in its registry, and imports the modules that a spec names (enumerations,
factories of a defaultdict). Here nothing is looked up or imported: a Hugging Face ModelOutput or a registered dataclass
becomes a dict with its field names, and a named tuple becomes a tuple.
"""

import logging
import re
from typing import Any

from torch.utils import _pytree as pytree

from mpcompile.frontend.exported.archive import parsed_json
from mpcompile.frontend.exported.refusal import ProgramRefused, mapping, sequence, shown, text

log = logging.getLogger(__name__)

DEEPEST = 50  # levels
KEY = re.compile(r"[\w .:/-]{1,200}")  # no quotes: torch.fx writes keys into code
SEQUENCES = {
    "builtins.tuple": tuple,
    "builtins.list": list,
    "torch.fx.immutable_collections.immutable_list": list,
}
DICTS = ("builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict")
FIELDS = ("type", "context", "children_spec")


def tree_spec(serialized: object, where: str) -> pytree.TreeSpec:
    """The TreeSpec of a serialised spec. Raises ProgramRefused for a container that is not known."""
    if not isinstance(serialized, str):
        raise ProgramRefused(f"has {shown(serialized)} as {where}; a text is needed")
    found = sequence(parsed_json(serialized.encode(), where), where)
    if len(found) != 2 or found[0] != 1:
        raise ProgramRefused(f"has a tree spec of the protocol {shown(found[:1])} as {where}; protocol 1 is read")
    return _spec(found[1], where, DEEPEST)


def _spec(value: object, where: str, depth: int) -> pytree.TreeSpec:
    """The spec of one container and of those inside it."""
    if not depth:
        raise ProgramRefused(f"has more than {DEEPEST} levels in {where}")
    found = mapping(value, where, FIELDS)
    kind, context = found.get("type"), found.get("context")
    children = [_spec(child, where, depth - 1) for child in sequence(found.get("children_spec"), where)]
    if kind is None:
        if context is not None or children:
            raise ProgramRefused(f"has a leaf with contents in {where}")
        return _leaf()
    name = text(kind, where)
    if name == "collections.namedtuple":
        text(context, where)
        return _container(tuple, None, children)
    inner = parsed_json(context.encode(), where) if isinstance(context, str) else context
    if name in SEQUENCES:
        if inner is not None:
            raise ProgramRefused(f"has {shown(inner)} as the context of {name} in {where}; none is needed")
        return _container(SEQUENCES[name], None, children)
    keys = _keys(inner, len(children))
    if keys is None:
        raise ProgramRefused(
            f"has the container {shown(name)} in {where}, which is not tuple, list or dict and has no list of field "
            "names; loading would look it up or import it. Export a model that returns a dict or a tuple"
        )
    if name not in DICTS:
        log.warning("%s of the program is %s; it is read as a dict of %s", where, name, ", ".join(map(str, keys)))
    return _container(dict, keys, children)


def _keys(context: Any, count: int) -> list[Any] | None:
    """The keys of a dict or the field names of a dataclass; None if the context holds something else.

    A dataclass has two lists: its fields, and those that are None.
    """
    if isinstance(context, list) and len(context) == 2 and all(isinstance(part, list) for part in context):
        context = context[0]
    if not isinstance(context, list) or len(context) != count or len(set(map(str, context))) != count:
        return None
    plain = all(type(key) is int or (isinstance(key, str) and KEY.fullmatch(key)) for key in context)
    return context if plain else None


def children_of(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The specs inside a container. (torch 2.9 has them as an attribute, later ones as a method.)"""
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def _leaf() -> pytree.TreeSpec:
    return pytree.tree_structure(0)


def _container(kind: type, keys: list[Any] | None, children: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    """The spec of a tuple, list or dict that holds these specs, made from a value of that structure."""
    values = [pytree.tree_unflatten([0] * child.num_leaves, child) for child in children]
    return pytree.tree_structure(kind(values) if keys is None else dict(zip(keys, values, strict=True)))
