"""The Typer application that the commands register with, and the options of the whole command."""

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

EXIT_CODES = """
Exit codes: 0 done; 2 wrong usage or recipe; 3 model or images could not be loaded, or the model not captured;
4 a pass failed; 5 outputs differ or a mask is violated; 6 an accuracy gate failed (the folder is written);
7 a runtime is missing or could not build; 1 the disk or the memory did not suffice, or anything else.
"""


class CompileByDefault(TyperGroup):
    """`mpcompile MODEL …` is `mpcompile compile MODEL …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the verb in where the first word is neither a verb nor an option of the whole."""
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=CompileByDefault,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Compress a trained PyTorch vision model to N:M sparsity, ship it as ONNX, and show the evidence.\n\n"
    "`mpcompile MODEL --pattern 2:4 -o OUT` is short for `mpcompile compile MODEL …`.",
    epilog=EXIT_CODES,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(version("mpcompile"))
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the whole command."""
