"""`mpcompile init`: five questions, answers beforehand, `--yes`, and never a file that is replaced unasked."""

import io
from pathlib import Path

import pytest
from commandline import mpcompile, refused
from doc_pages import parse

from mpcompile.recipe.schema import Recipe, read_recipe


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> object:
    """A function that puts these lines on standard input."""

    def put(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return put


def test_five_questions_make_a_recipe(answer: object, tmp_path: Path) -> None:
    answer("vit.safetensors", "images/", "ort", "int8", "0.5")  # type: ignore[operator]
    done = mpcompile("init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "Written to recipe.yaml. Next:\nmpcompile vit.safetensors --config recipe.yaml --data images/ -o out\n"
    )
    for question in ("Model", "Images", "Target", "Precision", "Largest drop"):
        assert f"{question}" in done.stderr
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.target, recipe.precision, recipe.gates.max_drop) == ("ort", "int8", 0.5)
    assert {"mp-budget", "nm-mask", "restore", "quantize", "certify"} <= {step.name for step in recipe.passes}
    parse(done.stdout.splitlines()[1].split()[1:])


def test_enter_takes_the_defaults_and_a_wrong_answer_is_asked_again(answer: object, tmp_path: Path) -> None:
    answer("", "images", "orr", "", "int9", "", "many", "")  # type: ignore[operator]
    done = mpcompile("init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("did you mean 'ort'?", "did you mean 'int8'?", "'many' is no number of percentage points"):
        assert said in done.stderr
    by_default = mpcompile("init", "--yes", "--data", "images", "-o", "other.yaml", cwd=tmp_path)
    assert by_default.returncode == 0
    assert by_default.stderr == ""
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe == read_recipe(tmp_path / "other.yaml")
    assert recipe.gates.max_drop == 1.0


def test_without_images_no_limit_is_asked_for(answer: object, tmp_path: Path) -> None:
    answer("", "none", "", "")  # type: ignore[operator]
    done = mpcompile("init", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Largest drop" not in done.stderr
    assert read_recipe(tmp_path / "recipe.yaml").gates.max_drop is None


def test_options_answer_beforehand(answer: object, tmp_path: Path) -> None:
    answer()  # type: ignore[operator]
    words = ("m.pt", "--data", "i", "--target", "eager", "--precision", "fp32", "--max-drop", "none", "-q")
    done = mpcompile("init", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.target, recipe.gates.max_drop) == ("eager", None)


def test_a_file_is_never_replaced_unasked(answer: object, tmp_path: Path) -> None:
    """It is refused before the first question, so that no answer is lost."""
    (tmp_path / "recipe.yaml").write_text("mine")
    answer("m.pt")  # type: ignore[operator]
    said = "recipe.yaml exists and was not changed; give --force to replace it, or another file with --output"
    refused(mpcompile("init", cwd=tmp_path), 2, said)
    refused(mpcompile("init", "--yes", cwd=tmp_path), 2, said)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    done = mpcompile("init", "--yes", "--force", cwd=tmp_path)
    assert done.stdout.startswith(
        "Replaced recipe.yaml. Next:\nmpcompile model.safetensors --config recipe.yaml -o out"
    )


def test_what_cannot_be_asked_or_used_is_refused(answer: object, tmp_path: Path) -> None:
    answer()  # type: ignore[operator]
    done = mpcompile("init", cwd=tmp_path)
    assert done.returncode == 2
    assert "init got no answer; give --yes to take the defaults, or the answers as options" in done.stderr
    assert not (tmp_path / "recipe.yaml").exists()
    refused(mpcompile("init", "--yes", "--precision", "int8", cwd=tmp_path), 2, "precision int8 needs images")
    refused(mpcompile("init", "--yes", "--max-drop", "x", cwd=tmp_path), 2, "'x' is no number of percentage points")
    refused(mpcompile("init", "--yes", "--max-drop", "nan", cwd=tmp_path), 2, "is no number of percentage points")
    refused(
        mpcompile("init", "--yes", "--precision", "int9", cwd=tmp_path), 2, "precision 'int9' is unknown; give fp32"
    )


@pytest.mark.parametrize("options", [(), ("--precision", "int8"), ("--max-drop", "0.5"), ("--target", "eager")])
def test_it_computes_what_the_options_of_compile_would(tmp_path: Path, options: tuple[str, ...]) -> None:
    """`compile` writes its recipe before it looks for the model, which is not there."""
    data = ("--data", "images", *(() if "--max-drop" in options else ("--max-drop", "1")))
    mpcompile("compile", "no.pt", "--pattern", "50%", *options, *data, "--save-config", "a.yaml", cwd=tmp_path)
    mpcompile("init", "--yes", "--data", "images", *options, "-o", "b.yaml", cwd=tmp_path)
    saved, started = (read_recipe(tmp_path / name) for name in ("a.yaml", "b.yaml"))
    assert "# Runtime to build for." in (tmp_path / "a.yaml").read_text(encoding="utf-8")
    assert [step.name for step in saved.passes] == [step.name for step in started.passes]
    for named, whole in zip(saved.passes, started.passes, strict=True):
        assert {key: whole.params[key] for key in named.params} == {
            key: list(value) if isinstance(value, tuple) else value for key, value in named.params.items()
        }
    without = {"passes": ()}
    assert Recipe.model_copy(saved, update=without) == Recipe.model_copy(started, update=without)
