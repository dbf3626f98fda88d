"""Target trt without a GPU: the static check, the failure without a driver, and every name that it uses, checked
against NVIDIA's own bindings of TensorRT 10 and 11.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commandline import mpcompile as run_command
from sparse_vit import write_sparse_vit

import mpcompile
from mpcompile.errors import RuntimeMissing
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import Build, TensorRT
from mpcompile.runtimes.batching import in_pieces
from mpcompile.runtimes.nvidia import Gpu, first_gpu
from mpcompile.runtimes.tensorrt.builder import engine_name
from mpcompile.runtimes.tensorrt.target import trtexec
from mpcompile.testing import tiny_mlp

ROOT = Path(__file__).parents[3]
BINDINGS = Path(sys.prefix) / "tensorrt"  # `make` puts the bindings of either release there
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
WITHOUT_GPU = TensorRT().missing()


@pytest.fixture(scope="module", params=["10", "11"])
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns environment variables with which the bindings of a release import without TensorRT's libraries."""
    wheel = BINDINGS / request.param
    if not wheel.is_dir():
        pytest.skip(f"the bindings of TensorRT {request.param} are not in {wheel}; make test puts them there")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, to stand in for TensorRT's libraries")
    folder = tmp_path_factory.mktemp(f"trt{request.param}")
    for name in LIBRARIES:
        library = f"{name}.so.{request.param}"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library)]
        subprocess.run([compiler, str(Path(__file__).with_name("api_surface.c")), *flags], check=True)
    # The wheel's module is tensorrt_bindings; the package tensorrt re-exports it.
    (folder / "tensorrt.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    return {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join([str(wheel), str(folder)]),
        "RELEASE": request.param,
    }


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def test_every_name_is_in_the_bindings_of_this_release(bindings: dict[str, str], tmp_path: Path) -> None:
    release = bindings["RELEASE"]
    made = subprocess.run(
        [str(Path(sys.executable).parent / "stubgen"), "--inspect-mode", "-m", "tensorrt_bindings.tensorrt", "-o", "."],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **bindings},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    package = tmp_path / "tensorrt"
    package.mkdir()
    text = (tmp_path / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    text = re.sub(r"^bool: DataType\n", "", text, flags=re.MULTILINE)  # this attribute would shadow the builtin bool
    # stubgen reads docstrings only, and this one does not mention the buffer protocol.
    buffer = "    def __buffer__(self, flags: int) -> memoryview: ..."
    text = text.replace("class IHostMemory:\n", f"class IHostMemory:\n{buffer}\n")
    stub = package / "__init__.pyi"
    files = ["runtimes/tensorrt/builder.py", "runtimes/tensorrt/engine.py"]
    command = [
        sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", "--cache-dir=/dev/null",
        "--namespace-packages", "--explicit-package-bases",
    ]  # fmt: skip
    for _ in range(20):  # stubgen writes some invalid signatures; their defaults are removed line by line
        try:
            ast.parse(text)
            break
        except SyntaxError as error:
            number = (error.lineno or 1) - 1
        lines = text.split("\n")
        assert " = ..." in lines[number], lines[number]
        lines[number] = lines[number].replace(" = ...", "")
        text = "\n".join(lines)
    stub.write_text(f"__version__: str\n{text}")
    # A probe with a name that TensorRT 11 removed, to show that the check finds it.
    probe = tmp_path / "probe.py"
    probe.write_text("import tensorrt as trt\n\nprint(trt.BuilderFlag.FP16)\nprint(trt.BuilderFlag.SPARSE_WEIGHTS)\n")
    done = subprocess.run(
        [*command, *files, str(probe), str(stub)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(tmp_path)},
    )  # fmt: skip
    messages = done.stdout.splitlines()
    assert "[syntax]" not in done.stdout, done.stdout  # after a syntax error mypy checks nothing else
    assert [line for line in messages if line.startswith(tuple(files))] == [], f"TensorRT {release}"
    gone = [line for line in messages if "probe.py" in line and "attr-defined" in line]
    assert len(gone) == (release == "11")


def test_without_a_driver_the_builder_says_so_and_does_not_crash(bindings: dict[str, str], tmp_path: Path) -> None:
    code = """
from pathlib import Path
from mpcompile.errors import BuildError
from mpcompile.runtimes.tensorrt.builder import build_serialized
import tensorrt
print(tensorrt.__version__)
try:
    build_serialized(Path("model.onnx"), None, sparse=True)
except BuildError as error:
    print(error)
"""
    done = run(code, bindings)
    assert done.returncode == 0, done.stderr
    version, error = done.stdout.splitlines()
    assert version.startswith(bindings["RELEASE"])
    assert error.startswith(f"TensorRT {version} has no builder here")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 6 layers, and its images."""
    return write_sparse_vit(tmp_path_factory.mktemp("model"))


@pytest.mark.skipif(WITHOUT_GPU is None, reason="there is a GPU")
def test_a_required_engine_that_cannot_be_built_is_one_line_and_exit_code_7(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    done = run_command(
        files[0], "--pattern", "2:4", "--target", "trt", "--precision", "fp16", "-o", tmp_path / "out",
        "--require-engine",
    )  # fmt: skip
    assert done.returncode == 7
    [line] = done.stderr.splitlines()
    assert line.startswith("mpcompile: target trt: ")
    assert "an engine is required" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(WITHOUT_GPU is None, reason="there is a GPU")
def test_without_a_gpu_files_are_checked_and_the_report_names_the_commands(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = Recipe.checked(
        {
            "passes": [{"nm-mask": {"pattern": "2:4", "criterion": "magnitude", "refit": "none"}}],
            "target": "trt",
            "precision": "bf16",
            "bench": {"batches": [1, 8, 64]},
            "data": {"calibration": 64, "held_out": 64},
        }
    )
    artifact = mpcompile.compile(files[0], recipe, data=files[1], output=tmp_path / "out")
    report = artifact.report
    assert report.latency == ()
    assert report.idle == WITHOUT_GPU
    assert report.accelerated  # TensorRT has kernels for 2:4, here or elsewhere
    assert report.comparison is not None  # on the CPU, with the same file
    assert len(report.verdicts) == 4
    assert all(row.eligible and row.chosen is None for row in report.verdicts)
    words = " ".join(report.verdict)
    assert "speed was not measured" in words
    assert "4 of 4 masked layers are eligible" in words
    text = (artifact.folder / "report.md").read_text()
    assert "trtexec --onnx=model.onnx --stronglyTyped --sparsity=enable --minShapes=images:1x1x8x8" in text
    assert "--optShapes=images:8x1x8x8 --maxShapes=images:64x1x8x8" in text
    assert "mpcompile bench OUT --target trt --batch 1,8,64" in text
    artifact.verify()


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A model in half precision with a fixed batch."""
    return lower(tiny_mlp(), tmp_path_factory.mktemp("lowered") / "dense.onnx", precision="fp16", batch=8)


def test_a_target_without_a_gpu_refuses_to_build(lowered: Lowered) -> None:
    if WITHOUT_GPU is None:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeMissing, match="target trt"):
        TensorRT().build(lowered, Build())


def test_engine_names(lowered: Lowered) -> None:
    gpu = Gpu("NVIDIA A100", (8, 0))
    assert engine_name(lowered, Build(), "10.16.1", gpu) == f"{lowered.arch}-dense-fp16-bs8-trt10.16.1-sm80"
    assert trtexec(lowered, Build())[0].count("Shapes") == 0


@pytest.mark.skipif(not isinstance(first_gpu(), str), reason="there is a GPU")
def test_the_driver_is_queried_in_a_subprocess() -> None:
    found = first_gpu()
    assert isinstance(found, str)
    assert "driver" in found


@pytest.mark.parametrize(("count", "sizes"), [(3, [3]), (1, [2]), (9, [4, 4, 2]), (8, [4, 4]), (4, [4])])
def test_batches_of_any_size_run_on_an_engine_of_fixed_sizes(count: int, sizes: list[int]) -> None:
    seen = []

    def engine(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return images * 2

    images = np.arange(count, dtype=np.float32).reshape(count, 1)
    assert np.array_equal(in_pieces(engine, images, 2, 4), images * 2)
    assert seen == sizes


def test_doctor_says_that_files_are_checked_without_a_gpu() -> None:
    if WITHOUT_GPU is None:
        pytest.skip("there is a GPU")
    done = run_command("doctor", "--json")
    row = next(row for row in json.loads(done.stdout) if row["what"] == "target trt")
    assert (row["works"], row["remedy"]) == (False, WITHOUT_GPU)
    assert "files are checked" in row["found"]
