"""Help and version: which names they list, which options they show, and that they import no large library."""

import json
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
from commandline import mpcompile
from doc_pages import parse
from typer.main import get_command

from mpcompile.cli import choices
from mpcompile.cli.app import app
from mpcompile.cli.help_groups import COMMANDS as COMMANDS_BY_SECTION
from mpcompile.cli.help_groups import EXAMPLES, FEW, OPTIONS, OTHER
from mpcompile.driver.run_plan import PASSES, RUNTIMES, known, recipe_schema
from mpcompile.recipe.schema import DataChoice

LARGE = ("torch", "onnx", "onnxruntime", "timm", "matplotlib", "scipy", "numpy", "yaml", "rich.progress")
COMMANDS = ("analyze", "bench", "compare", "compile", "explain", "init", "verify", "doctor", "passes", "schema")


def test_help_version_and_no_arguments() -> None:
    done = mpcompile("--help")
    assert done.returncode == 0
    for word in (*COMMANDS, "Exit codes: 0 done; 2 wrong usage", "--install-completion"):
        assert word in done.stdout
    assert mpcompile("--version").stdout.strip().count(".") == 2
    assert "Usage" in mpcompile().stdout + mpcompile().stderr
    assert "--allow-pickle" in mpcompile("compile", "--help").stdout


def test_every_command_is_checked_here() -> None:
    assert set(get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_and_version_import_no_large_library(words: list[str]) -> None:
    """Not a test of the time, which depends on the machine: torch alone takes seconds to import."""
    code = (
        "import json, sys\n"
        f"sys.argv = ['mpcompile', *{words!r}]\n"
        "from mpcompile.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        f"print(json.dumps([name for name in {LARGE!r} if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def commands() -> dict[str, Any]:
    return dict(get_command(app).commands)  # type: ignore[attr-defined]


def test_every_option_and_every_command_has_its_section() -> None:
    names = [name for section in OPTIONS.values() for name in section]
    assert len(names) == len(set(names))
    long = {name: [p.name for p in c.params if p.param_type_name == "option"] for name, c in commands().items()}
    assert set(names) <= {option for options in long.values() for option in options}
    for name, options in long.items():
        if len(options) >= FEW:
            assert not set(options) - set(names), f"{name}: give its new options a section in help_groups.py"
            text = mpcompile(name, "--help").stdout
            titles = [title for title in re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE) if title in OPTIONS]
            assert titles == [title for title, section in OPTIONS.items() if set(section) & set(options)]
            assert text.rpartition(f"{OTHER}:")[2].split()[:2] == ["-h,", "--help"]
    listed = [name for section in COMMANDS_BY_SECTION.values() for name in section]
    assert sorted(listed) == sorted(commands())


def test_every_option_is_in_the_help_once() -> None:
    for name, command in commands().items():
        text = mpcompile(name, "--help").stdout.partition("Examples:")[0]
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if option.startswith("--"):
                    rows = re.findall(rf"^  (?:-\w, )?(?:--[\w-]+ / )?{option}(?![\w-])", text, re.MULTILINE)
                    assert len(rows) == 1, (name, option)


def test_every_command_has_examples_that_are_understood() -> None:
    assert set(EXAMPLES) == set(commands())
    for name, lines in EXAMPLES.items():
        text = mpcompile(name, "--help").stdout
        for line in lines:
            assert f"    {line}\n" in text, line  # not wrapped
            program, *words = shlex.split(line.partition(" > ")[0])
            assert program == "mpcompile"
            parse(words)
            assert (words[0] if words[0] in commands() else "compile") == name


def enum_of(pass_name: str, parameter: str) -> list[str]:
    """The values that the JSON Schema allows for a parameter of a pass."""
    steps = recipe_schema(known())["properties"]["passes"]["items"]["oneOf"][1:]
    [params] = [step["properties"][pass_name] for step in steps if pass_name in step["properties"]]
    found: dict[str, Any] = params["properties"][parameter]
    kinds = found.get("anyOf", [found])
    return [value for kind in kinds for value in kind.get("enum", ())]


def test_the_names_in_help_and_completion_are_those_of_the_code() -> None:
    assert set(choices.TARGETS) == set(RUNTIMES)
    assert list(choices.PASSES) == list(PASSES)
    assert list(choices.CRITERIA) == enum_of("nm-mask", "criterion")
    assert set(choices.REFITS) == set(enum_of("nm-mask", "refit"))
    assert list(choices.SIGNALS) == enum_of("mp-budget", "signal")
    assert list(choices.PRECISIONS) == recipe_schema(known())["properties"]["precision"]["enum"]
    images = DataChoice.model_json_schema()["properties"]
    assert [list(choices.EXIF), list(choices.ALPHA)] == [images[key]["enum"] for key in ("exif", "alpha")]


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("target", choices.TARGETS),
        ("criterion", choices.CRITERIA),
        ("refit", choices.REFITS),
        ("budget", choices.SIGNALS),
        ("precision", choices.PRECISIONS),
        ("exif", choices.EXIF),
        ("alpha", choices.ALPHA),
        ("preprocess", choices.PREPROCESSING),
        ("interpolation", choices.INTERPOLATIONS),
        ("channel_order", choices.CHANNEL_ORDERS),
    ],
)
def test_help_lists_every_name_that_an_option_accepts(option: str, names: dict[str, str]) -> None:
    compile_command = get_command(app).commands["compile"]  # type: ignore[attr-defined]
    [text] = [parameter.help for parameter in compile_command.params if parameter.name == option]
    assert set(names) <= set(re.findall(r"[\w-]+", text))


def test_help_has_no_long_sentence() -> None:
    """At most some 20 words, not counting the names that the option accepts."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for text in (command.help, *(parameter.help or "" for parameter in command.params)):
            for sentence in re.split(r"[.;:](?:\s|$)", text):
                assert len(sentence.split()) <= 22, f"{name}: {sentence}"
