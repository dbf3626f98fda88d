"""The accuracy that a checkpoint records: in percent or as a share, from the keys of common training scripts."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcompile.frontend.claimed_accuracy import claimed_accuracy
from mpcompile.frontend.load_model import Request, load


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"best_acc1": torch.tensor(76.13)}, 0.7613),
        ({"acc": 93.02}, 0.9302),
        ({"val_acc": 0.881}, 0.881),
        ({"metric": 81.2, "args": argparse.Namespace(eval_metric="top1")}, 0.812),
        ({"metric": 81.2, "args": {"eval_metric": "loss"}}, None),
        ({"metric": 0.3}, None),
        ({"acc": True, "accuracy": "high", "top1": torch.zeros(2), "acc1": -1, "best_acc": 250}, None),
        ({}, None),
    ],
)
def test_the_recorded_accuracy(content: dict[str, Any], expected: float | None) -> None:
    found = claimed_accuracy(content)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_checkpoint_is_loaded_with_its_claim(tmp_path: Path) -> None:
    from mpcompile.testing import TinyMLP

    torch.save({"state_dict": TinyMLP().state_dict(), "best_acc1": 88.0}, tmp_path / "a.pt")
    request = Request(
        str(tmp_path / "a.pt"), arch="mpcompile.testing:TinyMLP", input_size=(1, 8, 8), mean=(0.5,), std=(0.5,)
    )
    assert load(request).claimed == pytest.approx(0.88)
