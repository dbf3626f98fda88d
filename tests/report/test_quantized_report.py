"""The report of a model in int8: the loss of each part, the speed beside dense int8, and every number at its key."""

import json

from quantized_runs import quantized
from report_page import PageTables, jq, markdown_tables, read_number

from mpcompile.driver.artifact import Artifact
from mpcompile.measure.timing import ROUNDS
from mpcompile.report import render
from mpcompile.runtimes.ort.cpu import NO_INT8_KERNEL


def test_each_layer_is_in_int8_or_has_a_reason(int8_masked: Artifact) -> None:
    rows = {row.name: row for row in int8_masked.report.layers}
    assert rows["blocks.0.mlp.fc1"].precision == "int8"
    assert rows["blocks.0.mlp.fc1"].rounding_error is not None
    for row in rows.values():
        assert (row.precision is None) == bool(row.unquantized)
    text = render.markdown(int8_masked.report)
    [table] = [table for table in markdown_tables(text) if table[0] == ["layer", "why it stays in floating point"]]
    assert {cells[0] for cells in table[1:]} == {name for name, row in rows.items() if row.precision is None}


def test_numbers_of_the_tables_equal_the_values_at_their_keys(int8_masked: Artifact, int8_dense: Artifact) -> None:
    for artifact in (int8_masked, int8_dense):
        content = json.loads(artifact.report.model_dump_json())
        page = PageTables(render.html(artifact.report))
        checked = 0
        for name in ("summary-table", "quantized-table", "layers-table"):
            for text, attrs in (cell for row in page.tables[name] for cell in row):
                if key := attrs.get("data-key"):
                    shown, half = read_number(text)
                    assert abs(jq(content, key) - shown) <= half * (1 + 1e-9) + 1e-12, (name, text, key)
                    checked += name == "quantized-table"
        assert checked > 20
        assert page.texts("quantized-table") in markdown_tables(render.markdown(artifact.report))


def test_masks_that_no_kernel_skips_are_not_sold_as_speed(int8_masked: Artifact) -> None:
    report = int8_masked.report
    assert not report.accelerated
    assert {row.reason for row in report.verdicts} == {NO_INT8_KERNEL}
    assert not list(int8_masked.folder.glob("*.native.onnx"))
    text = " ".join(report.verdict)
    assert "the dense model in fp32 on the same target" in text
    assert "the fastest dense int8 model (int8, " in text
    assert "no int8 N:M kernel ran." in text or "No int8 N:M kernel ran, so the masks do not cause the gain" in text


def test_the_loss_is_split_into_masks_int8_and_both(int8_masked: Artifact) -> None:
    """The masks alone are what `nm-mask` alone gives, and int8 alone is the dense model in int8."""
    first, c = quantized(int8_masked).before_quantize, int8_masked.report.comparison
    assert first is not None
    assert first.name == "masks alone"
    ours = quantized(int8_masked).baselines[0]
    assert c is not None
    assert first.logit_shift_mean is not None
    assert ours.logit_shift_mean is not None
    [sentence] = [text for text in int8_masked.report.verdict if text.startswith("The mean logit shift is")]
    shifts = (first.logit_shift_mean, ours.logit_shift_mean, c.logit_shift_mean)
    assert sentence.startswith(
        "The mean logit shift is {:.3f} by masks alone, {:.3f} by int8 alone and {:.3f} by both; ".format(*shifts)
    )


def test_every_dense_int8_model_is_evaluated_and_timed_beside_the_compressed_one(int8_masked: Artifact) -> None:
    found, report = quantized(int8_masked), int8_masked.report
    assert [row.name for row in found.baselines] == ["int8, mpcompile", "int8, dynamic", "int8, static"]
    assert [row.file for row in found.baselines] == ["dense_int8.onnx", None, None]
    for row in found.baselines:
        assert row.failed is None
        assert row.method
        assert None not in (row.top1, row.agreement, row.logit_shift_mean)
        assert [timing.batch for timing in row.timings] == [1, 2]
        assert (
            {timing.count for timing in row.timings} == {ROUNDS[0]} == {pair.speedup.count for pair in report.latency}
        )
    for n, speed in enumerate(found.over_fastest):
        medians = {row.name: row.timings[n].p50_ms for row in found.baselines}
        assert speed.baseline == min(medians, key=lambda name: medians[name])
    assert len(found.over_fastest) == 2
