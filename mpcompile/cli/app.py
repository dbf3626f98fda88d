"""The Typer application that the commands register with, and the options of `mpcompile` itself."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mpcompile.cli.help_groups import examples, write_commands, write_options
from mpcompile.errors import UsageError, did_you_mean

EXIT_CODES = """
Exit codes: 0 done; 2 wrong usage or recipe; 3 model or images could not be loaded, or the model not captured;
4 a pass failed; 5 outputs differ or a mask is violated; 6 an accuracy gate failed (the folder is written), or a
condition of `compare --fail-if` is true; 7 a runtime is missing or could not build; 1 disk or memory ran out, or an
unexpected error; 130 stopped by Ctrl-C, 143 by SIGTERM (finished passes are kept, and the same command resumes).
"""


def _with_short_help(items: list[Any]) -> list[Any]:
    """The completion items with their help cut to one line.

    Typer wraps longer texts, and fish takes each line as an item of its own.
    """
    for item in items:
        item.help = item.help and textwrap.shorten(item.help.partition(". ")[0], 75, placeholder=" …")
    return items


def epilog_of(command: str, codes: bool = False) -> str:
    """The end of a command's help: its examples, and with `codes` the exit codes."""
    return f"{examples(command)}\n\n{EXIT_CODES.strip()}" if codes else examples(command)


def stopped_text(by: str, error: BaseException) -> str:
    """The line that tells a user what a stopped run has kept; the notes of the error say where."""
    notes = getattr(error, "__notes__", None)
    kept = "; ".join(notes) if notes else "nothing was written, and no pass had finished; the same command starts anew"
    return f"stopped by {by}: {kept}"


class Command(TyperCommand):
    """A command whose help has its options in sections, and whose options complete with a one-line help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options to the help text, in the sections of help_groups.py."""
        write_options(ctx, self.get_params(ctx), formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The options that begin with the typed text."""
        return _with_short_help(super().shell_complete(ctx, incomplete))


class CompileByDefault(TyperGroup):
    """A command group whose default command is `compile`: `mpcompile MODEL` means `mpcompile compile MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Inserts `compile` if the first word is neither a command nor an option of `mpcompile` itself."""
        if args and args[0] not in self.commands and not set("-./:") & set(args[0]):
            near = did_you_mean(args[0], self.commands)
            if near and not Path(args[0]).exists():
                raise UsageError(f"{args[0]!r} is neither a command nor a file{near}")
        own_options = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own_options:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; after Ctrl-C says what is kept, and exits with 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo(f"mpcompile: {stopped_text('Ctrl-C', error)}", err=True)
            raise typer.Exit(130) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands to the help text, in the sections of help_groups.py."""
        write_commands(self.commands, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The commands, and the options of `mpcompile` and of `compile`, that begin with the typed text."""
        compile_ctx = self.commands["compile"].make_context("compile", [], parent=ctx, resilient_parsing=True)
        items = _with_short_help(super().shell_complete(ctx, incomplete))
        known = {item.value for item in items}  # both have --help
        of_compile = compile_ctx.command.shell_complete(compile_ctx, incomplete)
        return [*items, *(item for item in of_compile if item.value not in known)]


app = typer.Typer(
    cls=CompileByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Compress a trained PyTorch vision model to N:M sparsity, ship it as ONNX, and show the evidence.\n\n"
    "`mpcompile MODEL --pattern 2:4 -o OUT` is short for `mpcompile compile MODEL …`.",
    epilog=EXIT_CODES,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("mpcompile"))
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `mpcompile` itself."""
