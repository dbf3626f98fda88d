"""The names of a model's classes, as timm or transformers records them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers writes if nobody named the classes


def labels_of(module: nn.Module) -> tuple[Any, ...]:
    """The labels in the order of the outputs: timm's `label_names`, or `id2label` of a transformers config; else ()."""
    recorded = getattr(module, "pretrained_cfg", None)
    named = recorded.get("label_names") if isinstance(recorded, Mapping) else None
    return tuple(named or ()) or _ordered(getattr(getattr(module, "config", None), "id2label", None))


def labels_beside(weights: Path) -> tuple[str, ...]:
    """The labels that a `config.json` beside a file of weights gives at its top level; () if it gives none."""
    try:
        config = json.loads(weights.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ()
    if not isinstance(config, dict):
        return ()
    named = config.get("label_names")
    if isinstance(named, list) and named and all(isinstance(label, str) for label in named):
        return tuple(named)
    return _ordered(config.get("id2label"))


def _ordered(id2label: object) -> tuple[str, ...]:
    """The labels of a mapping from each index, a number or its text, to a label; () if it is not such a mapping."""
    if not isinstance(id2label, Mapping) or not id2label:
        return ()
    by_index = {str(index): label for index, label in id2label.items()}
    labels = [by_index.get(str(index)) for index in range(len(by_index))]
    if not all(isinstance(label, str) for label in labels) or all(PLACEHOLDER.fullmatch(str(one)) for one in labels):
        return ()
    return tuple(map(str, labels))
