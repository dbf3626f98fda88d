"""The hashes that decide whether a checkpoint is valid: of the source files and of every part of a model."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mpcompile.ir.model import Model
from mpcompile.ir.structure import structure_of
from mpcompile.pipeline.fingerprint import model_key, source_key
from mpcompile.testing import tiny_cnn, tiny_vit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of mpcompile/, with its symbolic links."""
    for folder in ("mpcompile", "passes", "runtimes"):
        excluded = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=excluded)
    return tmp_path / "mpcompile"


@pytest.mark.parametrize(
    "file", ["errors.py", "analysis/spectrum.py", "passes/restore.py", "passes/nm_mask/selection.py"]
)
def test_an_edit_of_a_source_file_changes_the_key(package: Path, file: str) -> None:
    before = source_key(package)
    path = package / file
    path.write_text(path.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    assert source_key(package) != before


def test_renaming_a_source_file_changes_the_key(package: Path) -> None:
    before = source_key(package)
    (package / "passes" / "nm_mask" / "selection.py").rename(package / "passes" / "nm_mask" / "other.py")
    assert source_key(package) != before


def test_an_edit_of_a_runtime_does_not_change_the_key(package: Path) -> None:
    """No pass imports a runtime, so no checkpoint depends on one."""
    before = source_key(package)
    path = package / "runtimes" / "ort" / "cpu.py"
    path.write_text(path.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    assert source_key(package) == before


def test_a_copy_of_the_package_has_the_same_key(package: Path) -> None:
    assert source_key(package) == source_key(ROOT / "mpcompile")


def test_the_hash_of_a_model_covers_weights_statistics_modules_example_and_source() -> None:
    model = tiny_cnn()
    keys = {model_key(model)}

    def assert_key_changes(edit: Callable[[Model], Model | None]) -> None:
        other = replace(model, graph=copy.deepcopy(model.graph))
        key = model_key(edit(other) or other)
        assert key not in keys
        keys.add(key)

    @torch.no_grad()
    def weight(other: Model) -> None:
        other.graph.get_parameter("head.weight")[0, 0] += 1e-6

    @torch.no_grad()
    def statistic(other: Model) -> None:
        other.graph.get_buffer("norm.running_var")[0] += 1e-6

    assert_key_changes(weight)
    assert_key_changes(statistic)
    assert_key_changes(lambda other: other.graph.set_submodule("norm", nn.BatchNorm2d(16, eps=1e-3)))
    assert_key_changes(lambda other: replace(other, example=other.example + 1))
    assert_key_changes(lambda other: replace(other, source=replace(other.source, mean=(0.4,))))
    assert model_key(tiny_cnn()) == model_key(model)


def test_the_structure_hash_ignores_the_name_of_the_source() -> None:
    model = tiny_vit()
    renamed = replace(model, source=replace(model.source, name="./somewhere/else.safetensors"))
    other_mean = replace(model, source=replace(model.source, mean=(0.25,)))
    assert structure_of(renamed) == structure_of(model) != structure_of(other_mean)
