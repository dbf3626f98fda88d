"""The descriptions of passes and of their parameters, from the docstrings of their classes."""

import inspect
import re
from typing import Any

ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")
# Remarks for readers of the code, not of a recipe: a path in brackets, and the name of a table.
FOR_THE_CODE = re.compile(r" \([\w/]+\.py\)|, a name in [A-Z]+(?=[.:,])")


def summary_of(kind: type[Any]) -> str:
    """The first line of a class's docstring; empty if it has none."""
    return ((kind.__doc__ or "").strip().splitlines() or [""])[0]


def parameters_of(kind: type[Any]) -> dict[str, str]:
    """The description of each parameter in the section Args of a class's docstring, as sentences."""
    lines = (inspect.getdoc(kind) or "").splitlines()
    if "Args:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break  # the next section
        entry = ENTRY.fullmatch(line.strip()) if re.match(r" {4}\S", line) else None
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return {name: _sentence(text) for name, text in found.items()}


def _sentence(text: str) -> str:
    """A description without remarks for readers of the code, from a capital letter to a period."""
    plain = FOR_THE_CODE.sub("", text).replace("None:", "null:").replace("If None,", "If null,")
    plain = plain.replace("; None ", "; null ").replace("f False", "f false").strip()
    first = plain[:1].upper() if plain[:1].isascii() else plain[:1]  # α and λ are names
    return f"{first}{plain[1:]}{'' if plain.endswith('.') else '.'}"
