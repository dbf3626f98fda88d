"""`mpcompile explain`: a list of layers, the sentences about some of them, JSON, and mistakes."""

import json
from pathlib import Path

import pytest
from commandline import mpcompile, refused
from small_reports import LAYERS, int8_report, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(int8_report(), tmp_path / "out")


def test_without_a_layer_every_layer_has_one_line(folder: Path) -> None:
    done = mpcompile("explain", folder)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [row.name for row in LAYERS]
    assert "blocks.0.mlp.fc1   2:4, int8, refit error 4.56 %" in done.stdout
    assert json.loads(mpcompile("explain", folder, "--json").stdout)["head"].startswith("dense, floating point: ")


def test_a_layer_is_told_topic_by_topic(folder: Path) -> None:
    done = mpcompile("explain", folder, "blocks.0.attn.qkv")
    topics = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert list(dict.fromkeys(topics)) == [
        "layer", "cost", "pattern", "spectrum", "channels", "refit", "format", "kernel", "loss",
    ]  # fmt: skip
    assert "loss:     It causes 30.0 % of the squared logit shift" in done.stdout


def test_a_shell_pattern_tells_several(folder: Path) -> None:
    done = mpcompile("explain", folder, "blocks.*")
    assert done.stdout.count("layer:    ") == 3
    rows = json.loads(mpcompile("explain", folder, "blocks.*", "--json").stdout)
    assert [row["layer"] for row in rows] == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert rows[0]["sentences"][0][0] == "layer"


def test_mistakes_are_refused(folder: Path) -> None:
    refused(mpcompile("explain", folder, "qvk"), 2, "no layer is called 'qvk'; the nearest are blocks.0.attn.qkv")
    refused(mpcompile("explain", folder.parent), 3, "has no report.json; give an output folder of mpcompile")
    assert mpcompile("explain").returncode == 2
