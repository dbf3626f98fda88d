"""Target ort-cuda as far as it goes without a GPU, and on one where there is one."""

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
    """The smallest model as a file."""
    return lower(tiny_mlp(), tmp_path_factory.mktemp("lowered") / "m.onnx")


@pytest.mark.skipif(MISSING is None, reason="there is a GPU")
def test_it_says_what_is_missing(lowered: Lowered) -> None:
    with pytest.raises(RuntimeMissing, match="target ort-cuda: "):
        OnnxRuntimeCuda().build(lowered, Build())


def test_a_session_that_fell_back_to_the_cpu_is_not_taken_for_one_on_a_gpu(lowered: Lowered) -> None:
    with pytest.raises(RuntimeMissing, match="gave CPUExecutionProvider"):
        _require_cuda(session_on(lowered.onnx).session)


def test_a_graph_is_refused_and_a_call_with_transfers_is_the_session_s_own(lowered: Lowered) -> None:
    engine = OrtCudaEngine(session_on(lowered.onnx).session, lowered.onnx, "a GPU")
    images = lowered.model.example.numpy()
    with pytest.raises(BuildError, match="no CUDA graphs"):
        engine.staged(images, transfers=True, graph=True)
    assert np.array_equal(engine.staged(images, transfers=True, graph=False)(), engine(images))  # type: ignore[arg-type]


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_it_computes_what_the_cpu_does(tmp_path: Path) -> None:
    model = tiny_vit()
    lowered = lower(model, tmp_path / "m.onnx")
    images = model.example.numpy()
    engine = OnnxRuntimeCuda().build(lowered, Build())
    # Other kernels sum in other orders.
    assert np.abs(engine(images) - session_on(lowered.onnx)(images)).max() < 1e-4
    engine.staged(images, transfers=False, graph=False)()
