"""`mpcompile verify`: it accepts what was written and names the layer or file that was changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from commandline import mpcompile, refused
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from mpcompile.driver.artifact import Artifact


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact.folder, tmp_path / "copy"))


def test_verify_accepts_what_was_written(artifact: Artifact) -> None:
    done = mpcompile("verify", artifact.folder)
    assert done.returncode == 0, done.stderr
    assert "24 masks hold" in done.stdout
    assert len(json.loads(mpcompile("verify", artifact.folder, "--json").stdout)) == 24


def test_verify_rejects_one_weight_filled_into_the_onnx_file(copy: Path) -> None:
    file = onnx.load(copy / "model.onnx")
    sparsity = json.loads(next(p.value for p in file.metadata_props if p.key == "mpcompile.sparsity"))
    name = next(initializer for initializer, row in sparsity.items() if row["layers"] == ["blocks.3.mlp.fc2"])
    tensor = next(t for t in file.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values[tuple(np.argwhere(values == 0)[0])] = 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(file, copy / "model.onnx")
    refused(mpcompile("verify", copy), 5, "blocks.3.mlp.fc2: 1 weights that the mask zeroes are not zero in")


def test_verify_rejects_one_weight_filled_into_the_state_dict(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["blocks.0.attn.proj.weight"][weights["blocks.0.attn.proj.weight"] == 0] = 1e-3
    save_file(weights, copy / "model.safetensors")
    refused(
        mpcompile("verify", copy),
        5,
        "blocks.0.attn.proj: 8192 weights that the mask zeroes are not zero in model.safet",
    )


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("report.json", '"agreement": 0', '"agreement": 1'),
        ("report.md", "masked", "fast"),
        ("report.html", "masked", "fast"),
        ("report.sha256", "report.md", "other.md"),
    ],
)
def test_verify_rejects_an_edited_report(copy: Path, name: str, old: str, new: str) -> None:
    text = (copy / name).read_text(encoding="utf-8")
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    refused(mpcompile("verify", copy), 3, f"{name} was changed: ")


def test_verify_says_that_a_report_without_hashes_is_not_protected(copy: Path) -> None:
    (copy / "report.sha256").unlink()
    done = mpcompile("verify", copy)
    assert done.returncode == 0
    assert "the folder has no report.sha256, so edits of report.json" in done.stderr
    (copy / "report.html").unlink()
    assert mpcompile("verify", copy).returncode == 0


def test_verify_rejects_other_changes(copy: Path) -> None:
    file = onnx.load(copy / "model.onnx")
    next(t for t in file.graph.initializer if t.name == "head.bias").raw_data = b"\0" * 40
    onnx.save(file, copy / "model.onnx")
    refused(mpcompile("verify", copy), 3, "model.onnx was changed: its SHA-256 differs")
    (copy / "model.onnx").write_bytes(b"\xff" * 100)
    refused(mpcompile("verify", copy), 3, "cannot be read as an ONNX file")
    (copy / "model.onnx").unlink()
    refused(mpcompile("verify", copy), 3, "is not an output folder of mpcompile: model.onnx missing")
