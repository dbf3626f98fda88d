"""`mpcompile doctor`, `passes` and `schema`, as text and as JSON."""

import json

import torch
from commandline import mpcompile


def test_doctor_passes_and_schema() -> None:
    done = mpcompile("doctor")
    assert done.returncode == 0
    assert "target ort" in done.stdout
    found = {row["what"]: row for row in json.loads(mpcompile("doctor", "--json").stdout)}
    assert found["torch"]["found"] == torch.__version__.split("+")[0]
    assert all(row["works"] or row["remedy"] for row in found.values())
    assert "nm-mask (lossy): Masks layers to their planned N:M patterns" in mpcompile("passes").stdout
    assert json.loads(mpcompile("passes", "--json").stdout)[0]["parameters"]["patterns"] == "[2:4]"
    assert json.loads(mpcompile("schema").stdout)["title"] == "Recipe"
