"""The SHA-256 of the report's own files, in `report.sha256`: the report lists the hashes of all other files only.

The file has the format of the command sha256sum, so that `sha256sum -c report.sha256` checks it too. It shows that a
report was edited or damaged. It does not show who wrote the report: whoever edits the report can write this file anew.
"""

from collections.abc import Sequence
from pathlib import Path

from mpcompile.errors import LoadError
from mpcompile.system.hashing import file_sha256

HASHES = "report.sha256"
PROTECTED = ("report.json", "report.md", "report.html")
LARGEST_BYTES = 4096  # three lines have fewer than 300


def write_hashes(folder: Path) -> None:
    """Writes the hashes of the report's files in a folder."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in PROTECTED]
    (folder / HASHES).write_text("".join(lines), encoding="utf-8")


def is_protected(folder: Path) -> bool:
    """Whether a folder has hashes of the report's files. Version 0.1 wrote none."""
    return (folder / HASHES).is_file()


def require_unchanged(folder: Path, names: Sequence[str] = PROTECTED) -> None:
    """Raises LoadError if one of these files differs from its hash. Does nothing if the folder has no hashes."""
    if not is_protected(folder):
        return
    path = folder / HASHES
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    hashes = {name: value for value, _, name in (line.partition("  ") for line in text.splitlines())}
    if missing := [name for name in PROTECTED if name not in hashes]:
        raise LoadError(f"{path} was changed: it has no SHA-256 of {', '.join(missing)}; compile again")
    for name in names:
        if not (folder / name).is_file():
            raise LoadError(f"{folder / name} is missing")
        if file_sha256(folder / name) != hashes[name]:
            raise LoadError(
                f"{folder / name} was changed: its SHA-256 differs from the one in {HASHES}; its numbers are not those "
                "that were measured, so compile again"
            )
