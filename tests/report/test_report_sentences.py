"""The sentences of a report: the verdict and the command that reproduces the folder."""

from dataclasses import replace

import pytest

from mpcompile.driver.artifact import Artifact
from mpcompile.ir.results import Certificate
from mpcompile.measure.comparison import Accuracy
from mpcompile.report.sentences import command, command_terms, verdict_on


def test_the_command_has_capitals_for_unknown_paths(reported: Artifact) -> None:
    report = reported.report
    path = report.model.name
    assert command(report) == f"mpcompile {path} --config recipe.yaml --data DATA -o OUT"
    assert report.model.sha256 in command_terms(report)[0]
    spaced = report.model_copy(update={"model": replace(report.model, name="a b; c.pt")})
    assert command(spaced).startswith("mpcompile 'a b; c.pt' --config")
    unseen = report.data.model_copy(update={"calibration": 0, "held_out": 0})
    in_memory = report.model_copy(update={"model": replace(report.model, name=report.model.arch), "data": unseen})
    assert command(in_memory) == "mpcompile MODEL --config recipe.yaml -o OUT"
    assert "was passed in memory" in command_terms(in_memory)[0]


def test_the_verdict_starts_with_speed_and_ends_with_proofs(reported: Artifact) -> None:
    report = reported.report
    assert report.verdict[0].startswith("At batch 1 ")
    assert "the dense model in the same precision on the same target" in report.verdict[0]
    assert "proven unchanged" in report.verdict[-1]
    c = Certificate(64, 60, 50, 0.9, 0.95, 0.1, 0.3, 1.5, 0.9, ())
    sentences = verdict_on(report.layers, "ort", True, report.cost, None, (), certificate=c)
    assert sentences[-1] == (
        "50 of 64 held-out predictions are proven unchanged. On unseen images of the same distribution, at least "
        "90.00% of the predictions are those of the dense model (95% confidence)."
    )


def test_the_summary_says_why_fewer_tokens_are_merged(reported: Artifact) -> None:
    """The attribution stood only in the log and in the table of passes."""
    report = reported.report
    note = "token merging without masks loses 2.73 points of accuracy on 256 validation images"
    sentences = verdict_on(report.layers, "ort", True, report.cost, None, (), notes=(note,))
    assert f"T{note[1:]}." in sentences


def test_accuracy_has_its_confidence_interval(reported: Artifact) -> None:
    accuracy = Accuracy(0.8825, None, 2000)
    assert accuracy.interval() == pytest.approx((0.8676, 0.8959), abs=1e-4)  # Wilson's formula by hand
    report = reported.report
    assert report.comparison is not None
    found = replace(report.comparison, dense=accuracy, compressed=accuracy)
    sentences = verdict_on(report.layers, "ort", True, report.cost, found, ())
    [sentence] = [text for text in sentences if "95% confidence interval" in text]
    assert sentence.startswith("The 95% confidence interval of the compressed model's top-1 is 86.8 to 89.6%. Another")
    assert "number of PyTorch threads" in sentence
