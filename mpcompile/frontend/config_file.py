"""The `config.json` beside a file of weights, which timm and transformers write."""

import json
from pathlib import Path
from typing import Any

from mpcompile.errors import LoadError


def config_beside(weights: Path) -> dict[str, Any] | None:
    """The object in the `config.json` beside a file of weights; None if there is none. Raises LoadError."""
    path = weights.with_name("config.json")
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not readable JSON: {error}") from error
    return config if isinstance(config, dict) else None
