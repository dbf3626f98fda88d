"""Heads: the accuracy of outputs and labels that are known by construction, or a note, or an error in words."""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_accuracy import reported, require_right
from mutations import answer, share
from numpy.typing import NDArray
from torch import Tensor, nn

from mpcompile.driver.inputs import data_for
from mpcompile.errors import MpcompileError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.recipe.schema import DataChoice
from mpcompile.testing import tiny_source

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used

SCALE = 6.0  # logits lie between -SCALE and SCALE
ENDS = ("logits", "sigmoid", "module", "softmax", "complement", "scaled")
KINDS = ("softmax", "sigmoid", "multilabel", "ordinal")
TOLD = ("--head", "the dense model", "cannot be right")  # in notes on the head, and on decisions that cannot be right


class Written(nn.Module):
    """Its logits are written in the first pixels of the image."""

    def __init__(self, outputs: int, end: str) -> None:
        super().__init__()
        self.hidden, self.head, self.end = nn.Linear(64, 16, bias=False), nn.Linear(16, outputs), end
        self.sigmoid = nn.Sigmoid()
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(16, 64))
            self.head.weight.copy_(SCALE * torch.eye(outputs, 16))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(self.hidden(x.flatten(1)))
        if self.end == "sigmoid":
            return torch.sigmoid(z)
        if self.end == "module":
            return self.sigmoid(z)  # type: ignore[no-any-return]
        if self.end == "softmax":
            return z.softmax(1)  # type: ignore[no-any-return]
        if self.end == "complement":
            return 1 - torch.sigmoid(-z)
        return z * 2.0 if self.end == "scaled" else z  # type: ignore[no-any-return]


@cache
def model(outputs: int, end: str) -> Model:
    return capture(Written(outputs, end), tiny_source())


def pixels_of(logits: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Images (n, 8, 8) in which `Written` reads these logits (n, outputs), rounded to a pixel's 256 values."""
    images = np.full((len(logits), 64), 128, np.uint8)
    # The source of the tests has mean and deviation 0.5.
    images[:, : logits.shape[1]] = np.clip((logits / SCALE + 1) / 2 * 255, 0, 255).round()
    return images.reshape(-1, 8, 8)


def logits_of(
    kind: str, decisions: NDArray[np.int64], outputs: int, threshold: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Logits (n, outputs) of these decisions (n,), or (n, outputs) for several labels, at a threshold on the logit."""
    count, away = len(decisions), 0.3 + rng.random((len(decisions), outputs))
    if kind == "softmax":
        chosen = np.eye(outputs, dtype=bool)[decisions]
        return np.where(chosen, 3 + away, -away)
    above = decisions[:, None] > np.arange(outputs) if kind == "ordinal" else decisions.reshape(count, outputs) > 0
    return threshold + np.where(above, away, -away)


def labels_of(decisions: NDArray[np.int64], classes: int, wrong: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Labels that differ from the decisions in about this share of the images."""
    flipped = rng.random(decisions.shape) < wrong
    return np.where(flipped, (decisions + rng.integers(1, classes, decisions.shape)) % classes, decisions)


@dataclass(frozen=True)
class Case:
    """A kind of head, its outputs, the end of the model, the threshold, the value of --head, and what is wrong."""

    kind: str
    outputs: int
    end: str
    probability: float
    option: str
    wrong: float
    seed: int

    @property
    def right_option(self) -> str:
        return self.kind if self.probability == 0.5 else f"{self.kind}:{self.probability}"

    def arrays(self) -> tuple[dict[str, Any], float]:
        """The images and labels, and the accuracy on those that are held out."""
        rng = np.random.default_rng(self.seed)
        threshold = math.log(self.probability / (1 - self.probability)) / (2 if self.end == "scaled" else 1)
        classes = {"softmax": self.outputs, "ordinal": self.outputs + 1}.get(self.kind, 2)
        arrays: dict[str, Any] = {}
        known = 0.0
        for split, count in (("calibration", 24), ("heldout", 60)):
            decisions = rng.integers(0, classes, (count, self.outputs) if self.kind == "multilabel" else (count,))
            labels = labels_of(decisions, classes, self.wrong, rng)
            known = float((labels == decisions).reshape(count, -1).all(1).mean())
            arrays[f"{split}_images"] = pixels_of(logits_of(self.kind, decisions, self.outputs, threshold, rng))
            arrays[f"{split}_labels"] = labels
        return arrays, known


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(KINDS))
    case = Case(
        kind=kind,
        outputs=1 if kind == "sigmoid" else draw(st.integers(2, 6)),
        end=draw(st.sampled_from([end for end in ENDS if end != "softmax" or kind == "softmax"])),
        probability=0.5 if kind == "softmax" else draw(st.sampled_from([0.5, 0.5, 0.3, 0.8])),
        option="",
        wrong=draw(st.sampled_from([0.0, 0.1, 0.3])),
        seed=draw(st.integers(0, 10_000)),
    )
    option = draw(st.sampled_from([case.right_option, case.right_option, "auto", *KINDS]))
    return replace(case, option=option)


@share(80, 4000)
@given(cases())
def test_accuracy_is_that_of_the_decision(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "fuzz-heads.npz"
    arrays, known = case.arrays()
    with path.open("wb") as file:
        np.savez(file, **arrays)
    dense = model(case.outputs, case.end)
    found = answer(lambda: reported(dense, data_for(path, dense, DataChoice(), case.option), case.option))
    default = case.probability == 0.5 and case.kind in ("softmax", "sigmoid")
    right = case.option == case.right_option or (case.option == "auto" and default)
    if isinstance(found, MpcompileError):
        assert not right, found
        return
    comparison, notes = found
    assert comparison.dense is not None or not right, notes
    require_right(comparison, notes, known, () if right else TOLD)
