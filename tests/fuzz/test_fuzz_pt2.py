"""Damaged and hostile .pt2 files: each loads, or is refused with an MpcompileError; nothing in it runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import altered, answer, damaged, share
from pt2_files import CONSTANTS, PROGRAM, WEIGHTS, archive_of, members_of, small_file

from mpcompile.frontend.load_model import Loaded, Request, load

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.pt2"


def texts_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where a JSON value has texts: their container and their key in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(inner, str):
            yield value, key
        else:
            yield from texts_in(inner)


@given(st.data(), st.sampled_from([PROGRAM, PROGRAM, WEIGHTS, CONSTANTS]))
@share(60, 20_000)
def test_altered_json(path: Path, data: st.DataObject, member: str) -> None:
    members = members_of(small_file())
    content = data.draw(altered(json.loads(members[member])))
    try:
        text = json.dumps(content).encode()
    except (TypeError, ValueError, UnicodeEncodeError):
        return  # bytes and dates, which JSON lacks
    path.write_bytes(archive_of({**members, member: text}))
    answer(lambda: load(Request(str(path))))


@given(st.data())
@share(40, 20_000)
def test_code_in_place_of_any_text(path: Path, data: st.DataObject) -> None:
    """Names, targets, expressions, tree specs, types: wherever a text stands, code in it does not run."""
    canary = path.parent / "canary"
    forms = (
        "open({0!r}, 'w')",
        "s0 + open({0!r}, 'w').close()",
        "x=open({0!r}, 'w')",
        "x): pass\nopen({0!r}, 'w')\ndef f(y",
        'a").close(open({0!r}, "w"))',
        "torch.serialization.os.mkdir",
        "__import__('os').mkdir({0!r})",
        '[1, {{"type": "builtins.dict", "context": "[{{\\"__enum__\\": 1, \\"fqn\\": \\"os:mkdir\\"}}]"}}]',
    )
    members = members_of(small_file())
    program = json.loads(members[PROGRAM])
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list(texts_in(program))))
        container[key] = data.draw(st.sampled_from(forms)).format(str(canary))
    path.write_bytes(archive_of({**members, PROGRAM: json.dumps(program).encode()}))
    found = answer(lambda: load(Request(str(path))))
    if isinstance(found, Loaded):
        found.module(torch.zeros(2, 3, 8, 8))
    assert not canary.exists()


@given(damaged(small_file()))
@share(60, 20_000)
def test_damaged_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    answer(lambda: load(Request(str(path))))
