"""The kernels on emulated aarch64 processors: without sdot, with it, and with i8mm. Run by `make test-arm`.

QEMU shows that results are right. It says nothing about speed.
"""

import re
from collections.abc import Callable
from pathlib import Path

import arm_machine
import numpy as np
import onnx
import pytest
from arm_machine import PROCESSORS, compile_with, run
from inner_loops import AARCH64, disassembled, innermost_loops
from int8_models import Graph, native_operators, rewritten
from int8_models import run as as_written
from native_models import masked, one_node_model
from numpy.typing import NDArray
from test_build import PROGRAMS

from mpcompile.runtimes.native import build

OrtProgram = Callable[[onnx.ModelProto, NDArray[np.float32], str], NDArray[np.float32]]
SOURCES = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(arm_machine.missing() is not None, reason=str(arm_machine.missing())),
]
MICROKERNELS = {
    "nm_gemm_baseline": "multiply<",
    "int8_gemm_dotprod": "multiply<",
    "int8_gemm_i8mm": "multiply<",
    "layer_norm_dotprod": "normalise",
    "layer_norm_i8mm": "normalise",
}


def linked(folder: Path, programs: tuple[str, ...], flags: tuple[str, ...] = ()) -> dict[str, Path]:
    """Links test programs with the library's object files, all compiled for aarch64."""
    objects = [str(path) for path in arm_machine.objects(folder, flags)]
    for name in programs:
        source = str(SOURCES / f"{name}.cpp")
        compile_with(
            ["-std=c++17", *flags, f"-I{build.SOURCES}", source, *objects, "-pthread", "-o", str(folder / name)]
        )
    return {name: folder / name for name in programs}


@pytest.fixture(scope="module")
def optimised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test programs as the library is compiled for users."""
    return linked(tmp_path_factory.mktemp("arm"), (*PROGRAMS, "kernel_names"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    flags = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return linked(tmp_path_factory.mktemp("sanitized"), PROGRAMS, flags)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_processor_runs_the_kernels_that_it_can(optimised: dict[str, Path], processor: str) -> None:
    assert run(optimised["kernel_names"], processor=processor).stdout.strip() == PROCESSORS[processor]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_results_are_right(optimised: dict[str, Path], processor: str, program: str) -> None:
    done = run(optimised[program], processor=processor)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_sanitizers_find_nothing(sanitized: dict[str, Path], program: str) -> None:
    """On the processor that runs all kernels. LeakSanitizer needs ptrace, which QEMU does not emulate."""
    done = run(sanitized[program], environment={"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_sanitizers_would_find_an_error(tmp_path: Path) -> None:
    source = tmp_path / "overflow.cpp"
    source.write_text("int main(int n, char**) { int a[4] = {}; return a[n + 3]; }\n", encoding="utf-8")
    compile_with(["-fsanitize=address", str(source), "-o", str(tmp_path / "overflow")])
    assert "stack-buffer-overflow" in run(tmp_path / "overflow").stderr


@pytest.fixture(scope="module")
def ort_program(tmp_path_factory: pytest.TempPathFactory) -> OrtProgram:
    """Runs a model on one emulated processor in ONNX Runtime for aarch64, with our operators."""
    folder = tmp_path_factory.mktemp("ort")
    library = arm_machine.onnxruntime(folder)
    if library is None:
        pytest.skip(f"no aarch64 wheel of ONNX Runtime in {arm_machine.WHEELS}: make test-arm fetches it")
    objects = [str(path) for path in arm_machine.objects(folder)]
    flags = ["-std=c++17", f"-I{build.SOURCES}", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{folder}", "-pthread"]
    compile_with([str(SOURCES / "ort_program.cpp"), *objects, str(library), *flags, "-o", str(folder / "ort_program")])
    root = arm_machine.with_cpuinfo(folder / "root")

    def run_model(file: onnx.ModelProto, x: NDArray[np.float32], processor: str) -> NDArray[np.float32]:
        onnx.save_model(file, folder / "model.onnx")
        x.tofile(folder / "x")
        names = [str(size) for size in x.shape] + [file.graph.output[0].name]
        arguments = [str(folder / "model.onnx"), *names, str(folder / "x"), str(folder / "y")]
        done = run(folder / "ort_program", *arguments, processor=processor, root=root)
        assert done.returncode == 0, done.stdout + done.stderr
        return np.fromfile(folder / "y", np.float32).reshape(len(x), -1)

    return run_model


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_float32_model_runs_in_onnxruntime(ort_program: OrtProgram, processor: str) -> None:
    rng = np.random.default_rng(0)
    weight, bias = masked(rng, 36, 48, 2, 4), rng.standard_normal(36, dtype=np.float32)
    x = rng.standard_normal((30, 48), dtype=np.float32)
    found = ort_program(one_node_model(weight, bias, 4), x, processor)
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_int8_model_runs_in_onnxruntime(ort_program: OrtProgram, processor: str) -> None:
    graph = Graph(0)
    u8 = graph.quantize(graph.norm(graph.op("Neg", ["x"]), 48))
    product = graph.product(graph.dequantize(u8), 48, 100, "matmul bias")
    again = graph.product(graph.dequantize(graph.quantize(graph.op("Relu", [product]))), 100, 40, "matmul bias", 4)
    graph.output(again)
    x = np.random.default_rng(1).standard_normal((30, 48), dtype=np.float32)
    file = graph.file(x.shape)
    ours = rewritten(file, x)
    assert native_operators(ours) == {"LayerNormQuantize": 1, "NMGemmInt8ReluQuantize": 1, "NMGemmInt8": 1}
    [expected] = as_written(file, x)
    found = ort_program(ours, x, processor)
    # A value next to the middle of two integers may be rounded to the other one.
    assert np.abs(found - expected).mean() < 0.01 * np.abs(expected).mean()


def test_innermost_loops_do_not_use_the_stack(tmp_path: Path) -> None:
    arm_machine.objects(tmp_path)
    spilled = []
    for name, function in MICROKERNELS.items():
        loops = innermost_loops(disassembled(tmp_path / f"{name}.o", AARCH64), function, AARCH64)
        assert loops, f"{name} has no function {function} with a loop: was the microkernel renamed?"
        spilled += [f"{name}, {loop.function}: {'; '.join(loop.stack)}" for loop in loops if loop.stack]
    assert not spilled, "\n".join(spilled)


def test_int8_products_use_the_instructions_of_their_set(tmp_path: Path) -> None:
    """A build without the right compiler flags would be right and slow."""
    arm_machine.objects(tmp_path)
    for name, instruction, other in (("dotprod", "sdot", "usdot"), ("i8mm", "usdot", "udot")):
        code = disassembled(tmp_path / f"int8_gemm_{name}.o", AARCH64)
        assert re.search(rf"\t{instruction}\t", code)
        assert not re.search(rf"\t{other}\t", code)
