"""`--precision int8`: the folder of a masked and of a dense model; verify, load and bench on it."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from kernel_trials import shorten_trials
from quantized_runs import native_kernel, quantized

from mpcompile.driver.artifact import Artifact
from mpcompile.driver.bench import bench
from mpcompile.driver.compare_engines import Settings
from mpcompile.errors import LoadError, UsageError
from mpcompile.measure.timing import ROUNDS
from mpcompile.runtimes import native
from mpcompile.runtimes.ort.int8 import saturates
from mpcompile.runtimes.ort.session import OrtEngine


def weight_types(file: Path) -> set[int]:
    """The stored types of the matrices of a file."""
    return {tensor.data_type for tensor in onnx.load(file).graph.initializer if len(tensor.dims) > 1}


def count(file: Path, operator: str) -> int:
    return sum(node.op_type == operator for node in onnx.load(file).graph.node)


def test_the_folder_has_dense_fp32_dense_int8_and_compressed_int8(int8_masked: Artifact) -> None:
    assert count(int8_masked.dense_onnx, "QuantizeLinear") == 0
    dense_int8 = int8_masked.dense_quantized_onnx
    assert dense_int8 == int8_masked.folder / "dense_int8.onnx"
    for file in (int8_masked.onnx, dense_int8):
        assert onnx.TensorProto.INT8 in weight_types(file)
        assert count(file, "QuantizeLinear") > 0
    files = (int8_masked.dense_onnx, dense_int8, int8_masked.onnx)
    assert [int8_masked.exported(file).precision for file in files] == ["fp32", "int8", "int8"]
    assert {"dense_int8.onnx", "dense.onnx"} <= {row.name for row in int8_masked.report.files}
    names = [row.what.partition(":")[0] for row in int8_masked.report.parity]
    assert names == ["dense", "compressed", "dense in int8", "compressed", "dense in int8"]  # file, then engine


def test_the_recipe_of_the_folder_has_what_the_target_decided(int8_masked: Artifact) -> None:
    step = int8_masked.recipe.step("quantize")
    assert step is not None
    lanes = "none" if not saturates() else "pairs" if native.missing() else "blocks"
    assert step.params == {"activations": "u8", "outputs": "convolutions", "lanes": lanes}
    assert int8_masked.recipe == int8_masked.report.recipe


def test_masks_and_hashes_are_verified_and_a_changed_baseline_is_found(int8_masked: Artifact, tmp_path: Path) -> None:
    assert {row.pattern for row in int8_masked.verify()} == {"2:4"}
    copy = Artifact.open(shutil.copytree(int8_masked.folder, tmp_path / "out"))
    file = copy.dense_quantized_onnx
    assert file is not None
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(LoadError, match="dense_int8.onnx was changed"):
        copy.verify()


def test_a_loaded_engine_runs_the_int8_file_and_the_original_class_is_refused(
    int8_masked: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    shorten_trials(monkeypatch, interval=(1.1, 1.2))
    onnx_engine, engine = int8_masked.load("onnx", threads=1), int8_masked.load("engine", threads=1)
    assert isinstance(onnx_engine, OrtEngine)
    assert onnx_engine.native == (native.missing() is None)
    assert not onnx_engine.is_reference
    assert {row.native for row in onnx_engine.quantised_layers(images)} == {onnx_engine.native}
    assert np.array_equal(onnx_engine(images), engine(images))
    with pytest.raises(UsageError, match="is in int8: it quantises activations, which the original class"):
        int8_masked.load("torch")


@native_kernel
def test_a_folder_without_the_kernel_is_loaded_with_a_warning(
    int8_masked: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    expected = int8_masked.load("onnx", threads=1)(images)
    monkeypatch.setattr("mpcompile.runtimes.native.missing", lambda: "the library is not built")
    with caplog.at_level("WARNING", "mpcompile"):
        engine = int8_masked.load("onnx", threads=1)
    [record] = [record for record in caplog.records if record.name.startswith("mpcompile.runtimes.ort")]
    assert record.getMessage() == (
        "model.native.onnx needs the native N:M kernel, which cannot be used here: the library is not built. "
        "model.onnx runs instead, without it"
    )
    assert isinstance(engine, OrtEngine)
    assert engine.file.name == "model.onnx"
    assert np.abs(engine(images) - expected).max() < 0.1 * np.abs(expected).max()  # roundings of 8 bits
    assert int8_masked.verify()


def test_without_a_mask_the_compressed_model_is_the_dense_int8_model(int8_dense: Artifact) -> None:
    report, found = int8_dense.report, quantized(int8_dense)
    assert int8_dense.dense_quantized_onnx is None
    assert not (int8_dense.folder / "dense_int8.onnx").exists()
    assert found.before_quantize is None
    assert [row.name for row in found.baselines] == ["int8, dynamic", "int8, static"]
    assert onnx.TensorProto.INT8 in weight_types(int8_dense.onnx)
    assert int8_dense.verify() == ()
    assert any(text.startswith("None of the") for text in report.verdict)
    assert "N:M kernel" not in " ".join(report.verdict)
    assert report.certificate is not None


def test_the_baseline_is_the_dense_model_through_the_same_pass(int8_masked: Artifact, int8_dense: Artifact) -> None:
    """model.onnx of the dense recipe and dense_int8.onnx of the masked one have the same weights."""
    file = int8_masked.dense_quantized_onnx
    assert file is not None
    one, other = ({t.name: t.raw_data for t in onnx.load(path).graph.initializer} for path in (file, int8_dense.onnx))
    assert one == other


@native_kernel
def test_bench_times_dense_int8_too(int8_masked: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.measure.timing.ROUNDS", (ROUNDS[0], ROUNDS[0]))
    shorten_trials(monkeypatch, interval=(1.1, 1.2))
    found = bench(int8_masked.folder, Settings(batches=(1,), threads=1, seconds=0.01))
    assert [(arm.name, arm.what) for arm in found.arms[:4]] == [
        ("dense", "the dense model in fp32"),
        ("dense, 8 bits", "the dense model in int8, native kernels allowed"),
        ("masked, kernels off", "the compressed model, native kernels not allowed"),
        ("compressed", "the compressed model, native kernels allowed"),
    ]
    assert [arm.name for arm in found.arms[4:]] == ["as shipped"]
    assert found.meanings["compressed/masked, kernels off"] == "native kernels in all layers"
    assert found.meanings["compressed/dense, 8 bits"] == "the gain beside the dense model in 8 bits"
    assert set(found.batches[0].comparisons) == set(found.meanings)
    assert {row.chosen for row in found.verdicts} == {True}
    names = {path.name for path in (int8_masked.folder / "bench" / "ort").glob("*.onnx")}
    assert names == {"model.native.onnx", "dense_int8.native.onnx"}
    assert "the dense model of the same folder in fp32" in found.baseline
    assert int8_masked.verify()
