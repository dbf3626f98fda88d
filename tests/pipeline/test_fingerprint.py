"""What a checkpoint is told apart by: every source file that its content may follow from."""

import shutil
from pathlib import Path

import pytest

from mpcompile.pipeline.fingerprint import source_key

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of mpcompile/, its links as in a checkout."""
    for folder in ("mpcompile", "passes", "runtimes"):
        left_out = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=left_out)
    return tmp_path / "mpcompile"


@pytest.mark.parametrize("file", ["errors.py", "analysis/spectrum.py", "passes/restore.py", "passes/nm_mask/admm.py"])
def test_an_edit_of_any_file_that_results_follow_from_is_seen(package: Path, file: str) -> None:
    before = source_key(package)
    path = package / file
    path.write_text(path.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    assert source_key(package) != before


def test_a_file_that_is_renamed_is_seen(package: Path) -> None:
    before = source_key(package)
    (package / "passes" / "nm_mask" / "admm.py").rename(package / "passes" / "nm_mask" / "other.py")
    assert source_key(package) != before


def test_runtimes_do_not_count(package: Path) -> None:
    """No pass knows them: what they do with a model changes nothing that a checkpoint holds."""
    before = source_key(package)
    path = package / "runtimes" / "ort" / "cpu.py"
    path.write_text(path.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    assert source_key(package) == before


def test_a_copy_has_the_key_of_what_it_copies(package: Path) -> None:
    assert source_key(package) == source_key(ROOT / "mpcompile")
