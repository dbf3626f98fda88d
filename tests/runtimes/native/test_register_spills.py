"""The innermost loops of all microkernels keep their values in registers.

GCC keeps accumulators on the stack without a warning if a microkernel needs more registers than there are. That cost
the AVX2 kernel for 4 rows per pattern 40 % of its speed.
"""

import platform
import shutil
from pathlib import Path

import pytest
from inner_loops import disassembled, innermost_loops

from mpcompile.runtimes.native import build

# Source file -> the name of its microkernels, and the instruction sets that it has one for.
MICROKERNELS = {
    "nm_gemm": ("multiply<", ("avx512", "avx2", "baseline")),
    "nm_gemm_skinny": ("multiply<", ("avx512", "avx2")),
}


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the object files that the library is linked from, compiled by g++."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip(f"reads the code of x86-64 on Linux, not of {platform.machine()} on {platform.system()}")
    for program in ("g++", "objdump"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("objects")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CXX", "g++")
        build.objects(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "instruction_set"), [(source, name) for source, (_, names) in MICROKERNELS.items() for name in names]
)
def test_innermost_loops_do_not_use_the_stack(objects: Path, source: str, instruction_set: str) -> None:
    function = MICROKERNELS[source][0]
    loops = innermost_loops(disassembled(objects / f"{source}_{instruction_set}.o"), function)
    assert loops, f"no function {function} with a loop: was the microkernel renamed?"
    spilled = [f"{loop.function}: {'; '.join(loop.stack)}" for loop in loops if loop.stack]
    assert not spilled, "\n".join(spilled)


def test_all_kernel_sources_are_checked() -> None:
    assert {path.stem for path in build.SOURCES.glob("nm_gemm*.cpp")} == MICROKERNELS.keys()


NESTED = """
0000000000000000 <void multiply<4>(float*)>:
   0:\tmov    %rsp,%rbp
   3:\tmov    -0x8(%rsp),%rax
   8:\tvmovaps (%rdi),%ymm0
   c:\tvfmadd231ps {inner},%ymm0,%ymm1
  10:\tadd    $0x20,%rdi
  14:\tcmp    %rsi,%rdi
  17:\tjne    8 <void multiply<4>(float*)+0x8>
  1a:\tcmp    -0x8(%rsp),%rax
  1e:\tjne    3 <void multiply<4>(float*)+0x3>
  20:\tret

0000000000000030 <other()>:
  30:\tmov    (%rsp),%rax
  34:\tjmp    30 <other()>
"""


@pytest.mark.parametrize(
    ("inner", "spilled"), [("(%rsi)", 0), ("0x8(%rsp)", 1), ("-0x20(%rbp)", 1), ("(%rsp,%rax,4)", 1)]
)
def test_only_the_innermost_loop_of_the_named_function_counts(inner: str, spilled: int) -> None:
    [loop] = innermost_loops(NESTED.format(inner=inner), "multiply<")
    assert len(loop.instructions) == 5
    assert len(loop.stack) == spilled


def test_rbp_is_a_general_register_without_a_frame() -> None:
    [loop] = innermost_loops(NESTED.replace("%rsp,%rbp", "%rsi,%rbp").format(inner="-0x20(%rbp)"), "multiply<")
    assert not loop.stack


def test_a_loop_whose_tail_was_moved_behind_the_return_is_one_loop() -> None:
    code = "0 <multiply<1>()>:\n 1:\tcmp %rax,%rbx\n 2:\tje 6 <x>\n 3:\tinc %rax\n 4:\tjne 1 <x>\n 5:\tret\n"
    [loop] = innermost_loops(f"{code} 6:\tmov (%rsp),%rax\n 7:\tjmp 1 <x>\n", "multiply<")
    assert loop.stack == ("mov (%rsp),%rax",)
