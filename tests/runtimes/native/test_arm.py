"""The kernels on emulated aarch64 processors: without sdot, with it, and with i8mm. Run by `make test-arm`.

QEMU shows that results are right. It says nothing about speed.
"""

import re
from pathlib import Path

import arm_machine
import pytest
from arm_machine import PROCESSORS, compile_with, run
from inner_loops import AARCH64, disassembled, innermost_loops
from test_build import PROGRAMS

from mpcompile.runtimes.native import build

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
