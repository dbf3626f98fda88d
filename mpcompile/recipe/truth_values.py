"""Finds truth values that were read as numbers: pydantic takes True for 1, so `calibration: yes` would mean 1 image."""

from collections.abc import Mapping
from typing import Any


def truth_as_number(given: Any, read: Any) -> tuple[str, ...] | None:
    """The place of the first truth value in `given` that became another value in `read`; None if there is none.

    `given` is a mapping, list or value as written, and `read` the object, tuple or value that was made from it.
    """
    if isinstance(given, bool):
        return None if isinstance(read, bool) else ()
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(given, Mapping) and not isinstance(read, Mapping):  # a mapping was kept as it is
        pairs = [(str(key), value, getattr(read, str(key))) for key, value in given.items() if hasattr(read, str(key))]
    elif isinstance(given, list | tuple) and isinstance(read, list | tuple) and len(given) == len(read):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(given, read, strict=True))]
    for key, *pair in pairs:
        inner = truth_as_number(*pair)
        if inner is not None:
            return (key, *inner)
    return None


def described(place: tuple[str, ...]) -> str:
    """The error for a truth value at this place."""
    return f"{'.'.join(place)}: found a truth value (true, yes, on …); a number or text is needed"
