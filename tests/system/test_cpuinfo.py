"""The reader of /proc/cpuinfo."""

from pathlib import Path

from mpcompile.system.hardware import cpuinfo

X86 = (
    "processor\t: 0\nmodel name\t: CPU: 2 GHz\nflags\t\t: sse avx2\nvmx flags\t: ept\n\nprocessor\t: 1\nflags\t: sse\n"
)


def test_a_field_has_one_value_per_logical_cpu(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(X86)
    assert cpuinfo("processor", file) == ("0", "1")
    assert cpuinfo("flags", file) == ("sse avx2", "sse")
    assert cpuinfo("model name", file) == ("CPU: 2 GHz",)


def test_an_absent_field_or_file_has_no_values(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert cpuinfo("flags", file) == ()
    file.write_text(X86)
    assert cpuinfo("Features", file) == ()
