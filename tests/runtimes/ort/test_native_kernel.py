"""The engine with the native kernel: which batch sizes decide, and which file it runs and writes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_trials import shorten_trials
from numpy.typing import NDArray

from mpcompile.export.onnx_export import Lowered
from mpcompile.measure.timing import Speedup
from mpcompile.runtimes import native
from mpcompile.runtimes.native import kernel_selection
from mpcompile.runtimes.ort.native_kernel import NMEngine, native_engine
from mpcompile.runtimes.protocol import Build

BuildEngine = Callable[[tuple[int, ...], tuple[float, float]], tuple[NMEngine, list[int]]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, vit_file: Lowered, tmp_path: Path) -> BuildEngine:
    """Builds an engine for batch sizes, with the interval of the whole file's speedup at the largest of them.

    Returns the engine and the batch sizes that were compared.
    """
    library = native.library()
    if library is None:
        pytest.skip(native.missing() or "")
    shorten_trials(monkeypatch, interval=(1.1, 1.2))

    def built(batches: tuple[int, ...], largest: tuple[float, float]) -> tuple[NMEngine, list[int]]:
        compared: list[int] = []

        def whole(dense: object, native: object, images: NDArray[np.float32], seconds: float) -> Speedup:
            compared.append(len(images))
            return Speedup(1.1, largest if len(images) == max(batches) else (1.1, 1.2), 15, "")

        monkeypatch.setattr(kernel_selection, "compare_whole", whole)
        return native_engine(vit_file, Build(1, batches=batches, folder=tmp_path), library), compared

    return built


def test_the_file_is_compared_at_every_batch_of_the_run(build: BuildEngine, vit_file: Lowered, tmp_path: Path) -> None:
    engine, compared = build((8, 1, 4, 1), (1.1, 1.2))
    assert compared == [1, 4, 8]
    assert engine.file == tmp_path / "model.native.onnx"
    assert engine.file.is_file()
    assert all(choice.native for choice in engine.choices)


def test_a_file_that_is_not_faster_at_one_batch_is_not_written(
    build: BuildEngine, vit_file: Lowered, tmp_path: Path
) -> None:
    engine, compared = build((8, 1, 4), (0.99, 1.2))
    assert set(compared) == {1, 4, 8}
    assert engine.file == vit_file.onnx
    assert not list(tmp_path.iterdir())
    verdicts = engine.judged((), vit_file.masks, np.zeros((1, 1, 8, 8), np.float32))
    for verdict in verdicts:
        assert verdict.chosen is False
        assert verdict.kernel is None
        assert "the whole file is not significantly faster at batch 8, 1.10 (0.99–1.20) times" in verdict.reason
