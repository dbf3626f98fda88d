"""Outputs that are values without a decision, from images to report: maps, embeddings, and what is refused for them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile.analysis.output_head import with_head
from mpcompile.data.images import Data
from mpcompile.errors import UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.head import Head
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import tiny_data, tiny_mlp, tiny_source

DECISION_WORDS = re.compile(r"same answer|prediction|agree|logit|top-1", re.IGNORECASE)


class Mapped(nn.Module):
    """A convolution net whose output is a map of 3 channels, alone or under a name in a dict."""

    def __init__(self, name: str | None = None, pooled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.hidden, self.last = (nn.Conv2d(c, d, 3, padding=1) for c, d in ((1, 16), (16, 16), (16, 3)))
        self.name, self.pooled = name, pooled
        self.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,)}

    def forward(self, x: torch.Tensor) -> Any:
        x = self.last(torch.relu(self.hidden(torch.relu(self.stem(x)))))
        x = x.mean((2, 3)) if self.pooled else x
        return x if self.name is None else {self.name: x}


def recipe(*more: Any, **options: Any) -> Recipe:
    passes = [{"nm-mask": {"pattern": "2:4"}}, *more, "certify"]
    return Recipe.checked({"passes": passes, "bench": {"seconds": 0.02, "batches": [1]}, **options})


def data() -> Data:
    return tiny_data(tiny_mlp(), 32)


@pytest.mark.parametrize(
    ("module", "kind", "text"),
    [
        (Mapped(), "values", "for its shape (b, 3, 8, 8): relative error and cosine similarity are measured"),
        (Mapped("pooler_output", True), "values", "the output pooler_output is taken as values without a decision, by"),
        (Mapped("text_embeds", True), "values", "; --head softmax takes its values as classes"),
        (Mapped("features", True), "values", "by its name"),
        (Mapped("logits", True), "softmax", None),
        (Mapped("embedded_classes", True), "softmax", None),
        (Mapped(None, True), "softmax", None),
    ],
)
def test_auto_knows_values_by_shape_or_name(module: nn.Module, kind: str, text: str | None) -> None:
    model, notes = with_head(capture(module, tiny_source()), "auto", None)
    assert model.head is not None
    assert model.head.kind == kind
    assert bool(notes) == bool(text)
    assert not text or text in notes[0]


def test_the_head_can_be_chosen() -> None:
    model, _ = with_head(capture(Mapped(), tiny_source()), "softmax", None)
    assert model.head == Head()
    model, [note] = with_head(capture(Mapped(None, True), tiny_source()), "values", None)
    assert model.head == Head("values")
    assert "by --head values" in note


def test_a_map_is_compared_by_its_errors_in_every_place(tmp_path: Path) -> None:
    training = {"distill": {"epochs": 1, "batch": 16, "policy": None, "warmup": 0, "rate": 1e-3}}
    artifact = mpcompile.compile(Mapped("maps"), recipe(training), data=data(), output=tmp_path / "out")
    report, folder = artifact.report, artifact.folder
    c = report.comparison
    assert c is not None
    assert c.values is not None
    assert (c.agreement, c.dense, report.certificate) == (None, None, None)
    assert 0 < c.values.relative_error_mean < 1
    assert c.values.cosine_min > 0.5
    assert report.epochs[0].labels_loss is None
    assert 0 < report.epochs[0].teacher_loss < 1
    assert "no certificate: the output has no decision" in report.passes[-1].notes[-1]
    assert any(
        "the labels of the images are not used, as the output maps has no decision" in n for n in report.data.notes
    )
    pages = [(folder / name).read_text() for name in ("report.md", "report.html")]
    for page in pages:
        shown = page.split("<style>")[0] + page.split("</style>")[-1]
        assert f"{c.values.relative_error_mean:.2%}".replace("%", "") in shown
        assert "osine similarity" in shown
        assert not DECISION_WORDS.findall(re.sub(r"logit_\w+|\.comparison\S*", "", shown))


def test_a_map_of_classes_is_compared_position_by_position(tmp_path: Path) -> None:
    artifact = mpcompile.compile(Mapped(), recipe(head="softmax"), data=data(), output=tmp_path / "out")
    c = artifact.report.comparison
    assert c is not None
    assert c.values is None
    assert c.positions == 64
    assert c.agreement is not None
    assert 0.5 < c.agreement <= 1
    assert "of the positions have the class that the dense model gives them" in " ".join(artifact.report.verdict)
    assert artifact.report.certificate is None


@pytest.mark.parametrize(
    "limited", [recipe(gates={"max_drop": 1}), recipe({"restore": {"max_drop": 1}})], ids=["gate", "restore"]
)
def test_a_limit_on_accuracy_is_refused_before_any_pass(limited: Recipe, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(UsageError, match="--max-drop .* the output maps is taken as values, which have none"):
        mpcompile.compile(
            Mapped("maps"), limited, data=data(), output=tmp_path / "out", observe=lambda at: seen.append(at.stage)
        )
    assert set(seen) <= {"load", "capture"}
    assert not (tmp_path / "out").exists()


def test_a_map_in_8_bits_is_compared_by_its_errors(tmp_path: Path) -> None:
    given = recipe("quantize", precision="int8")
    report = mpcompile.compile(Mapped(), given, data=data(), output=tmp_path / "out").report
    assert report.quantized is not None
    assert [row for row in report.quantized.baselines if not row.failed and row.relative_error is None] == []
    assert all(row.agreement is None for row in report.quantized.baselines)
    page = (tmp_path / "out/report.md").read_text()
    assert "The mean relative error of the outputs is" in page
    assert "relative error" in page
    assert [line for line in page.splitlines() if DECISION_WORDS.search(line)] == []
