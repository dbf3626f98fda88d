"""`--pattern auto` and `analyze` in int8, with measurements handed in: what they choose, forecast and print."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from commandline import mpcompile
from doc_pages import PAGES, tables

from mpcompile.cli.parse import patterns
from mpcompile.driver.analyze import ModelAnalysis, analyze
from mpcompile.driver.forecast import Forecast, OverFp32
from mpcompile.driver.run_plan import auto_patterns
from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup
from mpcompile.passes import MPBudget
from mpcompile.runtimes import RUNTIMES, QuantizedGemm, QuantizedSpeed, native
from mpcompile.runtimes.native import auto_patterns as auto
from mpcompile.runtimes.native import int8_speeds

FAST, SLOW, UNDECIDED = (1.4, 1.6), (0.7, 0.8), (0.9, 1.3)
Interval = tuple[float, float]
GivenSpeeds = Callable[[Mapping[str, Interval]], list[QuantizedGemm]]


def speedup(interval: Interval, baseline: str = "dense") -> Speedup:
    """A speedup in the middle of its interval."""
    return Speedup(sum(interval) / 2, interval, 20, baseline)


@pytest.fixture
def given_speeds(monkeypatch: pytest.MonkeyPatch) -> GivenSpeeds:
    """Makes a kernel available whose masked products have given speedups over dense int8, by pattern.

    Dense int8 is 3 times as fast as dense fp32. Returns the list of products that are then measured; measuring in
    fp32 fails.
    """

    def speeds(intervals: Mapping[str, Interval]) -> list[QuantizedGemm]:
        measured: list[QuantizedGemm] = []

        def speed_of(gemm: QuantizedGemm, library: Path) -> QuantizedSpeed:
            measured.append(gemm)
            dense = speedup((2.9, 3.1), "dense fp32")
            return QuantizedSpeed(dense, None if gemm.pattern is None else speedup(intervals[str(gemm.pattern)]))

        def in_float(*shape: object) -> Speedup:
            raise AssertionError("int8 needs no measurement in fp32")

        monkeypatch.setattr(native, "library", lambda: Path("a library"))
        monkeypatch.setattr(native, "missing", lambda: None)
        monkeypatch.setattr(int8_speeds, "speed_of", speed_of)
        monkeypatch.setattr(auto, "speedup_of", in_float)
        return measured

    return speeds


QUARTERS = ["8:32|4:16|2:8|1:4", "16:32|8:16|4:8|2:4", "24:32|12:16|6:8|3:4"]  # without sparse kernels


def test_auto_takes_the_patterns_that_are_faster_than_dense_int8(given_speeds: GivenSpeeds) -> None:
    measured = given_speeds({"4:16": FAST, "8:16": SLOW})
    assert list(map(str, auto_patterns("ort", precision="int8"))) == ["4:16|2:8|1:4"]
    assert [gemm.pattern for gemm in measured] == [NM(4, 16), NM(8, 16)]
    assert {(gemm.out, gemm.in_, gemm.tokens) for gemm in measured} == {(768, 768, 197)}


def test_auto_measures_with_the_rows_that_will_share(given_speeds: GivenSpeeds) -> None:
    measured = given_speeds({"4:16x4": FAST, "8:16x4": FAST})
    found = patterns("auto", "ort", 0.6, 4, "int8")
    assert list(map(str, found)) == ["4:16x4|2:8x4|1:4x4", "8:16x4|4:8x4|2:4x4"]
    assert {gemm.pattern for gemm in measured} == {NM(4, 16, 4), NM(8, 16, 4)}


def test_the_command_names_undecided_patterns_and_uses_the_others(example: Path, given_speeds: GivenSpeeds) -> None:
    given_speeds({"4:16": FAST, "8:16": UNDECIDED})
    words = ("--pattern", "auto", "--macs", 0.7, "--precision", "int8", "--json", "--no-null")
    done = mpcompile("analyze", example / "model.safetensors", *words)
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert (
        "--pattern auto leaves out 8:16: the speedup over dense int8 may be 1 on this machine: 4:16 1.50 (1.40–1.60)"
        in line
    )
    assert {row["pattern"] for row in json.loads(done.stdout)["layers"]} == {None, "4:16"}


def test_auto_is_refused_if_no_pattern_beats_dense_int8(example: Path, given_speeds: GivenSpeeds) -> None:
    given_speeds({"4:16": UNDECIDED, "8:16": SLOW})
    words = ("--pattern", "auto", "--macs", 0.7, "--precision", "int8", "--dry-run", "--output", "unused")
    done = mpcompile(example / "model.safetensors", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "no pattern is significantly faster than dense int8 on this machine now (4:16 1.10 (0.90–1.30)" in done.stderr
    )


def test_other_targets_keep_their_patterns_in_int8() -> None:
    assert auto_patterns("trt", precision="int8") == auto_patterns("trt") == (NM(2, 4),)
    assert list(map(str, auto_patterns("rtx", precision="int8"))) == QUARTERS
    with pytest.raises(UsageError, match="target ort-cuda: it has no 8-bit kernels"):
        auto_patterns("ort-cuda", precision="int8")
    with pytest.raises(UsageError, match="--precision 'int9' is unknown; give fp32, .*did you mean 'int8'"):
        patterns("auto", "ort", 0.6, None, "int9")


def test_without_a_kernel_auto_is_each_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert list(map(str, auto_patterns("ort"))) == QUARTERS
    # The same as with the kernel, so that a recipe gives the same masks on every machine.
    assert list(map(str, auto_patterns("ort", precision="int8"))) == ["4:16|2:8|1:4", "8:16|4:8|2:4", QUARTERS[2]]


def test_the_forecast_is_beside_dense_int8_and_dense_fp32(example: Path, given_speeds: GivenSpeeds) -> None:
    measured = given_speeds({"2:4": FAST})
    found = analyze(example / "model.safetensors", MPBudget(null=False), precision="int8")
    assert ModelAnalysis.model_validate_json(found.model_dump_json()) == found
    assert found.precision == "int8"
    assert {gemm.tokens for gemm in measured} == {49}
    assert len(measured) == len(set(measured)) == 4  # equal products are measured once
    [ort] = [forecast for forecast in found.forecasts if forecast.target == "ort"]
    quantized = {row.name: row.macs for row in found.layers if row.unquantized is None}
    assert ort.over_fp32 is not None
    assert list(ort.over_fp32.dense) == list(ort.over_fp32.layers) == list(ort.measured) == list(quantized)
    assert set(ort.layers.values()) == {1.5}
    assert set(ort.over_fp32.layers.values()) == {4.5}
    rest = found.dense_macs - sum(quantized.values())  # in fp32 in both
    dense, planned = (rest + sum(quantized.values()) / ratio for ratio in (3, 4.5))
    assert ort.over_fp32.dense_speedup == pytest.approx(found.dense_macs / dense)
    assert ort.over_fp32.speedup == pytest.approx(found.dense_macs / planned)
    assert ort.speedup == pytest.approx(dense / planned)
    assert ort.weight_bytes < found.dense_weight_bytes / 3


def test_json_has_the_documented_keys(example: Path, given_speeds: GivenSpeeds) -> None:
    """The keys of docs/start.md, of the forecast in JSON, and of its schema are the same."""
    given_speeds({"2:4": FAST})
    done = mpcompile("analyze", example / "model.safetensors", "--precision", "int8", "--json", "--no-null")
    assert (done.returncode, done.stderr) == (0, "")
    [ort] = [row for row in json.loads(done.stdout)["forecasts"] if row["target"] == "ort"]
    [told] = [table for table in tables(PAGES["start"]) if "key of a forecast" in table[0]]
    keys = [*(key for key in ort if key != "over_fp32"), *(f"over_fp32.{key}" for key in ort["over_fp32"])]
    assert [row["key of a forecast"].strip("`") for row in told] == keys
    assert keys == [
        *(key for key in Forecast.model_fields if key != "over_fp32"),
        *(f"over_fp32.{key}" for key in OverFp32.model_fields),
    ]
    assert set(ort["over_fp32"]["dense"]["blocks.0.mlp.fc1"]) == {f.name for f in dataclasses.fields(Speedup)}


def test_masked_layers_that_are_not_faster_count_as_dense_int8(example: Path, given_speeds: GivenSpeeds) -> None:
    given_speeds({"2:4": UNDECIDED})
    found = analyze(example / "model.safetensors", MPBudget(null=False), precision="int8")
    [ort] = [forecast for forecast in found.forecasts if forecast.target == "ort"]
    assert ort.over_fp32 is not None
    assert set(ort.layers.values()) == {1.0}
    assert ort.speedup == 1
    assert ort.over_fp32.speedup == ort.over_fp32.dense_speedup > 2


def test_a_pattern_without_an_int8_kernel_is_forecast_as_dense_int8(example: Path, given_speeds: GivenSpeeds) -> None:
    measured = given_speeds({})
    found = analyze(example / "model.safetensors", MPBudget(patterns=(NM(3, 4),), null=False), precision="int8")
    [ort] = [forecast for forecast in found.forecasts if forecast.target == "ort"]
    assert {gemm.pattern for gemm in measured} == {None}
    assert (ort.accelerated, ort.speedup, ort.speedup_bound) == ((), None, 1)
    assert ort.over_fp32 is not None
    assert ort.over_fp32.speedup == ort.over_fp32.dense_speedup > 2


def test_targets_that_do_not_run_int8_say_why(example: Path, given_speeds: GivenSpeeds) -> None:
    given_speeds({"2:4": FAST})
    found = analyze(example / "model.safetensors", MPBudget(null=False), precision="int8")
    refused = {forecast.target: forecast.refused for forecast in found.forecasts if forecast.refused}
    assert set(refused) == {"eager", "ort-cuda"}
    assert all(reason == RUNTIMES[target].refuses("int8", None) for target, reason in refused.items())


def test_the_command_prints_both_comparisons(example: Path, given_speeds: GivenSpeeds) -> None:
    given_speeds({"2:4": FAST})
    done = mpcompile("analyze", example / "model.safetensors", "--precision", "int8", "--no-null")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "ort, times as fast, measured on this machine" in text
    assert "3.00 (2.90–3.10) │ 1.50 (1.40–1.60) │ 4.50 │" in text
    assert re.search(r"are 1\.50 to 1\.50 times as fast as dense int8: 1\.[34]\d for the whole model", text)
    assert re.search(r"Beside dense fp32 the whole model is 3\.\d\d times as fast, and dense int8 2\.\d\d", text)
    assert "Target ort-cuda does not run int8: it has no 8-bit kernels" in text


def test_other_precisions_are_refused(example: Path) -> None:
    done = mpcompile("analyze", example / "model.safetensors", "--precision", "fp16")
    assert (done.returncode, done.stdout) == (2, "")
    assert "analyze forecasts fp32 and int8, and the precision is fp16; give int8 or fp32" in done.stderr


def test_without_a_precision_the_forecast_has_no_int8(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    found = analyze(example / "model.safetensors", MPBudget(null=False))
    assert found.precision == "fp32"
    assert all(forecast.over_fp32 is None and forecast.refused is None for forecast in found.forecasts)


@pytest.mark.parametrize(("theirs", "faster"), [(4.0, int8_speeds.OURS), (1.5, int8_speeds.THEIRS)])
def test_masked_is_compared_with_the_faster_dense_kernel(theirs: float, faster: str) -> None:
    times = {int8_speeds.FLOAT: 6.0, int8_speeds.THEIRS: theirs, int8_speeds.OURS: 2.0, int8_speeds.MASKED: 1.0}
    speed = int8_speeds.compared({name: np.full(20, ms) for name, ms in times.items()})
    dense = min(theirs, 2.0)
    assert speed.masked is not None
    assert (speed.masked.baseline, speed.masked.ratio) == (faster, dense)
    assert (speed.dense.baseline, speed.dense.ratio) == ("dense fp32", 6 / dense)
    without = int8_speeds.compared({name: np.full(20, ms) for name, ms in times.items() if name != int8_speeds.MASKED})
    assert without == QuantizedSpeed(speed.dense)


@pytest.mark.parametrize("pattern", [NM(8, 16), NM(4, 16, 4), NM(2, 4), NM(1, 4, 2)])
def test_random_masks_have_their_pattern(pattern: NM) -> None:
    mask = int8_speeds.random_mask(pattern, (64, 22), np.random.default_rng(0))
    assert mask.shape == (64, 22)
    assert (mask.reshape(-1, pattern.of, 22).sum(1) == pattern.keep).all()
    assert (mask[:, 0] == mask[:, pattern.rows - 1]).all()
    assert (mask[:, 0] != mask[:, pattern.rows]).any()


def test_every_kernel_is_run_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.library()
    if library is None:
        pytest.skip(native.missing() or "")
    names = [int8_speeds.FLOAT, int8_speeds.THEIRS, int8_speeds.OURS]
    assert list(int8_speeds.kernels(QuantizedGemm(32, 48, 5, None), library, 1)) == names
    assert list(int8_speeds.kernels(QuantizedGemm(32, 48, 5, NM(2, 4)), library, 1)) == [*names, int8_speeds.MASKED]
    speed = int8_speeds.speed_of(QuantizedGemm(32, 48, 5, NM(2, 4)), library, 1, 0.0)
    assert speed.masked is not None
    assert speed.dense.ratio > 0
