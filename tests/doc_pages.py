"""What the tests of README and of docs/ read from a page: its code blocks, commands, tables and anchors."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from typer.main import get_command

from mpcompile.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a language; those without one have the language ''."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [body for of, body in blocks if of == language]


def commands(text: str) -> list[list[str]]:
    """The words of every command line that is shown, its continuations joined."""
    lines = "\n".join(fenced(text, "")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """The rows of every table, by the heads of their columns."""
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in block.splitlines()
        ]
        yield [dict(zip(head, row, strict=True)) for row in rows]


def slug(heading: str) -> str:
    """The anchor of a heading on a repository page."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def known_options() -> set[str]:
    """Every option of every command."""
    group = get_command(app)
    return {
        option
        for command in (group, *group.commands.values())  # type: ignore[attr-defined]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def parse(args: list[str]) -> None:
    """Parses a command line and runs nothing. Raises what the command would say."""
    known = get_command(app).commands  # type: ignore[attr-defined]
    verb, *rest = args if args[0] in known else ["compile", *args]
    known[verb].make_context(verb, rest).close()
