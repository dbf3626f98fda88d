"""`mpcompile analyze`: spectra, plan and forecast of the trained example, which is not changed."""

import copy
import json
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from commandline import mpcompile, stages_in
from torch import nn

from mpcompile.analysis.spectrum import analyse
from mpcompile.driver.analyze import ModelAnalysis, analyze, budget_from
from mpcompile.errors import UsageError
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import Speedup
from mpcompile.passes import MPBudget
from mpcompile.report.spectrum_plots import plot_layer, write_plots
from mpcompile.runtimes import RUNTIMES, GemmShape, native
from mpcompile.runtimes.native import auto_patterns as auto


@pytest.fixture(scope="module")
def module() -> nn.Module:
    example = Path(__file__).parents[2] / "examples" / "fashion_vit"
    return load(Request(str(example / "model.safetensors"))).module


def test_every_layer_has_two_fits_or_a_reason(module: nn.Module) -> None:
    before = copy.deepcopy(module.state_dict())
    found = analyze(module)
    for row in found.layers:
        assert (row.fit is None) == (row.unfitted is not None)
        assert (row.null is None) == (row.fit is None)
        assert (row.pattern is None) == (row.reason is not None)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert ModelAnalysis.model_validate_json(found.model_dump_json()) == found


def test_macs_add_up_and_the_plan_is_counted(module: nn.Module) -> None:
    found = analyze(module, MPBudget(macs=0.7, null=False))
    attention = 6 * 2 * 49 * 49 * 128  # MACs of attention, which belong to no layer with a weight
    assert sum(row.macs for row in found.layers) + attention == found.dense_macs
    planned = found.dense_macs - sum(row.macs / 2 for row in found.layers if row.pattern)
    assert found.planned_macs == pytest.approx(planned)
    assert found.planned_macs <= 0.7 * found.dense_macs * (1 + 1e-6)
    assert found.planned_weight_bytes < found.dense_weight_bytes


def test_a_speedup_is_forecast_only_with_kernels(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for forecast in analyze(module).forecasts:
        kernels = RUNTIMES[forecast.target].has_kernel(NM(2, 4))
        assert (forecast.speedup_bound > 1, bool(forecast.accelerated)) == (kernels, kernels)
    monkeypatch.setattr(type(RUNTIMES["ort"]), "has_kernel", lambda self, pattern: pattern == NM(2, 4))
    tried = {}
    faster, undecided = Speedup(1.5, (1.4, 1.6), 20, "dense"), Speedup(1.1, (0.9, 1.2), 20, "dense")

    def predicted(self: object, products: dict[str, GemmShape]) -> dict[str, Speedup]:
        tried.update(products)
        return {name: undecided if name == "blocks.0.mlp.fc1" else faster for name in products}

    monkeypatch.setattr(type(RUNTIMES["ort"]), "predicted", predicted)
    found = analyze(module, MPBudget(null=False))
    [ort] = [forecast for forecast in found.forecasts if forecast.target == "ort"]
    assert ort.accelerated == (NM(2, 4),)
    assert ort.macs == found.planned_macs
    assert ort.speedup_bound == pytest.approx(found.dense_macs / found.planned_macs)
    planned = {row.name: row for row in found.layers if row.pattern}
    assert tried == {  # the example has 49 tokens
        name: GemmShape(row.shape[0], row.shape[1], 49, NM(2, 4)) for name, row in planned.items()
    }
    assert ort.measured == {name: undecided if name == "blocks.0.mlp.fc1" else faster for name in planned}
    assert {name for name, ratio in ort.layers.items() if ratio == 1} == {"blocks.0.mlp.fc1"}
    saved = sum(row.macs for name, row in planned.items() if name != "blocks.0.mlp.fc1") / 3
    assert ort.speedup == pytest.approx(found.dense_macs / (found.dense_macs - saved))


def test_budget_parameters_are_checked_as_in_a_recipe() -> None:
    assert budget_from({"patterns": ["2:4"], "macs": 0.5}) == MPBudget(macs=0.5)
    with pytest.raises(UsageError, match="pass mp-budget: signal: .*'mq'"):
        budget_from({"signal": "mq"})


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return mpcompile("analyze", *words)


def test_the_command(example: Path, tmp_path: Path) -> None:
    done = run(example / "model.safetensors", "--macs", 0.7, "--plots", tmp_path / "plots", "--no-null")
    assert done.returncode == 0, done.stderr
    assert stages_in(done.stderr) == ["load", "capture", "spectra", "budget"]
    assert "the budget keeps it" in done.stdout
    assert "Target eager has kernels for none of these patterns" in done.stdout
    files = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert "overview.svg" in files
    assert "blocks.2.mlp.fc2.svg" in files
    for name in files:
        assert ET.parse(tmp_path / "plots" / name).getroot().tag.endswith("svg")


def patch_speedups(monkeypatch: pytest.MonkeyPatch, intervals: dict[str, tuple[float, float]]) -> None:
    """Makes a kernel available for which each pattern has the speedup over dense with the given interval."""

    def speedup_of(pattern: NM, *shape_and_library: object) -> Speedup:
        low, high = intervals[str(pattern)]
        return Speedup((low + high) / 2, (low, high), 20, "dense")

    monkeypatch.setattr(native, "library", lambda: Path("a library"))
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(auto, "speedup_of", speedup_of)
    monkeypatch.setattr(type(RUNTIMES["ort"]), "predicted", lambda self, products: {})


FAST, SLOW, UNDECIDED = (1.4, 1.5), (0.7, 0.8), (0.9, 1.2)


def test_json_is_the_only_output(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"8:32", "12:32", "16:32"}
    patch_speedups(monkeypatch, {f"{n}:32": FAST if f"{n}:32" in fast else SLOW for n in auto.KEPT})
    done = run(example / "model.safetensors", "--pattern", "auto", "--macs", 0.6, "--json", "--no-null")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    used = {row["pattern"] for row in found["layers"]}
    assert None in used
    assert used - {None}
    assert used <= {None, *fast}
    assert found["planned_macs"] <= 0.6 * found["dense_macs"] * (1 + 1e-6)


def test_auto_leaves_out_and_names_patterns_without_significant_speedup(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_speedups(monkeypatch, {f"{n}:32": FAST if n < 20 else UNDECIDED if n == 20 else SLOW for n in auto.KEPT})
    done = run(example / "model.safetensors", "--pattern", "auto", "--macs", 0.6, "--json", "--no-null")
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert (
        "--pattern auto leaves out 20:32: the speedup over dense may be 1 on this machine: 8:32 1.45 (1.40–1.50)"
        in line
    )
    assert {row["pattern"] for row in json.loads(done.stdout)["layers"]} <= {None, "8:32", "12:32", "16:32"}


def test_auto_is_refused_if_no_pattern_is_significantly_faster(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_speedups(monkeypatch, {f"{n}:32": UNDECIDED for n in auto.KEPT})
    done = run(example / "model.safetensors", "--pattern", "auto", "--macs", 0.6, "--json", "--no-null")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no pattern is significantly faster than dense on this machine now (8:32 1.05 (0.90–1.20), " in done.stderr
    assert "try again when the machine is idle, name the patterns (--pattern 1:4,2:4)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_a_kernel_auto_is_each_quarter(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    done = run(example / "model.safetensors", "--pattern", "auto", "--macs", 0.6, "--json", "--no-null")
    assert (done.returncode, done.stderr) == (0, "")
    used = {row["pattern"] for row in json.loads(done.stdout)["layers"]}
    assert used <= {None, "8:32", "16:32", "24:32"}


def test_auto_patterns_are_measured_on_this_machine() -> None:
    library = native.library()
    if library is None:
        pytest.skip(native.missing() or "")
    found = auto.measured(library)
    assert set(found) == {NM(kept, auto.GROUP) for kept in auto.KEPT}
    assert all(speedup.interval[0] <= speedup.ratio <= speedup.interval[1] for speedup in found.values())


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--pattern", "auto"), 2, "so that --macs is reached; give --macs too"),
        (("--pattern", "auto:x", "--macs", "0.5"), 2, "is neither auto nor auto:M"),
        (("--macs", "1.5"), 2, "macs is 1.5"),
        (("--macs", "0.1"), 4, "0.1 of the multiply-accumulates cannot be reached"),
        (("--budget", "magic"), 2, "pass mp-budget: signal:"),
        (("--macs", "0.7", "--budget", "owl"), 4, "needs calibration images; give --data"),
        (("--plots", "/proc/plots"), 2, "/proc/plots cannot be written to"),
    ],
)
def test_wrong_options_are_refused_in_one_line(example: Path, words: tuple[str, ...], code: int, text: str) -> None:
    done = run(example / "model.safetensors", *words, "-q", "--no-null")
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_plots_are_deterministic(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=rng)
    weight += torch.randn(96, 1, generator=rng) * torch.randn(1, 128, generator=rng)
    found = analyse(weight.numpy())
    first, second = (write_plots({"a/b": found}, tmp_path / name)[0].read_bytes() for name in "xy")
    assert first == second
    assert (tmp_path / "x" / "a_b.svg").is_file()
    axes = plot_layer("a", found).axes[0]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert any(f"spikes ({found.fit.spikes})" in text for text in texts)
    assert any("shuffled" in text for text in texts)
    assert f"{found.fit.edge:.3g}" in " ".join(texts)
    assert any("beyond" in text.get_text() for text in axes.texts)
