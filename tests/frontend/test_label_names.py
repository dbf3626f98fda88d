"""The names of a model's classes: timm's label_names, and id2label of a transformers config."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from mpcompile.frontend.label_names import labels_beside, labels_of


def module(**attributes: Any) -> nn.Module:
    made = nn.Identity()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_labels_that_a_module_records() -> None:
    assert labels_of(module()) == ()
    assert labels_of(module(pretrained_cfg={"label_names": ["cat", "dog"]})) == ("cat", "dog")
    assert labels_of(module(config=SimpleNamespace(id2label={1: "dog", 0: "cat"}))) == ("cat", "dog")
    assert labels_of(module(config=SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"}))) == ()


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"label_names": ["cat", "dog"]}, ("cat", "dog")),
        ({"id2label": {"1": "dog", "0": "cat"}}, ("cat", "dog")),
        ({"id2label": {"1": "dog", "2": "cat"}}, ()),
        ({"id2label": {"0": 3}}, ()),
        ({"label_names": "cat"}, ()),
        ([], ()),
        ({}, ()),
    ],
)
def test_labels_of_a_config_beside_the_weights(tmp_path: Path, config: Any, labels: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert labels_beside(tmp_path / "model.safetensors") == labels


def test_without_a_readable_config_there_are_no_labels(tmp_path: Path) -> None:
    assert labels_beside(tmp_path / "model.safetensors") == ()
    (tmp_path / "config.json").write_bytes(b"\xff{")
    assert labels_beside(tmp_path / "model.safetensors") == ()
