"""The innermost loops of all microkernels keep their values in registers.

GCC keeps accumulators on the stack without a warning if a microkernel needs more registers than there are. That cost
the AVX2 kernel for 4 rows per pattern 40 % of its speed.
"""

import platform
import re
import shutil
from pathlib import Path

import pytest
from inner_loops import AARCH64, Loop, disassembled, innermost_loops

from mpcompile.runtimes.native import build

# Source file -> the name of its microkernels, and the instruction sets that it has one for.
MICROKERNELS = {
    "nm_gemm": ("multiply<", ("avx512", "avx2", "baseline")),
    "nm_gemm_skinny": ("multiply<", ("avx512", "avx2")),
    "nm_conv": ("pack_rows<", ("avx512", "avx2")),  # SSE2 has no vectors of 8: GCC moves their halves through memory
    "int8_gemm": ("multiply<", ("avx512vnni", "avx2")),
    "attention": ("product<", ("avx512vnni", "avx2")),
    "layer_norm": ("normalise", ("avx512vnni", "avx2")),
}
# AVX2, 4 rows of one pattern, 3 tokens: 12 sums, 2 activations, a vector of ones and 2 products, in 16 registers. One
# sum in memory costs nothing that can be measured; the ones in memory made the kernel 7 to 12 % slower on Zen 4.
ONE_SUM_IN_MEMORY = re.compile(r"\bmultiply<\d+, 4, false, (true|false), 3>\(unsigned char")


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the kernels' object files that the library is linked from, compiled by g++."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip(f"reads the code of x86-64 on Linux, not of {platform.machine()} on {platform.system()}")
    for program in ("g++", "objdump"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("objects")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CXX", "g++")
        patched.setattr(build, "SHARED", ())  # only the kernels
        build.objects(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "instruction_set"), [(source, name) for source, (_, names) in MICROKERNELS.items() for name in names]
)
def test_innermost_loops_do_not_use_the_stack(objects: Path, source: str, instruction_set: str) -> None:
    function = MICROKERNELS[source][0]
    loops = innermost_loops(disassembled(objects / f"{source}_{instruction_set}.o"), function)
    assert loops, f"no function {function} with a loop: was the microkernel renamed?"
    spilled = [f"{loop.function}: {'; '.join(loop.stack)}" for loop in loops if len(loop.stack) > allowed(loop, source)]
    assert not spilled, "\n".join(spilled)


def allowed(loop: Loop, source: str) -> int:
    """Returns how many instructions of a loop may address the stack: a load and a store, or none."""
    return 2 if source == "int8_gemm" and ONE_SUM_IN_MEMORY.search(loop.function) else 0


def test_all_kernel_sources_are_checked() -> None:
    compiled = {path.stem for path in build.SOURCES.glob("*.cpp")} - {Path(name).stem for name in build.SHARED}
    assert compiled == MICROKERNELS.keys()


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


def test_loops_of_aarch64_are_read() -> None:
    code = """
0000000000000000 <void multiply<2>(float*)>:
   0:\tldr\tq0, [sp, #16]
   4:\tfmla\tv1.4s, v0.4s, v2.s[0]
   8:\tcbnz\tx3, 4 <void multiply<2>(float*)+0x4>
   c:\tldr\tq0, [sp, #32]
  10:\tcmp\tx0, x7
  14:\tb.ne\tc <void multiply<2>(float*)+0xc>  // b.any
  18:\tret
"""
    first, second = innermost_loops(code, "multiply<", AARCH64)
    assert (len(first.instructions), first.stack) == (2, ())
    assert second.stack == ("ldr\tq0, [sp, #32]",)


def test_rbp_is_a_general_register_without_a_frame() -> None:
    [loop] = innermost_loops(NESTED.replace("%rsp,%rbp", "%rsi,%rbp").format(inner="-0x20(%rbp)"), "multiply<")
    assert not loop.stack


def test_a_loop_whose_tail_was_moved_behind_the_return_is_one_loop() -> None:
    code = "0 <multiply<1>()>:\n 1:\tcmp %rax,%rbx\n 2:\tje 6 <x>\n 3:\tinc %rax\n 4:\tjne 1 <x>\n 5:\tret\n"
    [loop] = innermost_loops(f"{code} 6:\tmov (%rsp),%rax\n 7:\tjmp 1 <x>\n", "multiply<")
    assert loop.stack == ("mov (%rsp),%rax",)
