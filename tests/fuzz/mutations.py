"""What the fuzz shares: how many examples, what counts as an answer, hostile values, bytes gone wrong, a canary.

An answer is a result or a MpcompileError that fits a line, within seconds and megabytes. All else is a bug here.
"""

import datetime
import math
import os
import pickle
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mpcompile.errors import MpcompileError, one_line

LIMIT_S = 20.0  # of the processor; hundredths are usual, and a second for what loads a library first
LIMIT_MB = 600  # what torch, timm and onnx take for themselves on their first call is some 300
DOCUMENTED = frozenset({2, 3, 4, 5, 6, 7})


def share(few: int, whole: int) -> settings:
    """So many examples: `few` in the suite, always the same; the `whole` under --hypothesis-profile=fuzz, others each
    time.
    """
    fuzzing = settings().max_examples > 1000
    return settings(
        max_examples=whole if fuzzing else few,
        derandomize=not fuzzing,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def answer(call: Callable[[], Any]) -> Any:
    """What the call returns, or the MpcompileError it raises; fails where it took too long or too much, or where the
    error is none that a terminal should show.
    """
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: Any
    try:
        found = call()
    except MpcompileError as error:
        found = error
    if isinstance(found, MpcompileError):
        line = one_line(found)
        assert line.isprintable()
        assert 10 < len(line) < 2000
        assert found.exit_code in DOCUMENTED
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert time.process_time() - started < LIMIT_S
    assert grown < LIMIT_MB, f"{grown:.0f} MB"
    return found


class Canary:
    """Pickles into a call that makes a file, one of several ways; the file must never be there."""

    def __init__(self, path: Path, way: int = 0) -> None:
        self.path, self.way = path, way

    def __reduce__(self) -> tuple[Any, ...]:
        path = str(self.path)
        ways: tuple[tuple[Any, ...], ...] = (
            (os.system, (f"touch {path}",)),
            (Path.touch, (self.path,)),
            (exec, (f"open({path!r}, 'w')",)),
            (open, (path, "w")),
            (getattr, (Path, "touch")),
            (dict, (), None, None, iter([(1, Inner(self.path))])),
        )
        return ways[self.way % len(ways)]


class Inner:
    """The same inside what looks like a plain dict."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def pickled(value: object, protocol: int) -> bytes:
    """A bare pickle."""
    return pickle.dumps(value, protocol=protocol % 6)


# ---- values

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 8, 2**31, 2**63, 2**64, 10**12, 10**400, -(10**400), 0.5, -0.0, 1e-320, 1e308,
    math.inf,
    -math.inf, math.nan, "", " ", "2:4", "4:2", "0:0", "2:4x0", "2:4x4", "4:8v8", "50%",
    "33%", "8:16|2:4", "1:65", "2:4x99999999999999999999", "auto",
    "8:decreasing",
    "8:", ",", "-1", "1e9", "*", "[", "none", "dynamic", "fp32", "bf16", "ort", "nm-mask", "\x1b[31mred\x07", "a\nb",
    "\u202eabc", "\x00",
    "\udc80".encode("utf-8", "surrogatepass").decode("latin-1"), "x" * 20_000, "é", "日本", "../../etc/passwd",
    "/dev/zero", b"\xff\x00",
    datetime.date(2020, 1, 1), [], {}, [[]], {"": {}}, {1: 2},
)  # fmt: skip

odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def deep(opening: str, closing: str, depth: int) -> str:
    """Brackets in brackets."""
    return opening * depth + closing * depth


# ---- bytes


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes after one to three accidents: bits flipped, cut short, pieces moved, lengths overwritten."""
    for _ in range(draw(st.integers(1, 3))):
        size = len(content)
        if not size:
            return content
        place = draw(
            st.integers(0, min(size - 1, 300)) | st.integers(max(0, size - 300), size - 1) | st.integers(0, size - 1)
        )
        how = draw(st.integers(0, 7))
        if how == 0:
            content = content[:place]
        elif how == 1:
            content = content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
        elif how == 2:
            content = content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:]
        elif how == 3:
            content = content[:place] + content[place + draw(st.integers(1, 64)) :]
        elif how == 4:
            other = draw(st.integers(0, size - 1))
            piece = content[other : other + draw(st.integers(1, 256))]
            content = content[:place] + piece + content[place + len(piece) :]
        elif how == 5:
            number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))
            content = content[:place] + number.to_bytes(8, "little") + content[place + 8 :]
        elif how == 6:
            content = content[:place] + bytes(draw(st.integers(1, 64))) + content[place:]
        else:
            content = content + content[place:][:4096]
    return content


@st.composite
def altered(draw: st.DrawFn, content: Mapping[str, Any]) -> Any:
    """A JSON-like value with one to three places in it replaced, removed, renamed or doubled."""
    whole: Any = {"": _copied(content)}
    for _ in range(draw(st.integers(1, 3))):
        place: Any = whole
        key: Any = ""
        while True:
            inner = place[key]
            keys = (
                list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
            )
            if not keys or (place is not whole and draw(st.integers(0, 4)) == 0):
                break
            place, key = inner, draw(st.sampled_from(keys))
        how = draw(st.integers(0, 4))
        if how == 0 and place is not whole:
            del place[key]
        elif how == 1 and isinstance(place, dict) and place is not whole:
            place[draw(st.text(max_size=6))] = place.pop(key)
        elif how == 2 and isinstance(place, list):
            place.append(_copied(place[key]))
        else:
            place[key] = _copied(draw(values))  # drawn ones may be shared, and a later step may change this one
    return whole[""]


def _copied(value: Any) -> Any:
    """Own dicts and lists all the way down."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value
