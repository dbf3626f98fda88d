"""A recipe with a comment on every key: it reads back as the same recipe, and its comments are those of the schema."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from mpcompile.driver.commented_recipe import commented
from mpcompile.driver.pass_descriptions import parameters_of, summary_of
from mpcompile.driver.run_plan import known, plan_of, recipe_schema, step_of
from mpcompile.driver.starter_recipe import Answers, next_command, starter_recipe, starter_yaml, write_starter
from mpcompile.errors import UsageError
from mpcompile.passes import PASSES
from mpcompile.recipe.schema import Recipe

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
ODD = [
    "a: b", "null", "true", "2:4", "010", "# no comment", "- x", "", " ", "\n", "a\nb: c\n", "'", '"', "é", "\\",
    "\x1b", "{a: 1}", "[1]", "*x", "&x", "!!int 3", "%", "@", "`", "~", ".inf", "1e5", "x" * 300,
]  # fmt: skip


def everything() -> Recipe:
    """A recipe that names every pass with every parameter."""
    return Recipe.checked({"passes": [{name: step_of(kind()).params} for name, kind in PASSES.items()]})


def comments_above(text: str, line: str) -> str:
    """The comment right above the first line that begins so, as one text."""
    lines = text.splitlines()
    place = next(n for n, each in enumerate(lines) if each.startswith(line))
    above: list[str] = []
    while lines[place - 1 - len(above)].strip().startswith("#"):
        above.insert(0, lines[place - 1 - len(above)].strip().removeprefix("#").strip())
    return " ".join(above)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_recipes_read_back_as_the_same(path: Path) -> None:
    recipe = Recipe.from_yaml(path.read_text(encoding="utf-8"))
    again = Recipe.from_yaml(commented(recipe, "A title."))
    assert (again, again.sha256) == (recipe, recipe.sha256)


def test_a_recipe_of_every_pass_reads_back_as_the_same() -> None:
    recipe = everything()
    again = Recipe.from_yaml(commented(recipe))
    assert (again, again.sha256) == (recipe, recipe.sha256)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_read_back_as_the_same(text: str) -> None:
    names = [text or "x", [text, {text: [text]}]]
    content: dict[str, Any] = {"passes": [{text or "x": {text: names, "null": text}}], "submodule": text or None}
    recipe = Recipe.checked(content)
    assert Recipe.from_yaml(commented(recipe)) == recipe


def test_every_key_and_every_parameter_has_its_comment() -> None:
    """A new key or parameter needs a description: of the field, or in the docstring of the pass."""
    text = commented(everything())
    lines = text.splitlines()
    keys = [n for n, line in enumerate(lines) if re.match(r" *(- )?[\w'-]+:", line) or re.match(r" *- [\w-]+$", line)]
    assert len(keys) > 100
    for n in keys:
        assert lines[n - 1].strip().startswith("# "), lines[n]
    assert all(len(line) <= 100 for line in lines if line.strip().startswith("#"))


def test_comments_are_the_descriptions_of_the_schema() -> None:
    schema, text = recipe_schema(known()), commented(everything())
    for key, about in schema["properties"].items():
        assert comments_above(text, f"{key}:").startswith(about["description"]), key
    for key, about in schema["$defs"]["DataChoice"]["properties"].items():
        assert comments_above(text[text.index("\ndata:") :], f"  {key}:").startswith(about["description"]), key
    assert comments_above(text, "  exif:").endswith("Values: apply, ignore.")
    assert "Values" not in comments_above(text, "head:")  # its description names them


def test_every_parameter_is_described_in_the_docstring_of_its_pass() -> None:
    for name, kind in PASSES.items():
        fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        found = parameters_of(kind)
        assert sorted(found) == sorted(fields), name
        assert summary_of(kind), name
        for parameter, text in found.items():
            assert re.fullmatch(r"[A-Zαλ].*\.", text), (name, parameter, text)
            assert ".py" not in text, (name, parameter)
            assert "None" not in text, (name, parameter)  # in a recipe it is null


def test_passes_of_other_packages_have_no_comment_and_are_kept() -> None:
    recipe = Recipe.checked({"passes": [{"outlier-scale": {"deviations": 4.0}}, "certify"]})
    assert Recipe.from_yaml(commented(recipe)) == recipe


@pytest.mark.parametrize(
    "answers",
    [
        Answers("m.pt"),
        Answers("m.pt", "images/", max_drop=0.5),
        Answers("m.pt", "images/", precision="int8"),
        Answers("m.pt", "images/", target="eager"),
    ],
    ids=str,
)
def test_the_starter_recipe_names_every_default_and_computes_the_same(answers: Answers) -> None:
    recipe = starter_recipe(answers)
    read = Recipe.from_yaml(starter_yaml(recipe, answers))
    assert read == recipe
    plan = plan_of(read)
    for step, built in zip(read.passes, plan.passes, strict=True):
        assert set(step.params) == {field.name for field in dataclasses.fields(type(built))}  # type: ignore[arg-type]
        assert step_of(built) == step  # it changes nothing to leave the defaults in
    assert plan.recipe == read


def test_answers_that_do_not_fit_are_refused() -> None:
    for answers, said in (
        (Answers("m", max_drop=0.5), "needs labelled images; give --data, or no --max-drop"),
        (Answers("m", precision="int8"), "precision int8 needs images"),
        (Answers("m", "d", target="nowhere"), "target 'nowhere' is unknown"),
        (Answers("m", "d", target="eager", precision="int8"), "target eager"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            starter_recipe(answers)


def test_a_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    answers, path = Answers("m.pt"), tmp_path / "recipe.yaml"
    recipe = starter_recipe(answers)
    assert not write_starter(recipe, answers, path, force=False)
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"recipe\.yaml exists and was not changed; give --force to replace it"):
        write_starter(recipe, answers, path, force=False)
    assert path.read_text() == "mine"
    assert write_starter(recipe, answers, path, force=True)
    assert Recipe.from_yaml(path.read_text(encoding="utf-8")) == recipe
    with pytest.raises(UsageError, match="is a folder; give a file"):
        write_starter(recipe, answers, tmp_path, force=True)
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        write_starter(recipe, answers, tmp_path / "no" / "recipe.yaml", force=False)


def test_the_next_command_is_quoted_for_a_shell() -> None:
    found = next_command(Answers("my model.pt", "my images"), Path("my recipe.yaml"))
    assert found == "mpcompile 'my model.pt' --config 'my recipe.yaml' --data 'my images' -o out"
