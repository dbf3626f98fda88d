"""Bad days: a full disk and too little memory are one line, and nothing half-written is left."""

import builtins
import errno
import io
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpcompile
from mpcompile.artifact import Artifact
from mpcompile.data import Data
from mpcompile.errors import PassError, ResourceError
from mpcompile.lower import Lowered, lower
from mpcompile.model import Model
from mpcompile.passes import NMMask
from mpcompile.recipe import Recipe
from mpcompile.shortage import available_bytes, shortage, spelt_bytes
from mpcompile.testing import TinyMLP

RECIPE = Recipe.from_yaml(
    "bench: {batches: [1], seconds: 0.05}\n"
    "passes: [mp-budget: {'null': false}, nm-mask: {criterion: magnitude, refit: none}, certify]\n"
)


class Net(TinyMLP):
    """1.3 MB of weights, for a disk of a few."""

    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012


def compiled(output: Path, width: int = 32) -> Artifact:
    torch.manual_seed(0)
    return mpcompile.compile(Net(width=width), RECIPE, data=Data(), output=output)


# ---- what is told of which error


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


TORCH = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried to allocate {} bytes."
FULL = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
QUOTA = OSError(errno.EDQUOT, "Disk quota exceeded")
RUST = RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FULL, "the disk is full: .* left under /tmp during write"),
        (QUOTA, "the disk is full: nothing is left during write, and more is needed"),
        (RUST, "free some space, or name a folder on another"),
        (OSError(errno.EFBIG, "File too large"), "a file grew too large during write: the disk takes no larger one"),
        (MemoryError(), "memory ran out during write: more was needed, and .* are free; give fewer images"),
        (MemoryError("Unable to allocate 1.50 GiB for an array with shape"), "1.50 GiB more were needed"),
        (RuntimeError(TORCH.format(123456789)), "memory ran out during write: 123.5 MB more were needed"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory ran out"),
        (RuntimeError("std::bad_alloc"), "memory ran out"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (caused(PassError("nm-mask failed"), MemoryError()), "memory ran out"),
    ],
)  # fmt: skip
def test_what_is_told(error: BaseException, text: str) -> None:
    found = shortage(error, "write")
    assert found is not None
    assert re.search(text, found), found


def test_other_errors_are_none_of_it() -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("singular"), PassError("no layer takes 2:4")):
        assert shortage(error, "write") is None
    assert [spelt_bytes(n) for n in (12, 1_500, 2_000_000, 3_210_000_000)] == ["12 bytes", "1.5 kB", "2.0 MB", "3.2 GB"]


def test_a_limit_on_the_process_counts_as_all_there_is() -> None:
    code = (
        "import resource\n"
        "from mpcompile.shortage import available_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
        "before = available_bytes()\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)\n"
        "print(before, available_bytes())\n"
    )
    before, after = map(
        int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()
    )
    assert after <= 64 << 20 < before
    assert available_bytes()


# ---- a full disk


class Filling:
    """A file of which a write fails half way, as where the disk is full."""

    def __init__(self, file: Any, fails: bool) -> None:
        self._file, self._fails = file, fails

    def write(self, content: Any) -> Any:
        if not self._fails:
            return self._file.write(content)
        self._file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", self._file.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()


class Disk:
    """Counts the files that are written under a folder; the one of that number is not written whole."""

    def __init__(self, folder: Path, full_at: int, patched: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        opened = io.open

        def counted(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            handle = opened(file, mode, *more, **named)
            if not set(mode) & set("wax+") or not str(file).startswith(str(folder)):
                return handle
            self.files.append(Path(str(file)).name)
            return Filling(handle, len(self.files) == full_at)

        patched.setattr(builtins, "open", counted)
        patched.setattr(io, "open", counted)


@pytest.fixture
def quick_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that were made before are written as they were: only the writing is of interest."""
    made: dict[tuple[str, int], tuple[Lowered, bytes]] = {}

    def lowered(model: Model, path: Path, **options: Any) -> Lowered:
        key = (path.name, len(model.plan))
        if key not in made:
            found = lower(model, path, **options)
            made[key] = found, path.read_bytes()
            return found
        path.write_bytes(made[key][1])
        return replace(made[key][0], onnx=path, model=model)

    monkeypatch.setattr("mpcompile.engines.lower", lowered)
    # Whether a file for the CPU's kernel is written is measured anew in each run; here all write the same ones.
    monkeypatch.setattr("mpcompile.runtimes.native.missing", lambda: "left out")


def test_a_disk_that_is_full_at_any_file(quick_exports: None, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        disk = Disk(tmp_path, 0, patched)
        whole = compiled(tmp_path / "whole")
    assert {"dense.onnx", "model.onnx", "model.safetensors", "recipe.yaml", "report.json"} <= set(disk.files)
    assert "01-nm-mask.partial" in disk.files
    for number, name in enumerate(disk.files, start=1):
        folder = tmp_path / str(number)
        folder.mkdir()
        kept = name in ("written.json", "00-mp-budget.partial", "01-nm-mask.partial", "02-certify.partial")
        with pytest.MonkeyPatch.context() as patched:
            Disk(folder, number, patched)
            if kept:  # what only serves to go on after a kill is no reason to fail
                compiled(folder / "out")
            else:
                with pytest.raises(
                    ResourceError, match="the disk is full: .* left under .*, and the whole output takes"
                ):
                    compiled(folder / "out")
        if not kept:
            left = {path.name for path in folder.iterdir()}
            assert left <= {".out.work"}, (name, left)
            assert not [path for path in folder.rglob("*") if path.suffix in (".partial", ".onnx", ".json")]
            compiled(folder / "out")
        assert [path.name for path in folder.iterdir()] == ["out"], name
        for file in ("model.safetensors", "masks.safetensors"):
            assert (folder / "out" / file).read_bytes() == (whole.folder / file).read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Disks of given sizes."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here, which needs root: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk(small_disk: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    full = small_disk("2m")  # holds the dense file, and not the compressed one
    with pytest.raises(
        ResourceError, match="the disk is full: .* during export compressed, and the whole output"
    ) as failure:
        compiled(full / "out", width=512)
    assert failure.value.exit_code == 1
    assert list(full.iterdir()) == []
    # Room for the output and not for checkpoints beside it.
    caplog.clear()
    compiled(small_disk("6m") / "out", width=512).verify()
    assert "no checkpoint is kept of" in "; ".join(caplog.messages)


def limited(kind: int, limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (limit, limit))


def test_a_limit_on_files_is_one_line(example: Path, tmp_path: Path) -> None:
    words = [str(example / "model.safetensors"), "--pattern", "2:4", "-o", str(tmp_path / "out"), "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "mpcompile", *words],
        capture_output=True,
        text=True,
        preexec_fn=limited(resource.RLIMIT_FSIZE, 2_000_000),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == (
        "mpcompile: a file grew too large during export dense: files may have 2.0 MB (ulimit -f); raise that limit, or "
        "name another --output\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---- too little memory


@pytest.mark.parametrize(
    ("asks", "text"),
    [
        (lambda: torch.empty(1 << 45), "memory ran out during nm-mask: 140737.5 GB more were needed, and .* are free"),
        (lambda: np.empty(1 << 45), "memory ran out during nm-mask: 256. TiB more were needed"),
        (lambda: bytearray(1 << 45), "memory ran out during nm-mask: more was needed"),
    ],
)
def test_a_pass_without_memory(
    asks: Callable[[], object], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NMMask, "__call__", lambda self, model, data: asks())
    with pytest.raises(ResourceError, match=text) as failure:
        compiled(tmp_path / "out")
    assert failure.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    assert [path.name for path in (tmp_path / ".out.work").iterdir()] == ["00-mp-budget.safetensors"]


@pytest.mark.parametrize("spare_mb", [8, pytest.param(48, marks=pytest.mark.slow)])
def test_a_process_that_may_not_grow_is_one_line(spare_mb: int, example: Path, tmp_path: Path) -> None:
    """From nm-mask on it may use so much more: less than the images take, and than the layers' moments do."""
    words = [
        "mpcompile", str(example / "model.safetensors"), "--pattern", "2:4", "--no-permute", "-q",
        "--data", str(example / "images.npz"), "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    code = (
        "import resource, sys, mpcompile.cli as cli\n"
        "from mpcompile.passes import NMMask\n"
        "whole = NMMask.__call__\n"
        "def limited(self, model, data):\n"
        "    pages = int(open('/proc/self/statm').read().split()[0])\n"
        f"    limit = pages * resource.getpagesize() + ({spare_mb} << 20)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "    return whole(self, model, data)\n"
        "NMMask.__call__ = limited\n"
        f"sys.argv = {words!r}\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode in (1, 4), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("mpcompile: ")
    assert "memory ran out during nm-mask" in line or "calibration on 256 images holds" in line
    assert "--calibration" in line
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
