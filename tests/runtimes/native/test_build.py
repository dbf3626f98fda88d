"""Building the kernel's library and checking it: reasons why it is missing, the self-test, sanitizers and exports."""

import shutil
import subprocess
from pathlib import Path

import pytest
from native_models import built_library

from mpcompile.runtimes import native
from mpcompile.runtimes.native import build

SOURCES = Path(__file__).parent


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@pytest.fixture
def compiler() -> None:
    """Skips the test if the library cannot be built here."""
    if obstacle := build.unbuildable():
        pytest.skip(obstacle)


def test_missing_names_the_reason(monkeypatch: pytest.MonkeyPatch, compiler: None) -> None:
    monkeypatch.setattr(native, "LIBRARY", "absent.so")
    assert native.missing() == "the N:M kernel is not built: python -m mpcompile.runtimes.native"
    assert native.library() is None
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "no C++17 compiler was found" in (native.missing() or "")


def test_a_broken_library_is_refused(tmp_path: Path, compiler: None) -> None:
    garbage = tmp_path / "garbage.so"
    garbage.write_bytes(b"not a library")
    assert "fails its self-test with onnxruntime" in (native.refused(garbage) or "")
    crashing = tmp_path / "crashing.so"
    build.run(["-shared", "-fPIC", str(SOURCES / "crashing.cpp"), "-o", str(crashing)])
    assert "it crashed with signal 6" in (native.refused(crashing) or "")


PROGRAMS = (
    "kernel_test",
    "operator_test",
    "conv_test",
    "int8_kernel_test",
    "int8_fusion_test",
    "int8_operator_test",
    "int8_conv_test",
)
NO_SANITIZER = {
    "unexpected memory mapping": "ThreadSanitizer cannot place its memory here (vm.mmap_rnd_bits is above 28)",
    "LeakSanitizer does not work under ptrace": "LeakSanitizer cannot run under ptrace",
}


@pytest.mark.parametrize("sanitizers", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizers_find_nothing(tmp_path: Path, compiler: None, sanitizers: str) -> None:
    """Runs the kernels, and the operator on a mock of ONNX Runtime in which every function fails once."""
    # The kernels compile in half the time at -O0; at -O1 the programs take longer to compile, and much less to run.
    flags = ["-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    programs = [tmp_path / name for name in PROGRAMS]
    try:
        objects = [str(path) for path in build.objects(tmp_path, ["-O0", *flags])]
        for program in programs:
            source = str(SOURCES / f"{program.name}.cpp")
            build.run(
                ["-std=c++17", "-O1", *flags, f"-I{build.SOURCES}", source, *objects, "-pthread", "-o", str(program)]
            )
    except build.BuildFailed as error:
        if "san" in str(error) and ("cannot find" in str(error) or "unsupported" in str(error)):
            pytest.skip(f"this compiler has no sanitizers: {sanitizers}")
        raise
    for program in programs:
        # They take seconds on an idle machine; the limit is for one that hangs.
        done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=1800)
        output = done.stdout + done.stderr
        unavailable = next((reason for sign, reason in NO_SANITIZER.items() if sign in output), None)
        if done.returncode and unavailable:
            pytest.skip(unavailable)
        assert done.returncode == 0, output


def test_instruction_set_is_one_that_is_compiled(library: Path) -> None:
    assert native.instruction_set() in ("avx512", "avx2", "baseline")
    assert native.int8_instruction_set() in ("avx512vnni", "avx2", "i8mm", "dotprod", "baseline")


def test_the_library_exports_only_its_interface(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == set(build.INTERFACE)
