"""A pseudo-terminal as standard error, and what a person then sees on it."""

import contextlib
import os
import pty
import re
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

COLUMNS = 100
# A control sequence, or one character.
TOKEN = re.compile(r"\x1b\[(?P<number>[?0-9;]*)(?P<kind>[A-Za-z])|(?P<character>.)", re.DOTALL)


@dataclass
class Terminal:
    """What was written, as bytes, until now."""

    written: bytearray = field(default_factory=bytearray)

    def screen(self) -> list[str]:
        """The lines that are visible, without those that are empty."""
        return [line for line in lines_of(self.written.decode()) if line]


def lines_of(text: str) -> list[str]:
    """The lines on a terminal after a text with the control sequences that rich writes. Raises on any other."""
    lines, row, column = [""], 0, 0
    for token in TOKEN.finditer(text):
        character, kind, number = token["character"], token["kind"], token["number"]
        if kind == "A":
            row = max(0, row - int(number or 1))
        elif kind == "K":
            assert number == "2", token
            lines[row] = ""
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character is not None:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        else:
            assert kind in "mhl", token  # colours, and the cursor hidden and shown
    return [line.rstrip() for line in lines]


@contextlib.contextmanager
def terminal(patched: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Standard error is a terminal within the block."""
    patched.setenv("TERM", "xterm-256color")
    patched.setenv("COLUMNS", str(COLUMNS))
    patched.setenv("LINES", "40")
    found, (master, slave) = Terminal(), pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST  # bytes arrive as they are written
    termios.tcsetattr(slave, termios.TCSANOW, attributes)

    def read() -> None:
        with contextlib.suppress(OSError):  # the last writer closed it
            while part := os.read(master, 65536):
                found.written.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream, contextlib.redirect_stderr(stream):
        yield found
    reader.join()
    os.close(master)
