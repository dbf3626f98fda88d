"""`mpcompile bench`: significance of speedups, times against ONNX Runtime's profiler, files, and refusals."""

import json
import math
import os
import shutil
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commandline import mpcompile as run
from kernel_trials import shorten_trials
from onnx import TensorProto, helper, numpy_helper

import mpcompile
from mpcompile.driver.bench import _built, bench, command
from mpcompile.driver.compare_engines import Settings, call_of
from mpcompile.errors import LoadError, RuntimeMissing, UsageError
from mpcompile.export.onnx_export import INPUT, Exported
from mpcompile.ir.pattern import NM
from mpcompile.measure import timing
from mpcompile.measure.timing import Speedup
from mpcompile.report.bench_report import BenchReport
from mpcompile.runtimes import Build, Engine, TensorRTForRTX, native
from mpcompile.runtimes.ort.cpu import OnnxRuntime
from mpcompile.system.hardware import MachineState, disturbances, machine_state
from mpcompile.testing import TinyMLP

ROOT = Path(__file__).parents[2]
# Large enough that a call takes about 1 ms, most of it in matrix products.
WIDTH, HIDDEN, TOKENS = 512, 2048, 64


class Machine:
    """A simulated clock of a machine with drift, stalls and changing load, all drawn from a seed.

    It replaces `time` in mpcompile.measure.timing. The duration of a call is its cost times the machine's slowdown
    (drift, runs of stalled calls, correlated load) times noise of the engine. That noise has the standard deviation
    `noise` and the correlation `correlation` from round to round.
    """

    def __init__(self, seed: int, noise: float, correlation: float) -> None:
        self.rng, self.noise, self.correlation = np.random.default_rng(seed), noise, correlation
        self.now_ns, self.stalled = 0, False
        self.state: dict[str, float] = {}

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9

    def call(self, name: str, cost_ms: float) -> None:
        """One call of an engine."""
        noise = self._correlated(name, self.noise, self.correlation) + self._correlated("load", 0.1, 0.9)
        self.stalled = bool(self.rng.random() < (0.7 if self.stalled else 0.02))
        drift = 1 + 0.5 * self.perf_counter()
        self.now_ns += round(1e6 * cost_ms * drift * np.exp(noise) * (3 if self.stalled else 1))

    def _correlated(self, name: str, deviation: float, correlation: float) -> float:
        """The next value of a stationary AR(1) process."""
        innovation = deviation * math.sqrt(1 - correlation**2) * float(self.rng.standard_normal())
        self.state[name] = correlation * self.state.get(name, 0.0) + innovation
        return self.state[name]


def speedups(seeds: int, costs_ms: dict[str, float], noise: float, correlation: float) -> list[Speedup]:
    """The speedup of the second engine over the first in one run of 200 rounds for each seed."""
    runs = []
    for seed in range(seeds):
        machine = Machine(seed, noise, correlation)
        calls = {name: partial(machine.call, name, cost) for name, cost in costs_ms.items()}
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(timing, "time", machine)
            samples = timing.sample(calls, 10.0)
        first, second = samples
        runs.append(timing.speedup(samples[first], samples[second], first))
    assert {run.count for run in runs} == {200}
    return runs


def test_equal_engines_rarely_differ_significantly() -> None:
    runs = speedups(100, {"first": 1.0, "second": 1.0}, noise=0.2, correlation=0.5)
    assert sum(each.significant for each in runs) <= 5  # of 100, at 95 % confidence; in 500 other runs 1.6 % are
    # In 500 runs 90.6 % of the intervals hold the true ratio: a block bootstrap is a little narrow. 82 of 100 are three
    # standard errors below that. A bootstrap of single rounds, which ignores their correlation, has 75.
    assert sum(each.interval[0] <= 1 <= each.interval[1] for each in runs) >= 82


def test_an_engine_that_is_a_tenth_slower_is_significantly_slower() -> None:
    runs = speedups(40, {"first": 1.0, "second": 1.1}, noise=0.05, correlation=0.0)
    assert all(each.significant and each.interval[1] < 1 for each in runs)  # the true ratio is 1 / 1.1 = 0.91
    # With the noise of the test above the difference may be missed, but its sign is never wrong.
    runs = speedups(40, {"first": 1.0, "second": 1.1}, noise=0.2, correlation=0.5)
    assert not [each for each in runs if each.significant and each.ratio > 1]


def mlp(path: Path) -> Path:
    """An ONNX file of two layers."""
    rng = np.random.default_rng(0)
    shapes = {"a": (WIDTH, HIDDEN), "b": (HIDDEN, WIDTH)}
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", [INPUT, "a"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["kept"]),
        helper.make_node("MatMul", ["kept", "b"], ["logits"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, TOKENS, WIDTH]) for name in (INPUT, "logits")]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_times_agree_with_onnxruntimes_profiler(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(mlp(tmp_path / "mlp.onnx"), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    started = time.perf_counter_ns()
    ours = timing.sample({"only": lambda: session.run(None, {INPUT: images})}, 0.2)["only"]
    whole = (time.perf_counter_ns() - started) / 1e6
    events = json.loads(Path(session.end_profiling()).read_text())
    theirs = np.array([event["dur"] / 1000 for event in events if event["name"] == "model_run"])
    assert len(theirs) == timing.WARM_UP + len(ours)
    # Each of our times contains the profiler's, which is in whole microseconds; clock slew is up to 500 ppm. All calls
    # together take no longer than the whole run. Other load lengthens both sides of both inequalities.
    assert (ours >= theirs[timing.WARM_UP :] * (1 - 5e-4) - 1e-3).all()
    assert ours.sum() <= whole


class Perceptron(TinyMLP):
    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> mpcompile.Artifact:
    """The artifact of three layers, one at 2:4; with a native file for that layer if the N:M kernel is available."""
    torch.manual_seed(0)
    recipe = mpcompile.Recipe.checked(
        {
            "passes": [{"nm-mask": {"criterion": "magnitude", "refit": "none"}}],
            "bench": {"batches": [1], "seconds": 0.05},
        }
    )
    with pytest.MonkeyPatch.context() as patched:
        shorten_trials(patched, interval=(1.1, 1.2))
        return mpcompile.compile(Perceptron(), recipe, output=tmp_path_factory.mktemp("compiled") / "out")


@pytest.fixture(scope="module")
def found(compiled: mpcompile.Artifact) -> BenchReport:
    return bench(compiled.folder, Settings(batches=(1, 4), seconds=0.2, threads=1))


def test_the_files_hold_the_same_results(found: BenchReport, compiled: mpcompile.Artifact) -> None:
    folder = compiled.folder / "bench" / "ort"
    names = {path.name for path in folder.iterdir()} - {"model.native.onnx"}  # if the N:M kernel is faster
    assert names == {"bench.json", "bench.md", "bench.svg"}
    assert BenchReport.model_validate_json((folder / "bench.json").read_text()) == found
    text = (folder / "bench.md").read_text()
    for row in found.rows():
        assert f"| {' | '.join(row)} |" in text
    for sentence in found.sentences():
        assert sentence in text
    assert found.command == "mpcompile bench OUT --target ort --batch 1,4 --threads 1 --seconds 0.2"
    assert found.command in text
    compiled.verify()  # the folder still passes verify


def test_every_figure_follows_from_the_samples(found: BenchReport) -> None:
    for each in found.batches:
        dense, compressed = (np.array(each.samples_ms[name]) for name in ("dense", "compressed"))
        row = each.timings["compressed"]
        assert row.p50_ms == pytest.approx(np.median(compressed))
        assert row.p99_ms == pytest.approx(np.percentile(compressed, 99))
        assert row.images_per_second == pytest.approx(1000 * each.batch / np.median(compressed))
        against = each.comparisons["compressed/dense"]
        assert against.ratio == pytest.approx(np.median(dense / compressed))
        assert against.interval[0] <= against.ratio <= against.interval[1]


def test_the_plot_is_well_formed_xml_with_labels(compiled: mpcompile.Artifact, found: BenchReport) -> None:
    root = ET.parse(compiled.folder / "bench" / "ort" / "bench.svg").getroot()
    words = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("text"))
    for word in ("batch 1", "batch 4", "dense", "compressed", "95 % interval", "Perceptron"):
        assert word in words


def test_a_runtime_with_sparse_kernels_gets_a_third_build(compiled: mpcompile.Artifact) -> None:
    class WithKernels(OnnxRuntime):
        def has_kernel(self, pattern: NM) -> bool:
            return pattern == NM(2, 4)

        def build(self, exported: Exported, build: Build) -> Engine:  # type: ignore[override]
            asked.append((exported.onnx.name, build.sparse))
            return super().build(exported, build)

    asked: list[tuple[str, bool]] = []
    masks = compiled.verify()

    def exported(path: Path) -> Exported:
        return Exported(
            onnx=path, arch="x", image_shape=(1, 8, 8), precision="fp32", batch=None,
            masks=masks if path == compiled.onnx else (),
        )  # fmt: skip

    arms, _ = _built(WithKernels(), exported(compiled.dense_onnx), exported(compiled.onnx), Build(1))
    assert [arm.name for arm in arms] == ["dense", "masked, kernels off", "compressed"]
    assert asked == [("dense.onnx", False), ("model.onnx", False), ("model.onnx", True)]


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_the_shipped_file_is_timed_as_a_fourth_engine(compiled: mpcompile.Artifact, found: BenchReport) -> None:
    shipped = compiled.folder / "model.native.onnx"
    assert sum(node.domain == "mpcompile" for node in onnx.load(shipped).graph.node) == 1
    assert [arm.name for arm in found.arms] == ["dense", "masked, kernels off", "compressed", "as shipped"]
    assert found.arms[-1].file == shipped.name
    for each in found.batches:
        dense, ours = (np.array(each.samples_ms[name]) for name in ("dense", "as shipped"))
        assert each.comparisons["as shipped/dense"].ratio == pytest.approx(np.median(dense / ours))
    assert [row.what.split(":")[0] for row in found.parity] == [arm.name for arm in found.arms]
    assert any("the gain of the file in the folder" in sentence for sentence in found.sentences())


def test_a_device_call_is_staged_with_the_settings() -> None:
    class Device:
        device = "a device"

        def __call__(self, images: object) -> object:
            raise AssertionError("not staged")

        def layers(self) -> list[dict[str, str]]:
            return []

        def staged(self, images: object, *, transfers: bool, graph: bool) -> object:
            return lambda: (transfers, graph)

    images = np.zeros((1, 1, 2, 2), np.float32)
    call = call_of(Device(), (images,), Settings(transfers=False, graph=True))  # type: ignore[arg-type]
    assert call() == (False, True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (Settings(target="trrt"), UsageError, "target 'trrt' is unknown"),
        (Settings(target="eager"), UsageError, "not a file"),
        (Settings(target="rtx"), RuntimeMissing, "target rtx cannot be timed here: it is left out"),
        (Settings(graph=True, batches=(1,)), UsageError, "no CUDA graph"),
        (Settings(transfers=False, batches=(1,)), UsageError, "no transfers"),
    ],
)
def test_targets_and_settings_that_cannot_be_timed_are_refused(
    settings: Settings,
    error: type[Exception],
    message: str,
    compiled: mpcompile.Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TensorRTForRTX, "missing", lambda self: "it is left out")  # also if it is installed
    before = set(compiled.folder.rglob("*"))
    with pytest.raises(error, match=message):
        bench(compiled.folder, settings)
    assert set(compiled.folder.rglob("*")) - before <= {compiled.folder / "bench"}  # an empty folder at most


def test_a_folder_that_was_changed_is_not_timed(compiled: mpcompile.Artifact, tmp_path: Path) -> None:
    copy = shutil.copytree(compiled.folder, tmp_path / "copy")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(LoadError):
        bench(copy, Settings(batches=(1,)))


def test_the_command_line_prints_the_table_and_refuses_in_one_line(
    compiled: mpcompile.Artifact, tmp_path: Path
) -> None:
    folder = shutil.copytree(compiled.folder, tmp_path / "copy")
    done = run("bench", folder, "--batch", "1", "--seconds", "0.05")
    assert done.returncode == 0, done.stderr
    assert "baseline" in done.stdout
    assert "bench.svg" in done.stdout
    done = run("bench", folder, "--batch", "1,x")
    assert (done.returncode, done.stderr) == (
        2, "mpcompile: --batch '1,x' is not a list of batch sizes; give for example 1,8,64\n"
    )  # fmt: skip


def test_commands_leave_out_default_options() -> None:
    assert command("trt", (1, 8)) == "mpcompile bench OUT --target trt --batch 1,8"
    assert command("trt", (1,), Settings(transfers=False, graph=True)).endswith("--batch 1 --no-transfers --cuda-graph")


def test_load_and_clock_changes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    calm = MachineState(0.1, 3000.0, 1400, 50, ())
    assert disturbances(calm, calm) == ()
    assert disturbances(replace(calm, load=2.0), calm) == ()  # half of the cores
    [load] = disturbances(MachineState(2.1, None, None, None, ()), calm)
    assert "2.1 processes were running on 4 cores" in load
    found = disturbances(calm, MachineState(0.1, 2000.0, 1000, 90, ("SwThermalSlowdown",)))
    assert [sentence.split(" ")[1] for sentence in found] == ["processor's", "GPU's", "GPU"]
    assert (machine_state(gpu=True).load is not None) == hasattr(os, "getloadavg")
