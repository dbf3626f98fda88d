"""No .pt2 file runs code: a payload in each known place is refused with its reason, where torch would run it."""

import contextlib
import io
import logging
import sys
from pathlib import Path

import pytest
import torch
from payloads import PAYLOADS
from pt2_files import small_file

from mpcompile.errors import LoadError
from mpcompile.frontend.load_model import Request, load

places = pytest.mark.parametrize("place", PAYLOADS)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that a payload creates; a module `marking_module` creates it when it is imported."""
    path = tmp_path / "marker"
    (tmp_path / "marking_module.py").write_text(f"open({str(path)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "marking_module", raising=False)
    return path


@places
def test_a_payload_is_refused_with_its_reason_and_does_not_run(place: str, marker: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(PAYLOADS[place].build(marker))
    with pytest.raises(LoadError, match=PAYLOADS[place].reason) as caught:
        load(Request(str(file)))
    assert str(file) in str(caught.value)
    assert "--allow-pickle" in str(caught.value)
    with pytest.raises(LoadError, match=PAYLOADS[place].reason):
        load(Request(str(file), arch="mpcompile.testing:TinyMLP"))
    assert not marker.exists()


@pytest.mark.parametrize("place", [place for place, payload in PAYLOADS.items() if payload.runs])
def test_torch_runs_the_payload(place: str, marker: Path) -> None:
    """The payload is real: torch.export.load itself, or what follows it, creates the marker."""
    payload = PAYLOADS[place]
    content = io.BytesIO(payload.build(marker))
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    with contextlib.suppress(Exception):  # it may fail after the payload ran
        program = torch.export.load(content)
        if payload.runs == "call":
            assert not marker.exists()
            program.module()(torch.zeros(2, 3, 8, 8))
    assert marker.exists()


def test_the_archive_without_a_payload_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(small_file())
    assert load(Request(str(file))).source.size == (3, 8, 8)
