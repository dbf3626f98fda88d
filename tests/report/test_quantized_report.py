"""The report of a model in int8: the loss of each part, the speed beside dense int8, and every number at its key."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from quantized_runs import MASK, compiled, native_kernel, quantized
from report_page import PageTables, jq, markdown_tables, read_number

from mpcompile.driver.artifact import Artifact
from mpcompile.measure.timing import ROUNDS, Speedup
from mpcompile.report import render
from mpcompile.report.quantized_sentences import beside_dense, on_8_bit_kernels, without_kernel
from mpcompile.runtimes.ort.cpu import NO_INT8_KERNEL


def test_each_layer_is_in_int8_or_has_a_reason(int8_masked: Artifact) -> None:
    rows = {row.name: row for row in int8_masked.report.layers}
    assert rows["blocks.0.mlp.fc1"].precision == "int8"
    assert rows["blocks.0.mlp.fc1"].rounding_error is not None
    for row in rows.values():
        assert (row.precision is None) == bool(row.unquantized)
    text = render.markdown(int8_masked.report)
    [table] = [table for table in markdown_tables(text) if table[0] == ["layer", "why it runs in floating point"]]
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


def test_masks_that_no_kernel_skips_are_not_sold_as_speed(
    tiny_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcompile.runtimes.native.missing", lambda: "it was not built")
    artifact = compiled(tiny_files, tmp_path / "out", MASK)
    report = artifact.report
    assert not report.accelerated
    assert {row.reason for row in report.verdicts} == {NO_INT8_KERNEL.format("it was not built")}
    assert not list(artifact.folder.glob("*.native.onnx"))
    assert not any(row.native for row in quantized(artifact).kernels)
    text = " ".join(report.verdict)
    assert "the dense model in fp32 on the same target" in text
    assert "the fastest dense int8 model (int8, " in text
    assert "o int8 kernel that skips zeros ran" in text
    assert "on the native kernels" not in render.markdown(report)


@native_kernel
def test_masks_that_the_native_kernel_skips_are_told_with_their_baseline(int8_masked: Artifact) -> None:
    report, found = int8_masked.report, quantized(int8_masked)
    assert report.accelerated
    assert all(row.chosen and str(row.kernel).startswith("NMGemmInt8, ") for row in report.verdicts)
    assert {path.name for path in int8_masked.folder.glob("*.native.onnx")} == {
        "model.native.onnx",
        "dense_int8.native.onnx",
    }
    assert all(row.native for row in found.kernels)
    text = " ".join(report.verdict)
    count = len(found.kernels)
    assert f"{count} of {count} quantised layers ran on 8-bit kernels, {count} of them on the native kernels" in text
    assert "kernel that skips zeros ran" not in text
    assert str(found.baselines[0].method).endswith("selected them (dense_int8.native.onnx)")


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


def test_a_layer_that_the_target_runs_in_float_has_its_reason(int8_masked: Artifact) -> None:
    report, found = int8_masked.report, quantized(int8_masked)
    names = {row.name for row in report.layers if row.precision}
    assert {row.layer for row in found.kernels} == names
    assert on_8_bit_kernels(replace(found, kernels=())) == []
    [sentence] = on_8_bit_kernels(found)
    assert sentence in report.verdict
    first, *others = (replace(row, in_8_bits=True, reason=None, kernel="QGemm") for row in found.kernels)
    whole = replace(found, kernels=(first, *others))
    assert on_8_bit_kernels(whole) == [f"{len(names)} of {len(names)} quantised layers ran on 8-bit kernels."]
    left = replace(first, in_8_bits=False, reason="the input is not quantised")
    changed = report.model_copy(update={"quantized": replace(found, kernels=(left, *others))})
    assert changed.in_float()[first.layer] == "the input is not quantised"
    assert "In floating point: the input is not quantised." in render.html(changed)
    [text] = on_8_bit_kernels(replace(found, kernels=(left, *others)))
    assert text.startswith(
        f"{len(names) - 1} of {len(names)} quantised layers ran on 8-bit kernels. The table of layers"
    )


def speeds(*ratios: float) -> tuple[Speedup, ...]:
    return tuple(Speedup(ratio, (ratio - 0.01, ratio + 0.01), 15, "int8, static") for ratio in ratios)


def test_what_masks_bring_beside_dense_int8_follows_from_the_numbers(int8_masked: Artifact) -> None:
    found, latency = quantized(int8_masked), int8_masked.report.latency
    slower = replace(found, over_fastest=speeds(0.9, 1.0))
    assert without_kernel(slower) == [
        "The masks bring no speed beside dense int8 on this target: no int8 kernel that skips zeros ran."
    ]
    faster = replace(found, over_fastest=speeds(1.0, 1.2))
    assert without_kernel(faster) == [
        "No int8 kernel that skips zeros ran, so the masks do not cause the gain beside dense int8."
    ]
    assert without_kernel(replace(found, over_fastest=())) == []
    assert beside_dense(faster, latency) == [
        "At batch 1 no significant difference from the fastest dense int8 model (int8, static) was measured "
        "(interval 0.99 to 1.01, 15 rounds).",
        "At batch 2 the compressed model is 1.20 times as fast as the fastest dense int8 model (int8, static) "
        "(interval 1.19 to 1.21, 15 rounds).",
    ]
