"""Shell completion: commands, options of the default command, and values, as bash, zsh and fish ask for them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_reports import small_report, write

from mpcompile.cli.app import app
from mpcompile.cli.choices import PATTERNS
from mpcompile.cli.completed_values import architectures
from mpcompile.cli.parse import patterns

Complete = Callable[..., str]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complete:
    """What `mpcompile` prints for an instruction of a shell script, with these environment variables."""

    def run(instruction: str, **environment: str) -> str:
        for name, value in {"_MPCOMPILE_COMPLETE": instruction, **environment}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            app(prog_name="mpcompile")
        assert not stop.value.code
        return capsys.readouterr().out

    return run


def bash(complete: Complete, words: str) -> list[str]:
    """The completions of the last word in bash."""
    return complete("complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)).split()


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (
            "mpcompile ",
            ["analyze", "bench", "compare", "compile", "explain", "init", "verify", "doctor", "passes", "schema"],
        ),
        ("mpcompile ve", ["verify"]),
        ("mpcompile --pat", ["--pattern"]),  # of the default command, before MODEL
        ("mpcompile m.pt --pat", ["--pattern"]),
        ("mpcompile compile m.pt --pat", ["--pattern"]),
        ("mpcompile --vers", ["--version"]),
        ("mpcompile --verb", ["--verbose"]),
        ("mpcompile --hel", ["--help", "--held-out"]),
        ("mpcompile bench --cu", ["--cuda-graph"]),
        ("mpcompile bench out --cri", []),
        ("mpcompile --target ", ["ort", "ort-cuda", "trt", "rtx", "eager"]),
        ("mpcompile m.pt --target ort", ["ort", "ort-cuda"]),
        ("mpcompile bench --target t", ["trt"]),
        ("mpcompile analyze m.pt --budget m", ["mp", "magnitude"]),
        ("mpcompile m.pt --criterion ", ["magnitude", "wanda", "covariance", "joint"]),
        ("mpcompile m.pt --refit l", ["layer"]),
        ("mpcompile m.pt --precision ", ["fp32", "fp16", "bf16", "int8", "fp8"]),
        ("mpcompile m.pt --from nm", ["nm-mask"]),
        ("mpcompile compare out --fail-if speedup_i", ["speedup_int8", "speedup_int8_low"]),
        ("mpcompile init --precision int", ["int8"]),
        ("mpcompile m.pt --pattern 5", ["50%"]),
        ("mpcompile m.pt --pattern a", ["auto"]),
        ("mpcompile m.pt --arch vit_tiny_patch16_2", ["vit_tiny_patch16_224"]),
        ("mpcompile analyze m.pt --arch no_such", []),
        ("mpcompile explain no-such-folder bl", []),
        ("mpcompile schema re", ["recipe", "report"]),
        ("mpcompile mod", []),  # then the shell completes file names
    ],
)
def test_bash(complete: Complete, words: str, completions: list[str]) -> None:
    assert bash(complete, words) == completions


def test_layers_of_a_folder_are_offered(complete: Complete, tmp_path: Path) -> None:
    write(small_report(), tmp_path)
    assert bash(complete, f"mpcompile explain {tmp_path} blocks.0.mlp") == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    (tmp_path / "report.json").write_text("[1]")
    assert bash(complete, f"mpcompile explain {tmp_path} blocks") == []


def test_the_architectures_are_those_of_timm() -> None:
    import timm

    assert architectures("") == sorted(timm.list_models())


def test_completing_an_architecture_imports_no_large_library() -> None:
    code = (
        "import sys\n"
        "from mpcompile.cli.completed_values import architectures\n"
        "assert len(architectures('vit_')) > 50\n"
        "print([name for name in ('timm', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_patterns_that_are_offered_are_patterns() -> None:
    for text in PATTERNS:
        if text != "auto":  # which measures
            assert patterns(text, "ort", None), text


def test_an_option_is_offered_once(complete: Complete) -> None:
    found = bash(complete, "mpcompile -")
    assert {"--version", "--install-completion", "--show-completion", "--help", "--output", "-o"} <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("shell", "words", "text"),
    [
        ("zsh", "mpcompile m.pt --target r", '(("rtx":"TensorRT for RTX, which needs no GPU to compile"))'),
        ("zsh", "mpcompile --pat", '"--pattern":"N\\\\:M keeps N of every M weights, such as 2\\\\:4"'),
        ("zsh", "mpcompile mod", "_files"),
        ("fish", "mpcompile m.pt --criterion w", "wanda\tweight times input norm\n"),
        ("fish", "mpcompile --tar", "--target\tRuntime to build for: "),
    ],
)
def test_zsh_and_fish_show_one_line_of_help(complete: Complete, shell: str, words: str, text: str) -> None:
    output = complete(f"complete_{shell}", _TYPER_COMPLETE_ARGS=words, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert text in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_calls_mpcompile(complete: Complete, shell: str) -> None:
    assert f"_MPCOMPILE_COMPLETE=complete_{shell}" in complete(f"source_{shell}")
