"""Recipes gone wrong: each is followed or refused in a line, and what is read is written back as the same."""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import DOCUMENTED, altered, answer, damaged, deep, odd, share, values

from mpcompile.cli import main, parse
from mpcompile.driver.commented_recipe import commented
from mpcompile.driver.compile import stages
from mpcompile.driver.run_plan import PASSES, build_pass, plan_of
from mpcompile.errors import MpcompileError, UsageError, one_line
from mpcompile.ir.pattern import NM
from mpcompile.passes.tome.schedule import parse_schedule
from mpcompile.recipe.schema import Recipe, read_recipe

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used

WHOLE = """
schema_version: 1
passes:
  - mp-budget: {patterns: [2:4, 8:16x2], macs: 0.7, signal: mp, exclude: ["blocks.0.*"], 'null': true, level: 0.05}
  - permute: {score: activation, sweeps: 2, strict: true}
  - nm-mask: {criterion: joint, refit: model, damping: 0.02}
  - tome: {r: 8}
  - batch-norm
  - restore: {max_drop: 1.0, patterns: [8:16]}
  - distill: {epochs: 3, batch: 64, rate: 1.0e-4, policy: null}
  - certify: {confidence: 0.9}
target: ort
precision: fp16
batch: 8
opset: 20
data: {calibration: 64, validation: 8, held_out: 100, seed: 3}
bench: {batches: [1, 8], seconds: 0.5, threads: 2}
gates: {max_drop: 1.0, engine: false}
tune: {evaluations: 4}
"""
CONTENT: dict[str, Any] = Recipe.from_yaml(WHOLE).model_dump(mode="json")
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {k: v}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}], {b}: 1}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
SNIPPETS = (
    BOMB, MERGED, "passes: &p [*p]\n", "a: &a {b: *a}\n", "? [1]\n: 2\n", "? {a: b}\n: 2\n", "x: " + "9" * 5000 + "\n",
    "x: 2020-99-99\n", "x: !!int ''\n", "x: !!float abc\n", "x: !!bool maybe\n", "x: !!binary '***'\n",
    "x: !!set {a, b}\n",
    "x: !!omap [a: 1]\n", "x: !!python/object/apply:os.system ['touch canary']\n", "x: !!timestamp soon\n", "!!map x\n",
    "batch: 0x7f\n", "batch: 1_000\n", "batch: .inf\n", "batch: 190:20:30\n", "<<: 3\n", "<<: {batch: 2}\n", "---\n",
    "--- a\n", "...\n",
    "%YAML 9.9\n---\n", "\t", "'", '"\\ud800"\n', '"\\x1b": "\\x07"\n', "\ufeff", "\x85", "\u2028",
    "passes: [tome: {r: 1}, tome]\n",
    deep("[", "]", 3000), deep("{a: ", "}", 1000), "- " * 3000, "? " * 3000, "passes: [" + "nm-mask, " * 3000 + "]\n",
    "passes: [{nm-mask: {exclude: [" + "x, " * 20_000 + "]}}]\n",
    "passes:\n" + "".join(f"  k{i}: 1\n" for i in range(5000)),
)  # fmt: skip


def followed(text: str) -> None:
    """The recipe read, written, read again as the same, and its passes built."""
    recipe = Recipe.from_yaml(text)
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again.to_yaml() == recipe.to_yaml()
    assert again.sha256 == recipe.sha256
    assert Recipe.from_yaml(commented(recipe)).sha256 == recipe.sha256
    assert len(stages(recipe)) == len(recipe.passes) + 8 + (recipe.tune is not None)
    plan_of(recipe)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """The recipe with pieces of YAML put in, doubled, cut or damaged."""
    lines = WHOLE.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(lines)))
        how = draw(st.integers(0, 3))
        if how == 0:
            lines.insert(place, draw(st.sampled_from(SNIPPETS)))
        elif how == 1:
            lines = lines[:place]
        elif how == 2:
            lines.insert(place, draw(st.sampled_from(lines or ["x"])))
        else:
            return draw(damaged("".join(lines).encode("utf-8"))).decode("utf-8", errors="replace")
    return "".join(lines)


@share(150, 3000)
@given(texts())
def test_text(text: str) -> None:
    answer(lambda: followed(text))


@pytest.mark.parametrize("text", SNIPPETS)
def test_snippets_alone(text: str) -> None:
    answer(lambda: followed(text))


@share(150, 3000)
@given(altered(CONTENT))
def test_content(content: Any) -> None:
    answer(lambda: followed(yaml.safe_dump(content, allow_unicode=True)))
    if isinstance(content, dict):
        answer(lambda: plan_of(Recipe.checked(content)))


@share(100, 2000)
@given(st.sampled_from(sorted(PASSES)), st.data())
def test_parameters_of_a_pass(name: str, data: st.DataObject) -> None:
    fields = sorted(PASSES[name].__dataclass_fields__)  # type: ignore[attr-defined]
    params = data.draw(
        st.dictionaries(st.sampled_from(fields or ["none"]) | st.text(max_size=4), odd | values, max_size=3)
    )

    def built() -> None:
        recipe = Recipe.checked({"passes": [{name: params}]})
        build_pass(recipe.passes[0])

    answer(built)


@share(10, 500)
@given(
    texts().filter(lambda text: "distill" not in text) | altered({**CONTENT, "passes": ["nm-mask"]}).map(yaml.safe_dump)
)
def test_command_line(text: str) -> None:
    code, out, err = run("mpcompile.testing:TinyMLP", "--dry-run", "--json", recipe=text)
    assert code == 0 or (code in DOCUMENTED and out == ""), err
    if code:
        assert err.count("\n") == 1
        assert err[:-1].isprintable()


def run(*words: str, recipe: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line on a tiny model, in this process."""
    import contextlib
    import io
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8", errors="surrogateescape")
        argv, sys.argv = (
            sys.argv,
            ["mpcompile", *words, "--config", str(path), "--input-size", "1x8x8", "--mean", "0.5", "--std", "0.5"],
        )
        before = signal.getsignal(signal.SIGTERM)
        logger = logging.getLogger("mpcompile")
        handlers, level = list(logger.handlers), logger.level
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
        finally:
            sys.argv = argv
            signal.signal(signal.SIGTERM, before)
            logger.handlers[:] = handlers
            logger.setLevel(level)
        assert [each.name for each in Path(folder).iterdir()] == ["recipe.yaml"]
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "call",
    [
        lambda: NM.parse("9" * 5000 + ":4"),
        lambda: parse.batches("9" * 5000),
        lambda: parse.size(f"1x8x{'9' * 5000}"),
        lambda: parse.patterns("auto:" + "9" * 5000, "ort", 0.5),
        lambda: parse_schedule(10**400, 3),
    ],
)
def test_numbers_that_no_integer_is_read_from(call: Callable[[], Any]) -> None:
    assert isinstance(answer(call), UsageError)


def test_control_characters_do_not_reach_the_terminal() -> None:
    error = answer(lambda: followed('"\\x1b[31m\\a\\u202e": 1\n'))
    assert isinstance(error, UsageError)
    assert "\\x1b[31m\\x07\\u202e: Extra inputs are not permitted" in one_line(error)
    assert len(one_line(ValueError("x" * 10**6))) < 1100


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        tmp_path,
        tmp_path / "fifo",
        tmp_path / "dangling",
        tmp_path / "loop",
        Path("/dev/zero"),
        Path("x" * 5000),
        Path("a\0b"),
    ):
        found = answer(lambda path=path: read_recipe(path))  # type: ignore[misc]
        assert isinstance(found, MpcompileError)
