"""README holds no number that is not in a file under benchmarks/results, and shows no command that fails."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from mpcompile.cli.app import app
from mpcompile.driver.run_plan import plan_of
from mpcompile.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    assert readme.filled(README) == README, "README.md is older than benchmarks/results: run benchmarks/readme.py"
    sys.modules.pop("readme")


def test_the_recipe_shown_is_a_recipe() -> None:
    [text] = re.findall(r"^```yaml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert plan_of(Recipe.from_yaml(text)).passes


def known_options() -> set[str]:
    """Every option of every command."""
    from typer.main import get_command

    return {
        option
        for command in get_command(app).commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_the_options_shown_exist() -> None:
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert shown <= known_options(), shown - known_options()


def test_files_and_links_shown_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for words in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{shlex.quote(words)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
