"""A whole run on a full disk or with too little memory: one line, exit code 1, and nothing half-written."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import mpcompile as run_command
from kept_exports import Exports, keep_exports
from scarce_resources import Disk, limited

import mpcompile
from mpcompile.data.images import Data
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import ResourceError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.passes import NMMask
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import TinyMLP, tiny_source

RECIPE = Recipe.from_yaml(
    "bench: {batches: [1], seconds: 0.05}\n"
    "passes: [mp-budget: {'null': false}, nm-mask: {criterion: magnitude, refit: none}]\n"
)


class Net(TinyMLP):
    """1.3 MB of weights, for a disk of a few."""

    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012


def compiled(output: Path, width: int = 32) -> Artifact:
    torch.manual_seed(0)
    return mpcompile.compile(Net(width=width), RECIPE, data=Data(), output=output)


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a file for the CPU's kernel is written is measured anew in each run; here all write the same ones."""
    monkeypatch.setattr("mpcompile.runtimes.native.missing", lambda: "left out")


@pytest.fixture(scope="module")
def made() -> Exports:
    """Exports of the model, filled by `quick_exports`."""
    return {}


@pytest.fixture
def quick_exports(made: Exports, without_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that were made before are written as they were: only the writing is of interest."""
    keep_exports(monkeypatch, made)


def test_a_disk_that_is_full_at_any_file(quick_exports: None, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        disk = Disk(tmp_path, 0, patched)
        whole = compiled(tmp_path / "whole")
    assert {"dense.onnx", "model.onnx", "model.safetensors", "recipe.yaml", "report.json"} <= set(disk.files)
    assert "01-nm-mask.partial" in disk.files
    for number, name in enumerate(disk.files, start=1):
        folder = tmp_path / str(number)
        folder.mkdir()
        kept = name in ("written.json", "00-mp-budget.partial", "01-nm-mask.partial")
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


def test_a_small_disk(
    small_disk: Callable[[str], Path], without_kernel: None, caplog: pytest.LogCaptureFixture
) -> None:
    full = small_disk("2m")  # holds the dense file, and not the compressed one
    with pytest.raises(ResourceError, match="the disk is too full: .* and the whole output takes at least") as failure:
        compiled(full / "out", width=512)
    assert failure.value.exit_code == 1
    assert list(full.iterdir()) == []
    # Room for the output and not for checkpoints beside it.
    caplog.clear()
    compiled(small_disk("6m") / "out", width=512).verify()
    assert "no checkpoints are saved from" in "; ".join(caplog.messages)


SIZE = ("--input-size", "1x28x28", "--mean", "0.5", "--std", "0.5")


def environment_with(folder: Path) -> dict[str, str]:
    """This process's, with the folder's modules, on one thread."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def test_a_limit_on_files_is_one_line(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(large)
    with limited(resource.RLIMIT_FSIZE, 2_000_000):
        done = run_command("large:net", *SIZE, "--pattern", "2:4", "-o", tmp_path / "out", "-q")
    assert done.returncode == 1, done.stderr
    assert done.stderr == (
        "mpcompile: a file grew too large during export dense: the limit is 2.0 MB (ulimit -f); raise that limit, or "
        "name another folder with --output\n"
    )
    assert list(tmp_path.iterdir()) == []


def refused() -> object:
    """As Python's own objects fail; the others below ask for more than the address space has."""
    raise MemoryError


@pytest.mark.parametrize(
    ("asks", "text"),
    [
        (lambda: torch.empty(1 << 45), "memory ran out during nm-mask: 140737.5 GB more were needed, and .* are free"),
        (lambda: np.empty(1 << 45), "memory ran out during nm-mask: 256. TiB more were needed"),
        (refused, "memory ran out during nm-mask: more was needed"),
    ],
)
def test_a_pass_without_memory(
    asks: Callable[[], object], text: str, quick_exports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NMMask, "__call__", lambda self, model, data: asks())
    with pytest.raises(ResourceError, match=text) as failure:
        compiled(tmp_path / "out")
    assert failure.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    assert [path.name for path in (tmp_path / ".out.work").iterdir()] == ["00-mp-budget.safetensors"]


def exported_before(dense: Path) -> str:
    """Code after which a new process takes this file of the large model, in place of an export of several seconds."""
    torch.manual_seed(0)  # as in `net`
    source = tiny_source((1, 28, 28))
    lower(capture(TinyMLP(pixels=784, width=1024).eval(), source), dense)
    return (
        "import shutil, mpcompile.driver.run_plan\n"
        "from mpcompile.export.onnx_export import Lowered\n"
        "def copied(model, path, **options):\n"
        f"    shutil.copy({str(dense)!r}, path)\n"
        "    about = {'arch': '', 'image_shape': tuple(model.example.shape[1:]), 'precision': 'fp32', 'batch': None}\n"
        "    return Lowered(onnx=path, model=model, opset=20, **about)\n"
        "mpcompile.driver.run_plan.lower = copied\n"
    )


@pytest.mark.parametrize(
    ("model", "spare_mb"),
    [
        ("large", 8),
        pytest.param("example", 8, marks=pytest.mark.slow),
        pytest.param("example", 48, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_may_not_grow_is_one_line(
    model: str,
    spare_mb: int,
    large: Path,
    example: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """From nm-mask on it may use so much more: less than the moments of a layer, or than the example's images."""
    given = [str(example / "model.safetensors")] if model == "example" else ["large:net", *SIZE]
    words = [
        "mpcompile", *given, "--pattern", "2:4", "--no-permute", "-q", "--data", str(example / "images.npz"),
        "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    code = "" if model == "example" else exported_before(tmp_path_factory.mktemp("dense") / "dense.onnx")
    code += (
        "import resource, sys, mpcompile.cli.entry_point as cli\n"
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment_with(large))
    assert done.returncode in (1, 4), done.stderr

    [line] = done.stderr.splitlines()
    assert line.startswith("mpcompile: ")
    assert "memory ran out during nm-mask" in line or "calibration on 256 images holds" in line
    assert "--calibration" in line
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
