"""`mpcompile init`: asks five questions and writes a recipe; `--yes` takes the defaults instead of asking."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from mpcompile.cli.app import Command, app, epilog_of
from mpcompile.cli.choices import PRECISIONS, TARGETS, completion, listed
from mpcompile.cli.options import QuietOption
from mpcompile.errors import UsageError, did_you_mean

MODEL, TARGET, PRECISION, DROP = "model.safetensors", "ort", "fp32", 1.0  # the defaults
Answer = TypeVar("Answer")


@app.command("init", cls=Command, epilog=epilog_of("init"))
def init_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=f"Model to compress. [default: {MODEL}]", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")] = Path(
        "recipe.yaml"
    ),
    data: Annotated[
        str | None, typer.Option("--data", help="Images, as `compile` takes them. [default: none]", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help=f"Runtime: {listed(TARGETS)}. [default: {TARGET}]", autocompletion=completion(TARGETS)),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"Precision: {listed(PRECISIONS)}. [default: {PRECISION}]", autocompletion=completion(PRECISIONS)
        ),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            "--max-drop",
            metavar="POINTS",
            help=f"Largest drop of top-1 in percentage points, or none. [default: {DROP:g} with --data, else none]",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take the default of what is not given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Ask five questions and write a recipe with every default and a comment on each. It is never needed.

    Options answer questions beforehand.
    """
    from mpcompile.driver.starter_recipe import Answers, next_command, require_free, starter_recipe, write_starter

    require_free(output, force)
    ask = not yes
    model = model or _answer(ask, "Model: a file, a folder or a name", MODEL, str)
    if data is None and ask:
        data = _answer(ask, "Images: a folder or an .npz file, or none", "none", str)
    data = None if data == "none" else data
    target = _given(target, _target) or _answer(ask, f"Target: {listed(TARGETS)}", TARGET, _target)
    question = f"Precision: {listed(PRECISIONS)}; int8 and fp8 need images"
    precision = _given(precision, _precision) or _answer(ask, question, PRECISION, _precision)
    drop = _given(max_drop, _points)
    if max_drop is None and data is not None:
        drop = _answer(ask, "Largest drop of top-1 in percentage points, or none", f"{DROP:g}", _points)
    answers = Answers(model, data, target, precision, drop)
    replaced = write_starter(starter_recipe(answers), answers, output, force)
    if not quiet:
        typer.echo(f"{'Replaced' if replaced else 'Written to'} {output}. Next:\n{next_command(answers, output)}")


def _given(text: str | None, read: Callable[[str], Answer]) -> Answer | None:
    """The value of an option; None if it is not given. Raises UsageError."""
    return None if text is None else read(text)


def _answer(ask: bool, question: str, default: str, read: Callable[[str], Answer]) -> Answer:
    """The answer to a question on standard error, asked again until it is valid; the default if nothing is asked.

    Raises UsageError if standard input ends.
    """
    if not ask:
        return read(default)
    while True:
        typer.echo(f"{question} [{default}]: ", err=True, nl=False)
        try:
            text = input().strip()
        except EOFError as error:
            raise UsageError(
                "init got no answer; give --yes to take the defaults, or the answers as options"
            ) from error
        try:
            return read(text or default)
        except UsageError as error:
            typer.echo(f"{error}", err=True)


def _target(text: str) -> str:
    """A target. Raises UsageError."""
    from mpcompile.driver.run_plan import runtime_named

    return runtime_named(text).name


def _precision(text: str) -> str:
    """A precision. Raises UsageError."""
    if text not in PRECISIONS:
        raise UsageError(f"precision {text!r} is unknown; give {listed(PRECISIONS)}{did_you_mean(text, PRECISIONS)}")
    return text


def _points(text: str) -> float | None:
    """Percentage points, or None for `none`. Raises UsageError."""
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise UsageError(f"{text!r} is no number of percentage points; give for example 0.5, or none")
    return value
