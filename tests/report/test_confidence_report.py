"""The report on confidence: rows, sentences and the reliability diagram, with and without labels."""

from dataclasses import replace

import pytest
import torch

from mpcompile.driver.artifact import Artifact
from mpcompile.ir.head import Head
from mpcompile.measure.confidence_comparison import compare_confidence
from mpcompile.measure.model_confidence import ConfidenceComparison
from mpcompile.passes.certify import certificate
from mpcompile.report import render
from mpcompile.report.chart import Dot
from mpcompile.report.confidence_chart import reliability
from mpcompile.report.confidence_sentences import on_confidence
from mpcompile.report.confidence_tables import confidence, quartiles
from mpcompile.report.run_tables import summary
from mpcompile.report.schema import Report
from mpcompile.report.sentences import proven


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense and compressed logits of 200 images, of which the compressed ones have half of the size, and labels."""
    rng = torch.Generator().manual_seed(0)
    dense = 3 * torch.randn(200, 5, generator=rng)
    labels = dense.softmax(1).multinomial(1, generator=rng)[:, 0]
    return dense, dense / 2 + 0.3 * torch.randn(200, 5, generator=rng), labels


def found(labelled: bool = True, head: Head | None = None) -> ConfidenceComparison:
    dense, compressed, labels = logits()
    result = compare_confidence(dense, compressed, labels if labelled else None, head)
    assert result is not None
    return result


def with_confidence(report: Report, one: ConfidenceComparison | None, factor: float | None = None) -> Report:
    assert report.comparison is not None
    return report.model_copy(update={"comparison": replace(report.comparison, confidence=one), "logit_factor": factor})


def test_sentences_name_probability_calibration_and_factor(reported: Artifact) -> None:
    report = with_confidence(reported.report, found(), 1.7)
    first, folded, best, close = on_confidence(report.comparison, report.logit_factor)
    one = found()
    assert first.startswith(f"The mean top probability is {one.compressed.top_probability:.3f} compressed and ")
    assert "; the expected calibration error is " in first
    assert folded == "A factor of 1.70 on the logits, which changes no answer, is in the last layers."
    assert best.startswith(f"A factor of {one.best_factor:.2f} on these logits would bring the probabilities closest")
    assert "in the lowest quarter of its margins, " in close


def test_without_labels_there_is_no_calibration_error(reported: Artifact) -> None:
    report = with_confidence(reported.report, found(labelled=False))
    assert not any("calibration" in text for text in on_confidence(report.comparison, None))
    assert not any("calibration" in row[0] for row in confidence(report).texts())
    assert reliability(report) is None
    assert "reliability-chart" not in render.html(report)


def test_a_threshold_has_a_probability_of_its_decision(reported: Artifact) -> None:
    report = reported.report
    assert report.comparison is not None
    head = Head("multilabel")
    comparison = replace(report.comparison, confidence=found(labelled=False, head=head), head=head)
    assert on_confidence(comparison, None)[0].startswith("The mean probability of a decision is ")


def test_values_have_no_section(reported: Artifact) -> None:
    report = with_confidence(reported.report, None)
    assert on_confidence(report.comparison, None) == ()
    assert '<section id="confidence">' not in render.html(report)
    assert "## Confidence" not in render.markdown(report)


def test_equal_models_have_no_sentence_on_margins(reported: Artifact) -> None:
    dense, _, labels = logits()
    report = with_confidence(reported.report, compare_confidence(dense, dense, labels))
    [sentence] = on_confidence(report.comparison, None)
    assert sentence.startswith("The mean top probability")


def test_the_summary_and_the_section_have_the_same_numbers(reported: Artifact) -> None:
    report = with_confidence(reported.report, found(), 1.7)
    rows = {row[0]: row[1:] for row in summary(report).texts()}
    for name, *cells in confidence(report).texts()[:2]:
        assert list(rows[name]) == cells
    assert confidence(report).texts()[-1][2] == "1.700"
    assert [row[3] for row in quartiles(report).texts()] == ["50"] * 4
    assert "<summary>Confidence</summary>" in render.markdown(report)


def test_each_bin_is_a_dot_at_its_probability_and_its_share(reported: Artifact) -> None:
    one = found()
    chart = reliability(with_confidence(reported.report, one))
    assert chart is not None
    assert one.dense.calibration is not None
    dots = [mark for mark in chart.marks if isinstance(mark, Dot) and mark.style == "dense"]
    assert len(dots) == len(one.dense.calibration.bins)
    low, high = 52, chart.width - 16
    for dot, row in zip(dots, one.dense.calibration.bins, strict=True):
        assert (dot.x - low) / (high - low) == pytest.approx(row.confidence)
        assert f"{row.right:.1%} are right" in dot.tooltip


def test_certificates_say_whom_the_loss_hits() -> None:
    dense, compressed, _ = logits()
    c = certificate(dense, compressed, 0.95)
    [claim] = [claim for claim, _ in proven(c) if "quarter of the dense margin" in claim]
    assert claim.endswith(", ".join(f"{row.agreement:.1%}" for row in c.quartiles))
    assert sum(row.agreeing for row in c.quartiles) == c.agreeing < c.images
    assert not any("quarter" in claim for claim, _ in proven(certificate(dense, dense, 0.95)))
