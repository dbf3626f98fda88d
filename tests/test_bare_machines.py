"""Machines that lack something: the Makefile says what to install in a line, and a wheel needs no compiler."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDEST = (3, 11)


def make(folder: Path, python: str, goal: str = "demo") -> subprocess.CompletedProcess[str]:
    """`make` in a folder that has the Makefile and nothing set up."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    # `make test` tells a make inside it where it is, and that says so on standard output.
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", goal, f"PYTHON={python}"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt install make")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            # As Python 3.10 answers: not to the question of what is too old, then with its version.
            'case "$2" in *version_info*) exit 1;; *python_version*) echo 3.10.13;; esac',
            "mpcompile needs Python 3.11 or later, and {python} is 3.10.13: apt install python3 python3-venv",
        ),
        (
            "exit 127",
            "mpcompile needs Python 3.11 or later, and {python} does not run: apt install python3 python3-venv",
        ),
        (
            f'case "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"',
            "{python} has no venv or no ensurepip to set up .venv with: apt install python3-venv",
        ),
    ],
)
def test_make_says_in_a_line_what_to_install(tmp_path: Path, text: str, said: str) -> None:
    python = script(tmp_path / "python", text)
    done = make(tmp_path, python)
    assert done.returncode != 0
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1
    assert said.format(python=python) in lines[0]
    assert "make demo" in lines[0]
    assert not (tmp_path / ".venv").exists()


def test_a_wheel_is_built_without_a_compiler(tmp_path: Path) -> None:
    """The kernel is left out and its sources are in, so that it can be built later."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "benchmarks", "examples", "tests", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX")}
    code = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the CPU kernel is left out, everything else works: no C++17 compiler was found" in " ".join(
        done.stderr.split()
    )
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "mpcompile/runtimes/native/src/nm_gemm.cpp" in names


def test_every_file_is_of_the_oldest_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={OLDEST[0]}.{OLDEST[1]}"
    for folder in ("mpcompile", "passes", "runtimes", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=OLDEST)
