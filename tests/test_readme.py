"""README is short, its numbers are those of benchmarks/results, and its links, commands and code work."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from doc_pages import LINK, ROOT, commands, fenced, known_options, parse

from mpcompile.driver.run_plan import plan_of
from mpcompile.recipe.schema import Recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 170
    assert len(README.split()) <= 1800


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """README's tables and those of docs/: both are written by one command."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    try:
        for path, text in tables.written().items():
            assert path.read_text(encoding="utf-8") == text, f"{path.name} is outdated: run benchmarks/tables.py"
    finally:
        sys.modules.pop("tables")


def test_recipes_shown_are_recipes() -> None:
    for text in fenced(README, "yaml"):
        assert plan_of(Recipe.from_yaml(text)).passes


def test_options_shown_exist() -> None:
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert shown <= known_options(), shown - known_options()


def test_commands_shown_are_understood() -> None:
    verbs = []
    for program, *args in commands(README):
        if program == "mpcompile":
            parse(args)
            verbs.append(args[0])
        else:
            assert program == "make", program
            assert re.search(rf"^{shlex.quote(args[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"analyze", "bench"} < set(verbs)


def test_python_shown_runs_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = fenced(README, "python")
    values: dict[str, object] = {"__name__": "shown"}
    exec(compile(block, "README.md", "exec"), values)
    assert values["logits"].shape == (1, 1000)  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "report.html").is_file()


def test_files_linked_exist() -> None:
    for link in LINK.findall(README):
        target = link.partition("#")[0]
        assert (ROOT / target).exists(), target
