"""Values for shell completion that are read from files: architectures of timm, and layers of an output folder.

Completion must answer at once, so timm is not imported: its source files are searched for the names that it registers.
"""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REGISTERED = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)


def architectures(incomplete: str) -> list[str]:
    """The names of timm's architectures that begin with the typed text, sorted; empty if timm is not installed."""
    return sorted(name for name in _registered() if name.startswith(incomplete))


def _registered() -> Iterator[str]:
    found = find_spec("timm")  # does not import it
    for folder in (found.submodule_search_locations or ()) if found else ():
        for path in (Path(folder) / "models").glob("*.py"):
            yield from REGISTERED.findall(path.read_text(encoding="utf-8"))


def layers(ctx: Any, incomplete: str) -> list[str]:
    """The layers in the report of the folder that was typed; empty if there is none."""
    try:
        content = json.loads((Path(ctx.params["folder"]) / "report.json").read_text(encoding="utf-8"))
        names = [str(row["name"]) for row in content["layers"]]
    except (KeyError, TypeError, OSError, ValueError):  # a completion says nothing rather than fail
        return []
    return [name for name in names if name.startswith(incomplete)]
