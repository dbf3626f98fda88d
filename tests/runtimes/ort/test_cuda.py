"""Target ort-cuda: what can be tested without a GPU, and its results on one."""

from pathlib import Path

import numpy as np
import pytest

from mpcompile.errors import BuildError, RuntimeMissing
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.runtimes import Build, OnnxRuntimeCuda
from mpcompile.runtimes.ort.cuda import OrtCudaEngine, _require_cuda
from mpcompile.runtimes.ort.session import session_on
from mpcompile.testing import tiny_mlp, tiny_vit

MISSING = OnnxRuntimeCuda().missing()


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Returns the smallest model as an ONNX file."""
    return lower(tiny_mlp(), tmp_path_factory.mktemp("lowered") / "m.onnx")


@pytest.mark.skipif(MISSING is None, reason="there is a GPU")
def test_build_names_what_is_missing(lowered: Lowered) -> None:
    with pytest.raises(RuntimeMissing, match="target ort-cuda: "):
        OnnxRuntimeCuda().build(lowered, Build())


def test_a_session_that_fell_back_to_the_cpu_is_rejected(lowered: Lowered) -> None:
    with pytest.raises(RuntimeMissing, match="gave CPUExecutionProvider"):
        _require_cuda(session_on(lowered.onnx).session)


def test_cuda_graphs_are_refused_and_a_staged_call_returns_the_logits(lowered: Lowered) -> None:
    engine = OrtCudaEngine(session_on(lowered.onnx).session, lowered.onnx, "a GPU")
    images = lowered.model.example.numpy()
    with pytest.raises(BuildError, match="no CUDA graphs"):
        engine.staged(images, transfers=True, graph=True)
    assert np.array_equal(engine.staged(images, transfers=True, graph=False)(), engine(images))  # type: ignore[arg-type]


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_it_computes_the_same_as_the_cpu(tmp_path: Path) -> None:
    model = tiny_vit()
    lowered = lower(model, tmp_path / "m.onnx")
    images = model.example.numpy()
    engine = OnnxRuntimeCuda().build(lowered, Build())
    # GPU kernels sum in another order.
    assert np.abs(engine(images) - session_on(lowered.onnx)(images)).max() < 1e-4
    engine.staged(images, transfers=False, graph=False)()
