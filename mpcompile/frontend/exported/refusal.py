"""The exception with which the reader of .pt2 files refuses an archive, and checked access to values of its JSON.

Every value is checked when it is read, and fields that are not known are refused. So nothing in an archive is used that
was not looked at.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_TEXT = 400  # characters of a text from a file that are shown
LARGEST_INT = 2**63
NAME = re.compile(r"[A-Za-z_]\w{0,500}", re.ASCII)
PATH = re.compile(r"\w{1,500}(\.\w{1,500}){0,100}", re.ASCII)


class ProgramRefused(Exception):
    """A reason not to read an archive, as the predicate of a sentence whose subject is the file."""


def shown(value: object) -> str:
    """A value from a file, for a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"


def mapping(value: object, where: str, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    """A JSON object. Refuses other values and, if the known fields are given, objects with another field."""
    if not isinstance(value, dict):
        raise ProgramRefused(f"has {shown(value)} as {where}; an object is needed")
    unknown = [] if known is None else [key for key in value if key not in known]
    if unknown:
        raise ProgramRefused(
            f"has the field {shown(unknown[0])} in {where}, which mpcompile does not know; a newer torch may have "
            "written it"
        )
    return value


def union(value: object, where: str) -> tuple[str, Any]:
    """Kind and content of a JSON object with one field, torch's form of a value that can have one of several types."""
    found = mapping(value, where)
    if len(found) != 1:
        raise ProgramRefused(f"has {shown(value)} as {where}; an object with one field is needed")
    return next(iter(found.items()))


def sequence(value: object, where: str) -> Sequence[Any]:
    """A JSON array."""
    if not isinstance(value, list):
        raise ProgramRefused(f"has {shown(value)} as {where}; a list is needed")
    return value


def integer(value: object, where: str) -> int:
    """An integer of at most 64 bits."""
    if type(value) is not int or not -LARGEST_INT <= value < LARGEST_INT:
        raise ProgramRefused(f"has {shown(value)} as {where}; an integer of 64 bits is needed")
    return value


def number(value: object, where: str) -> float:
    """A float; torch writes the values that JSON lacks as texts."""
    if value in ("Infinity", "-Infinity", "NaN"):
        return float(str(value))
    if type(value) not in (int, float):
        raise ProgramRefused(f"has {shown(value)} as {where}; a number is needed")
    return float(value)  # type: ignore[arg-type]


def boolean(value: object, where: str) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise ProgramRefused(f"has {shown(value)} as {where}; true or false is needed")
    return value


def text(value: object, where: str) -> str:
    """A printable text of moderate length."""
    if not isinstance(value, str) or len(value) > 10_000 or not (value.isprintable() or not value):
        raise ProgramRefused(f"has {shown(value)} as {where}; a short printable text is needed")
    return value


def name(value: object, where: str) -> str:
    """A name of a value in the graph: a Python identifier, as torch.fx writes these names into code."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ProgramRefused(f"has {shown(value)} as {where}; letters, digits and _ are allowed, as names become code")
    return value


def path(value: object, where: str) -> str:
    """A qualified name of a parameter or buffer, such as `blocks.0.norm.weight`."""
    if not isinstance(value, str) or not PATH.fullmatch(value) or any(part[:2] == "__" for part in value.split(".")):
        raise ProgramRefused(f"has {shown(value)} as {where}; names of tensors have letters, digits, _ and dots")
    return value
